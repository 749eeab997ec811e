import math

import numpy as np
import pytest
import torch

from modeling_tokcom import TokComModel
from scheduling_tokcom import TokComFlowMatchScheduler
from tests.conftest import tiny_config
from tests.test_training import quick
from train_accelerate import StageTrainer, run
from training.noise import EDGES, NoiseLocation, middle

TOKENS = ["model.prediction_type=tokens", "model.codec_config.encoder_type=token", "model.timestep_sampling=uniform"]
TOKENS += ["model.transformer_config.self_conditioning=false", "model.token_stagger=1.0", "model.noise_draws=4"]


def test_annealing_goes_in_equal_steps_from_the_start_to_the_models_own_location():
    model = TokComModel(tiny_config(320, timestep_loc=1.5))
    noise, seen = NoiseLocation(model, "annealed", -0.5, max_steps=5), []
    for step in range(5):
        noise.before_update(step)
        seen.append(model.config.timestep_loc)
    assert seen == pytest.approx([-0.5, 0.0, 0.5, 1.0, 1.5])


@pytest.mark.parametrize("center", [-1.0, 0.5, 2.0])
def test_the_middle_of_a_curve_is_where_it_rises(center):
    places = (EDGES[1:] + EDGES[:-1]) / 2
    curve, counts = 6 / (1 + np.exp(-3 * (places - center))), np.full(len(places), 100.0)
    assert middle(curve * counts, counts) == pytest.approx(center, abs=0.05)
    assert middle(np.full(len(places), 500.0), counts) is None  # a flat one says nothing


@pytest.mark.parametrize("start", [-1.0, 2.5])
def test_the_learned_location_goes_where_the_cross_entropy_rises_from_either_side(start):
    model, center = TokComModel(tiny_config(320, timestep_loc=start)), 0.8
    model.set_stage("flow")
    noise = NoiseLocation(model, "learned", 0.0, 1)
    output = model(torch.randint(0, 320, (8, 64)))
    for seed in range(100):
        torch.manual_seed(seed)
        odds = torch.randn(output.token_losses.shape) + noise.location
        output.token_times, output.token_losses = torch.sigmoid(-odds), 6 * torch.sigmoid(3 * (odds - center))
        noise.after_update([output], lambda x: x)
    assert model.config.timestep_loc == pytest.approx(center, abs=0.3)


@pytest.mark.parametrize("overrides", [["model.noise_draws=1"], TOKENS], ids=["latents", "tokens"])
def test_a_run_that_learns_its_noise_goes_on_where_it_stood_and_samples_on_that_grid(tmp_path, monkeypatch, overrides):
    import training.noise

    monkeypatch.setattr(training.noise, "RANGE", 0.0)  # six steps teach nothing; any curve will do
    whole, broken = (quick(tmp_path / name, *overrides, "flow.noise_location=learned") for name in ("a", "b"))
    first = TokComModel.from_pretrained(run(whole))
    save = StageTrainer._save_checkpoint

    def save_and_stop(self):
        save(self)
        if self.stage == "flow" and self.progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    monkeypatch.setattr(StageTrainer, "_save_checkpoint", save)
    second = TokComModel.from_pretrained(run(broken))
    assert second.config.timestep_loc == first.config.timestep_loc
    assert second.config.token_shift == first.config.token_shift
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    if overrides is TOKENS:
        assert first.config.token_shift != whole.model.get("token_shift", tiny_config(320).token_shift)
        assert first.token_head.shift == first.config.token_shift
    else:
        assert first.config.timestep_loc != tiny_config(320).timestep_loc
        shift = TokComFlowMatchScheduler.from_model_config(first.config).config.shift
        assert shift == pytest.approx(math.exp(first.config.timestep_loc))


@pytest.mark.parametrize(
    "mode, overrides, message",
    [
        ("sometimes", {}, "sometimes"),
        ("annealed", {"timestep_sampling": "uniform"}, "'uniform'"),
        ("learned", {"ce_share": 0.5}, "ce_share=1"),
        ("learned", {"noise_draws": 2}, "noise_draws=1"),
    ],
)
def test_what_has_no_location_or_no_cross_entropies_is_refused(mode, overrides, message):
    with pytest.raises(ValueError, match=message):
        NoiseLocation(TokComModel(tiny_config(320, **overrides)), mode, 0.0, 10)
