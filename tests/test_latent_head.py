"""Latent heads: parameter counts, identity at first, only the head is trained, and it is in the
decode path."""

import pytest
import torch
from helpers import seeded

from tokcom.heads_tokcom import TokComLatentHead
from tokcom.modeling_tokcom import TokComModel
from tokcom.objective_tokcom import _any_draw
from tokcom.training.presets import preset_config

HEADS = [(head, refiner) for head in ("none", "mlp", "vq") for refiner in ("none", "mlp")][1:]
PLACES = torch.arange(4)[None, :, None]
SMALL = {"latent_head_size": 32, "latent_refiner_size": 16, "latent_head_codes": 64}


def published(head: str, refiner: str) -> TokComLatentHead:
    channels = {
        "codec_config": {"latent_channels": 64},
        "transformer_config": {"latent_channels": 64},
    }
    return TokComLatentHead(
        preset_config("debug", **channels, latent_head=head, latent_refiner=refiner)
    )


@pytest.mark.parametrize(
    "head, refiner, count",
    [
        ("mlp", "none", 536_768),
        ("none", "mlp", 33_728),
        ("vq", "none", 1_061_056),
        ("vq", "mlp", 1_094_784),
    ],
)
def test_heads_have_the_published_numbers_of_parameters(head, refiner, count):
    module = published(head, refiner)
    codebook = 0 if module.quantizer is None else module.quantizer.codebook.numel()
    assert sum(p.numel() for p in module.parameters()) + codebook == count


@pytest.mark.parametrize("head, refiner", HEADS)
def test_an_untrained_head_changes_nothing(build, head, refiner):
    plain, other = build(), build(latent_head=head, latent_refiner=refiner, **SMALL)
    other.model.load_state_dict(plain.model.state_dict(), strict=False)
    latents = torch.randn(2, 4, 16)
    assert torch.equal(other.model.refine(latents), latents)
    options = dict(gen_length=16, num_inference_steps=2)
    first, second = (
        pipe("Squinty", generator=seeded(), **options).sequences for pipe in (plain, other)
    )
    assert torch.equal(first, second)


def trained(pipe, steps: int = 5) -> TokComModel:
    model, ids = pipe.model.train(), torch.randint(0, 300, (4, 32), generator=seeded())
    model.set_stage("head")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        model(ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("head, refiner", HEADS)
def test_training_a_head_leaves_the_backbone_bit_identical_and_changes_what_is_decoded(
    build, tmp_path, head, refiner
):
    pipe = build(latent_head=head, latent_refiner=refiner, **SMALL)
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    model = trained(pipe)
    for name, value in model.state_dict().items():
        assert name.startswith("latent_head") or torch.equal(value, before[name]), name
    latents = torch.randn(1, 4, 16, generator=seeded())
    assert not torch.equal(model.refine(latents), latents)
    options = dict(num_chunks=4, num_inference_steps=2, output_type="seq")
    samples = pipe.generate(generator=seeded(), **options)
    assert torch.equal(
        samples.sequences, model.to_ids(samples.latents)
    )  # the refined latents are what is decoded
    pipe.save_pretrained(tmp_path / "out")
    again = type(pipe).from_pretrained(tmp_path / "out")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again.generate(generator=seeded(), **options).sequences, samples.sequences)


def test_a_head_learns(build):
    torch.manual_seed(0)
    model = trained(build(latent_head="mlp", latent_refiner="mlp", **SMALL), steps=1)
    ids = torch.randint(0, 5, (4, 32), generator=seeded())

    def loss() -> float:
        torch.manual_seed(1)
        return model(ids, timestep=0.9).ce_loss.item()

    first, parameters = loss(), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(60):
        model(ids, timestep=0.9).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < first - 0.1  # the decoder has random weights: little is to be had


def test_codebooks_work_in_half_precision(build):
    model = trained(
        build(latent_head="vq", codec_config={"quantizer": "vq", "num_codes": 16}, **SMALL)
    ).bfloat16()
    with torch.no_grad():
        encoded = model.encode(torch.randint(0, 300, (1, 16)))
        refined = model.refine(encoded.latents)
    assert encoded.latents.dtype == refined.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"latent_head": "linear"}, "'none', 'mlp' or 'vq'"),
        ({"latent_refiner": "unet"}, "'none' or 'mlp'"),
        (
            {
                "latent_head": "mlp",
                "prediction_type": "tokens",
                "codec_config": {"encoder_type": "token"},
            },
            "latents",
        ),
    ],
)
def test_impossible_heads_are_named(overrides, message):
    with pytest.raises(
        Exception, match="architecture"
    ) as error:  # the strict dataclass wraps the ValueError
        preset_config("debug", **overrides)
    assert message in str(error.value.__cause__ or error.value)


def test_stage_head_needs_a_head():
    with pytest.raises(ValueError, match="both are 'none'"):
        TokComModel(preset_config("debug")).set_stage("head")


@pytest.mark.parametrize("name", ["mse_weight", "ce_weight"])
def test_stage_head_has_nothing_to_weigh(build, name):
    model = build(latent_head="mlp", **SMALL).model
    with pytest.raises(ValueError, match=f"`{name}`.*no effect in stage 'head'"):
        model.set_stage("head", **{name: 0.5})


def test_the_cross_entropy_of_several_draws_is_that_of_any_of_them():
    states = torch.arange(4.0)[None, :, None, None].expand(8, 4, 512, 2)  # (B, M, N, C)
    drawn = _any_draw(states)
    assert drawn.shape == (8, 512, 2) and torch.equal(drawn[..., 0], drawn[..., 1])
    shares = torch.bincount(drawn[..., 0].long().flatten()) / drawn[..., 0].numel()
    assert torch.allclose(shares, torch.full((4,), 0.25), atol=0.04)


def test_a_share_of_the_cross_entropy_has_its_mean():
    config = preset_config("debug", transformer_config={"block_size": None})
    model = TokComModel(config).train()
    objective = model.objective
    estimate, ids = torch.randn(2, 16, 16), torch.randint(0, 300, (2, 64))
    mask = torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        tokens, count = objective._decoded_nll(model, estimate, mask, ids, None)
        objective.ce_share = 0.25
        parts = [objective._decoded_nll(model, estimate, mask, ids, None) for _ in range(200)]
    assert parts[0][0].shape == (2, 4, 4) and parts[0][1] == count / 4
    mean = torch.stack([tokens.sum() / count for tokens, count in parts]).mean()
    torch.testing.assert_close(mean, tokens.sum() / count, rtol=0.02, atol=0)
    model.eval()
    with torch.no_grad():
        assert objective._decoded_nll(model, estimate, mask, ids, None)[0].shape == (2, 16, 4)
