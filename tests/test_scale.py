"""What many devices need, shown on a CPU: networks on `meta`, units that are shards, and few waits
of the host."""

import contextlib
import itertools
import sys

import pytest
import torch
from helpers import ROOT, build_model, seeded, tiny_model

from tokcom.modeling_tokcom import TokComModel
from tokcom.training.pipelines import build_pipeline
from tokcom.training.presets import preset_config, preset_names

sys.path.insert(0, str(ROOT / "tests" / "harness"))
import host_reads

LARGE = ["v5.2", "style-512-128", "pixel-h16", "base", "video-dmd", "omni-tiny"]


def on_meta(preset: str) -> TokComModel:
    vocab_size = None if preset == "video-large" else 32000  # clips without captions
    with torch.device("meta"):
        return TokComModel(preset_config(preset, vocab_size))


def pure_networks(model: TokComModel) -> list[torch.Tensor]:
    """What every network of a model with parameters gives for two samples on its own device, to be
    differentiated."""
    config = model.config
    width = config.transformer_config.latent_channels
    block = config.transformer_config.block_size
    length = getattr(config.codec_config, "num_tokens", 0) or 4 * (block or 4)
    device = model.device
    positions = torch.zeros(
        2, length, model.config.transformer_config.num_position_axes, device=device
    )
    latents = torch.zeros(2, length, width, device=device)
    features = config.transformer_config.feature_size
    inputs = {"group_size": config.codec_config.group_size}
    if features:
        inputs["features"] = torch.zeros(2, length, features, device=device)
    if config.transformer_config.num_context_layers:
        size = config.transformer_config.hidden_size
        inputs["entry"] = torch.zeros(2, length, size, device=device)
    times = torch.zeros(2, length, device=device)
    found = [model.transformer(latents, times, position_ids=positions, **inputs).latents]
    if config.transformer_config.num_context_layers:
        mask = torch.ones(2, length, length, dtype=torch.bool, device=device)
        found.append(model.transformer.read_context(inputs["features"], positions, mask))
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    if model.condition_embedding is not None:
        found.append(model.condition_embedding(ids))
    if model.token_head is not None:
        found.append(model.token_head.embedding(ids))
    codec = model.codec
    streams = getattr(codec, "streams", {"": codec})
    for one in streams.values():
        kind = one.config.model_type
        if not list(one.parameters()):
            continue
        if kind == "tokcom_chunk_codec":
            chunks = torch.zeros(2, one.config.chunk_size, dtype=torch.long, device=device)
            found.append(one._posterior(chunks)[0])
            chunk = torch.zeros(2, 1, one.config.latent_channels, device=device)
            found.append(one.decode(chunk).logits)
        elif kind == "tokcom_style_codec":
            size = one.config.image_size
            tokens = one._raw_tokens(torch.zeros(2, 3, size, size, device=device))[0]
            found += [tokens, one._decode(tokens, None)]
        else:
            found.append(one.encoder(torch.zeros(2, one.config.patch_values, device=device)))
            found.append(one.decoder(torch.zeros(2, one.config.latent_channels, device=device)))
    return found


@pytest.mark.parametrize("preset", preset_names())
def test_the_networks_of_every_preset_run_forward_and_backward_without_memory(preset, monkeypatch):
    """On `meta` nothing is computed, so a tensor that is made elsewhere, or a number that is read,
    is an error."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # `meta` has none
    model = on_meta(preset)
    model.requires_grad_(True)
    outputs = pure_networks(model)
    assert all(output.is_meta for output in outputs)
    sum(output.float().sum() for output in outputs).backward()
    reached = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert reached > 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", LARGE)
def test_no_unit_that_a_shard_gathers_at_once_holds_most_of_a_model(preset):
    model = on_meta(preset)
    total = sum(p.numel() for p in model.parameters())
    inner = set()
    largest = 0
    # children come before parents, and what a child has gathered its parent does not hold
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            own = [p for p in module.parameters() if id(p) not in inner]
            largest = max(largest, sum(p.numel() for p in own))
            inner |= {id(p) for p in own}
    root = sum(p.numel() for p in model.parameters() if id(p) not in inner)
    assert max(largest, root) < 0.5 * total, (largest, root, total)
    if preset == "style-512-128":
        assert largest < 310e6 and root < 40e6 and total > 2.4e9  # before, one unit of 2.2e9


@pytest.mark.parametrize("build", [build_model, tiny_model])
def test_a_sampled_block_waits_for_the_device_once_and_only_its_random_numbers_go_there(build):
    """Whether its predictions are finite is read when it is done; nothing is made of Python numbers."""
    model = build().eval()
    size = model.config.transformer_config.block_size
    pipe = build_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.generate(2)
    counts = {}
    for steps in (4, 16):
        model.config.num_inference_steps = steps
        counts[steps] = host_reads.sample_counts(pipe, (2 * size, 4 * size))
    assert counts[4] == counts[16], "reads must not grow with the steps of a block"
    per_block = {kind: count * size for kind, count in counts[4].items()}
    assert per_block == {"reads": 1, "shapes": 0, "transfers": 0}


@pytest.mark.parametrize("is_training", [True, False])
def test_attention_in_turn_to_space_and_time_waits_as_often_as_any_other(is_training):
    """A clip's codec knows how many latents a moment has; a sampled clip asks once, not at every step."""
    counts = {}
    for kind in ("full", "factorized"):
        torch.manual_seed(0)
        clip = {"num_frames": 4, "height": 16, "width": 24, "patch_size": 8}
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_type": kind}
        config = preset_config("video-tiny", codec_config=clip, transformer_config=small)
        model = TokComModel(config).train(is_training)
        model.set_stage("flow")
        pipe = build_pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        for steps in (2, 5):
            model.config.num_inference_steps = steps
            with host_reads.counting_mode() as counter:
                if is_training:
                    model(pixel_values=torch.zeros(2, 3, 4, 16, 24)).loss.backward()
                else:
                    pipe(output_type="latent")
            counts[kind, steps] = counter.counts["reads"]
    assert counts["factorized", 2] == counts["factorized", 5]
    assert counts["factorized", 5] == counts["full", 5] + (not is_training)


def test_texts_that_are_written_in_turn_read_no_more_than_one_alone(pipe):
    """Each has a scheduler of its own, so none has to lay out its steps anew."""

    def reads(texts: int, length: int) -> float:
        streams = [
            pipe.stream_batch([[5, 6, 7, 8]], length, generator=[seeded()]) for _ in range(texts)
        ]
        with host_reads.counting_mode() as counter:
            for _ in itertools.zip_longest(*streams):
                pass
        return counter.counts["reads"] / texts

    for length in (16, 32):
        assert reads(2, length) == reads(1, length)


@pytest.mark.parametrize("timestep_sampling", ["uniform", "cosine"])
def test_steps_of_a_flow_and_of_a_diffusion_read_nothing(timestep_sampling):
    clip = {"num_frames": 2, "height": 16, "width": 16, "patch_size": 8}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    options = {"timestep_sampling": timestep_sampling, "noise_std": 1.0}
    options |= {"codec_config": clip, "transformer_config": small}
    pipe = build_pipeline(TokComModel(preset_config("video-tiny", **options)).eval())
    pipe.set_progress_bar_config(disable=True)
    counts = []
    for steps in (2, 5):
        with host_reads.counting_mode() as counter:
            pipe(num_inference_steps=steps, output_type="latent")
        counts.append(counter.counts)
    assert counts[0] == counts[1]
