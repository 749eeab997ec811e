"""What the benchmark compares is comparable, and its commands write what they measured."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokcom.cli.convert import load_published_pipeline
from tokcom.evaluation import benchmark
from tokcom.evaluation.benchmark import (
    build_parser,
    build_training,
    main,
    measure_length,
)
from tokcom.evaluation.generators import causal_generator, load_generators, published_generator
from tokcom.evaluation.published import PublishedTokCom
from tokcom.training.presets import read_preset

ARGS = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


@pytest.mark.filterwarnings("ignore:the checkpoint names no tokenizer")
@pytest.mark.parametrize("stage", ["codec", "flow"])
def test_training_follows_the_loss_curve_of_the_plain_implementation(tmp_path, stage):
    """Chunked cross-entropy, grouped attention and fused AdamW change no loss by more than 1e-3 in
    twelve steps."""
    torch.manual_seed(0)
    published = PublishedTokCom.random(32, 48, 2, 4, 2, 51)
    published.vae["embed_tokens.weight"].mul_(0.2)
    args = ARGS | dict(rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=51, omni_token_id=50)
    checkpoint = dict(
        epoch=0, stage="vae" if stage == "codec" else "diffusion", val_loss=0.0, model_args=args
    )
    checkpoint |= dict(config=dict(max_length=64, chunk_size=4, noise_std=1e-9))
    checkpoint |= dict(
        vae_model_state_dict=published.vae, denoised_model_state_dict=published.denoiser
    )
    torch.save(checkpoint, tmp_path / "model.pt")
    model = load_published_pipeline(tmp_path / "model.pt").model.train()
    model.set_stage(stage, **read_preset("v5.2")[stage]["objective"])

    trained = {"codec": published.vae, "flow": published.denoiser}[stage]
    parameters = list(
        {id(p): p.requires_grad_() for n, p in trained.items() if "inv_freq" not in n}.values()
    )
    plain = torch.optim.AdamW(parameters, 3e-3)
    fused = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, fused=True)
    curves = []
    for _ in range(12):
        ids = torch.randint(0, 50, (2, 16))
        if stage == "codec":
            losses = published.codec_loss(ids), model(ids).loss / 4  # ours is K x cross-entropy
        else:
            losses = published.flow_loss(ids, 0.0, 0.5), model(ids, timestep=0.5).loss
        for loss, optimizer in zip(losses, (plain, fused)):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        curves.append([loss.item() for loss in losses])
    first, second = torch.tensor(curves).T
    torch.testing.assert_close(first, second, atol=0, rtol=1e-3)
    assert first[-1] < first[0]


def test_published_and_our_training_have_the_same_number_of_parameters():
    args = build_parser().parse_args(["training", "--layers", "1", "--vocab_size", "64"])
    for stage in ("codec", "flow"):
        ours, published = (
            build_training(system, stage, args)[1] for system in ("TokCom", "published")
        )
        assert sum(p.numel() for p in ours) == sum(p.numel() for p in published)


def test_published_sampler_is_as_large_as_it_is_asked_to_be():
    generate = published_generator(3_000_000, 500)
    assert 2_900_000 <= generate.parameters <= 3_000_000
    generate(2, 16, 2)


@pytest.mark.slow
def test_training_command_compares_the_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PEAK_SIZES", (512,))
    small = [
        "--layers",
        "1",
        "--tokens",
        "16",
        "--vocab_size",
        "64",
        "--batch_size",
        "1",
        "--steps",
        "1",
        "--rounds",
        "1",
    ]
    main(["training", "--stage", "flow", *small, "--output_dir", str(tmp_path)])
    rows = json.loads((tmp_path / "training.json").read_text())["flow"]
    assert (
        rows["published"]["times_published"] == 1
        and rows["TokCom, cached latents"]["memory_ratio"] > 0
    )
    assert 0 < rows["TokCom"]["share_of_peak"] < 1
    assert (tmp_path / "training.png").is_file() and "published" in (
        tmp_path / "training.md"
    ).read_text()


def tiny_llama() -> LlamaForCausalLM:
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=50)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **shape))


def test_a_timed_model_writes_the_full_length_whatever_its_own_settings_say(monkeypatch):
    model, lengths = tiny_llama(), []
    model.generation_config.eos_token_id = list(range(50))  # would end at once
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: lengths.append(generate(*a, **k).shape))
    causal_generator(model)(2, 12, None)
    assert lengths == [(2, 13)]


def test_a_model_without_positions_for_the_texts_is_refused_before_anything_is_timed(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2048 positions.*4096 tokens"):
        load_generators([str(tmp_path)], 4096, "cpu")


def test_sampling_command_measures_length_batch_steps_and_chunks(tmp_path):
    sizes = [
        "--batch_sizes",
        "1",
        "2",
        "--lengths",
        "16",
        "--steps",
        "1",
        "2",
        "--chunk_sizes",
        "2",
        "--rounds",
        "1",
    ]
    teacher = tiny_llama()
    teacher.save_pretrained(tmp_path / "teacher")
    name = str(tmp_path / "teacher")
    sizes += ["--beside", name]
    main(["sampling", *sizes, "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "sampling.json").read_text())
    assert found["parameters"][name] == teacher.num_parameters()
    assert found["rows"][0][f"{name} / TokCom"] > 0
    assert (
        abs(found["parameters"]["Llama with KV cache"] / found["parameters"]["TokCom"] - 1) < 0.001
    )
    assert len(found["rows"]) == 2 + 2 + 1
    assert found["rows"][0]["Llama with KV cache / TokCom"] > 0
    assert (tmp_path / "sampling.png").is_file()


def test_length_is_measured_on_a_saved_model(build, tmp_path):
    build().save_pretrained(tmp_path)
    facts = measure_length(str(tmp_path), 16, None)
    assert facts["tokens"] == 16 and facts["seconds"] > 0 and facts["peak_mib"] > 0


def test_serving_command_measures_both_systems_behind_the_same_server(build, tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 1}
    build(transformer_config=shape, codec_config={"hidden_size": 192}).save_pretrained(
        tmp_path / "model"
    )
    small = ["--clients", "1", "3", "--requests", "1", "--tokens", "4", "--rounds", "1"]
    main(
        ["serving", "--checkpoint", str(tmp_path / "model"), *small, "--output_dir", str(tmp_path)]
    )
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    assert [(row["system"], row["clients"]) for row in rows] == [
        *(("TokCom", 1), ("Llama", 1), ("TokCom", 3), ("Llama", 3))
    ]
    assert all(row["tokens per second"] > 0 and row["p50, s"] <= row["p95, s"] for row in rows)
    assert (tmp_path / "serving.png").is_file()
