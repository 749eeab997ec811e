import random

import pytest
import torch
from helpers import tiny_config, tiny_model

from tokcom.modeling_tokcom import TokComModel
from tokcom.objective_tokcom import TokComTextLatentObjective, objective_class
from tokcom.scheduling_tokcom import generation_order
from tokcom.training.presets import preset_config, preset_names


@pytest.mark.parametrize("block_size", [None, 1, 4])
@pytest.mark.parametrize("stage", ["codec", "flow"])
def test_each_stage_trains_its_half_and_all_of_it(stage, block_size):
    torch.manual_seed(0)
    model = tiny_model(stage, transformer_config={"block_size": block_size}).train()
    model(torch.randint(0, 320, (4, 32))).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"codec" if stage == "codec" else "transformer"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_save_and_reload_gives_identical_outputs(tmp_path):
    torch.manual_seed(0)
    model = TokComModel(tiny_config()).eval()
    model.codec.set_latent_statistics(torch.randn(16), torch.rand(16) + 0.5)
    model.save_pretrained(tmp_path)
    reloaded = TokComModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 320, (2, 16))
    latents = model.encode(ids).latents
    assert torch.equal(reloaded.encode(ids).latents, latents)
    assert torch.equal(reloaded.decode(latents).logits, model.decode(latents).logits)
    time = torch.rand(2, 4)
    assert torch.equal(
        reloaded.denoise(latents, time).latents, model.denoise(latents, time).latents
    )
    assert not any(p.requires_grad for p in reloaded.codec.parameters())


@pytest.mark.parametrize("per_latent", [True, False])
def test_what_is_known_is_told_the_time_that_sampling_tells_it(per_latent):
    shape = {"block_size": None, "per_latent_timestep": per_latent}
    model, told = TokComModel(tiny_config(transformer_config=shape)).eval(), []
    ids, known = torch.randint(0, 320, (1, 32)), torch.zeros(1, 32, dtype=torch.long)
    known[:, :16] = 1
    forward = model.transformer.forward
    model.transformer.forward = lambda x, time, *args, **kwargs: (
        told.append(time),
        forward(x, time, *args, **kwargs),
    )[1]
    model(ids, timestep=0.25, known_mask=known)
    assert told[0][0].tolist() == [1.0 if per_latent else 0.25] * 4 + [0.25] * 4


@pytest.mark.parametrize("bad", [320 + 1, -1])
def test_id_outside_the_vocabulary_is_named(bad):
    model = TokComModel(tiny_config())
    with pytest.raises(ValueError, match=f"{bad}.*321"):
        model.encode(torch.tensor([[1, 2, 3, bad]]))


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_padded_row_has_the_loss_of_its_truncated_twin(block_size):
    """Padding at the end changes neither what the real latents see nor what is averaged."""
    model = TokComModel(tiny_config(transformer_config={"block_size": block_size})).eval()
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(0, 320, (1, 20))
    padded, mask = torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32, dtype=torch.long)
    padded[:, :20], mask[:, :20] = ids, 1
    fix_noise(model)
    short, long = model(ids, timestep=0.3), model(padded, mask, timestep=0.3)
    torch.testing.assert_close(long.loss, short.loss)
    assert not torch.isclose(model(padded, timestep=0.3).loss, short.loss)


def fix_noise(model):
    """Noise that depends on the position alone and blocks from offset 0, so two lengths can be
    compared."""
    from tokcom import modeling_tokcom

    order = modeling_tokcom.generation_order

    def predict(objective, clean, timestep, **known):
        torch.manual_seed(0)
        noise = torch.randn(1, 64, clean.latents.shape[-1])[:, : clean.latents.shape[1]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: noise)
            patch.setattr(
                modeling_tokcom,
                "generation_order",
                lambda v, q, r, g: order(v, q, r, g) if q is None else blocks(v, q),
            )
            return TokComModel.predict_noised(model, objective, clean, timestep, **known)

    def blocks(valid, size):
        return (torch.arange(valid.shape[1]) // size).expand(len(valid), -1)

    model.predict_noised = predict


def test_fixed_timestep_at_one_shows_the_clean_latents():
    """With t = 1 an oracle that returns its input has no error, so the loss is measured on the
    right positions."""
    model = TokComModel(tiny_config(transformer_config={"block_size": 4})).eval()
    model.transformer.forward = lambda latents, *a, **k: type("O", (), {"latents": latents})()
    output = model(torch.randint(0, 320, (2, 32)), timestep=1.0)
    assert output.mse_loss.item() < 1e-10


def test_token_losses_average_to_the_cross_entropy():
    model = TokComModel(tiny_config()).eval()
    ids, mask = torch.randint(0, 320, (2, 32)), torch.ones(2, 32, dtype=torch.long)
    mask[0, :3], mask[1, 24:] = 0, 0
    output = model(ids, mask)
    assert output.token_losses.shape == (2, 8, 4) and not output.token_losses[0, 0, :3].any()
    torch.testing.assert_close(output.token_losses.sum() / mask.sum(), output.ce_loss)


def test_generation_order_covers_blocks_of_the_right_size():
    torch.manual_seed(0)
    valid = torch.ones(64, 20, dtype=torch.bool)
    order = generation_order(valid, 4, 0.0)
    assert (order.diff(dim=1) >= 0).all() and order.diff(dim=1).max() == 1
    first_sizes = (order == order[:, :1]).sum(1)
    assert set(first_sizes.tolist()) == {1, 2, 3, 4}  # a prompt may end anywhere
    assert (generation_order(valid, None, 0.0) == 0).all()
    gaps = generation_order(valid, 4, 0.999)
    assert (gaps >= 20).any() and max(torch.bincount(row).max() for row in gaps) <= 4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_is_selectable(implementation):
    model = TokComModel._from_config(tiny_config(), attn_implementation=implementation)
    assert model.transformer.config._attn_implementation == implementation


def test_gradient_checkpointing_keeps_the_loss():
    config = tiny_config()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = TokComModel(config).train()
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        random.seed(1)
        loss = model(torch.randint(0, 320, (2, 32))).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_bfloat16_weights_need_no_casts_by_the_caller():
    model = TokComModel(tiny_config()).to(torch.bfloat16)
    ids = torch.randint(0, 320, (1, 16))
    latents = model.encode(ids).latents
    prediction = model.denoise(latents, torch.rand(1, 4)).latents
    assert prediction.dtype == latents.dtype == torch.bfloat16
    assert (
        model.decode(latents).logits.shape
        == model.decode(latents.float()).logits.shape
        == (1, 16, 321)
    )
    for stage in ("codec", "flow"):
        model.set_stage(stage)
        model(ids).loss.backward()


def test_forward_names_a_bad_id_and_refuses_unknown_arguments():
    model = TokComModel(tiny_config())
    with pytest.raises(ValueError, match="999"):
        model(torch.full((1, 8), 999))
    with pytest.raises(TypeError, match="timesteps"):
        model(torch.zeros(1, 8, dtype=torch.long), timesteps=0.5)


def test_forward_refuses_what_the_objective_does_not_read():
    model = tiny_model()
    with pytest.raises(ValueError, match="TokComTextLatentObjective does not read.*pixel_values"):
        model(torch.zeros(1, 8, dtype=torch.long), pixel_values=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mse_weight": 0.0, "ce_weight": 0.0}, "one of them must be positive"),
        ({"ce_share": 0.0}, "ce_share"),
        ({"context_dropout": 1.0}, "context_dropout"),
        ({"noise_drawz": 2}, "did you mean flow.objective.noise_draws"),
        ({"turn_share": 0.5}, "no setting flow.objective.turn_share"),
    ],
)
def test_impossible_settings_of_an_objective_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(objective=settings)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_an_objective_of_its_own_and_bidirectional_models_one_draw(name):
    config = preset_config(name)
    kind = objective_class(config, "flow")
    has_text = config.codec_config.has_tokens and config.prediction_type == "latents"
    assert (kind is TokComTextLatentObjective) == has_text
    if config.transformer_config.block_size is None and hasattr(kind, "noise_draws"):
        assert kind().noise_draws == 1


def test_settings_of_training_are_not_saved(tmp_path):
    tiny_model(objective={"ce_weight": 0.5}).save_pretrained(tmp_path)
    assert "ce_weight" not in (tmp_path / "config.json").read_text()


def test_composite_config_reaches_the_halves():
    config = preset_config("debug", 100)
    assert config.codec_config.vocab_size == 101 and config.codec_config.mask_token_id == 100


def test_known_latents_of_pixels_give_the_loss_of_encoding():
    torch.manual_seed(0)
    shape = {"transformer_config": {"num_hidden_layers": 1}}
    model = TokComModel(preset_config("pixel-tiny", 300, **shape)).eval()
    ids, losses = torch.randint(0, 300, (1, 64)), []
    for known in ({}, {"latents": model.encode(ids).latents}):
        torch.manual_seed(1)
        losses.append(model(ids, timestep=0.5, **known).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "prediction", [{}, {"prediction_type": "tokens", "codec_config": {"encoder_type": "token"}}]
)
def test_latents_that_are_known_give_the_loss_of_encoding(prediction):
    torch.manual_seed(0)
    model = TokComModel(tiny_config(**prediction)).train()
    ids, losses = torch.randint(0, 320, (2, 32)), []
    for known in ({}, {"latents": model.encode(ids).latents}):
        torch.manual_seed(1)
        random.seed(1)
        losses.append(model(ids, **known).loss)
    assert torch.equal(*losses)
