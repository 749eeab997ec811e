"""Models of clips: data, training, distillation and evaluation."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT, seeded
from PIL import Image
from safetensors.torch import load_file
from tiny_videos import FLOW, QUANTIZED, model, moving, pipeline

from tokcom.cli.main import call
from tokcom.configuration_media_tokcom import TokComVideoCodecConfig
from tokcom.evaluation.memory import activations, operations, resized, run_step, saved_bytes
from tokcom.evaluation.videos import main as measure_videos
from tokcom.inference import main as infer
from tokcom.modeling_tokcom import TokComModel
from tokcom.pictures_tokcom import Frames
from tokcom.pipeline_media_tokcom import TokComVideoPipeline
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.quantization_tokcom import code_statistics
from tokcom.train_accelerate import main as train
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents
from tokcom.training.denoiser import ModelDenoiser
from tokcom.training.films import write_film
from tokcom.training.images import ImageDataset
from tokcom.training.presets import preset_config

# ---- data ----


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_films_are_written_and_read_again(suffix, tmp_path):
    write_film(moving(), tmp_path / f"film{suffix}", fps=8)
    read = Frames(str(tmp_path / f"film{suffix}"))
    assert len(read) == 6
    for i, frame in enumerate(read.clip(0, 6)):
        error = np.asarray(frame.convert("RGB"), float) - np.asarray(moving()[i], float)
        assert np.abs(error).mean() < 12, f"frame {i}"
    as_bytes = Frames((tmp_path / f"film{suffix}").read_bytes())
    assert len(as_bytes) == 6 and as_bytes.clip(5, 3)[2].size == (32, 32)


def test_films_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(ValueError, match="record 3 holds no film"):
        Frames(str(tmp_path / "a.mp4"), "record 3")
    with pytest.raises(ValueError, match="record 4 has no frames"):
        Frames([], "record 4")
    with pytest.raises(ValueError, match=r"\.xyz.*\.gif"):
        write_film(moving(), tmp_path / "a.xyz")


@pytest.mark.parametrize("kind", ["mp4", "gif", "folders", "parquet"])
def test_clips_come_from_folders_of_films_of_frames_and_from_parquet(kind, tmp_path):
    source, config = tmp_path / "data", DataConfig(train="x")
    for label in ("left", "right"):
        for i in range(2):
            place = source / label / str(i)
            place.mkdir(parents=True)
            if kind == "folders":
                for j, frame in enumerate(moving()):
                    frame.save(place / f"{j:03}.png")
            elif kind != "parquet":
                write_film(moving(), place.parent / f"{i}.{kind}")
    if kind == "parquet":
        buffer = io.BytesIO()
        moving()[0].save(buffer, "WEBP", save_all=True, append_images=moving()[1:], lossless=True)
        rows = {"image": [buffer.getvalue()] * 4, "caption": ["left", "left", "right", "right"]}
        source = tmp_path / "data.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(source)
    config.frame_folders = kind == "folders"
    records = load_documents(str(source), config, "train")
    assert len(records) == 4 and set(records["caption"]) == {"left", "right"}
    dataset = ImageDataset(records, "image", "caption", None, 0, True).fit(
        TokComVideoCodecConfig(num_frames=4)
    )
    dataset.set_epoch(0)
    item = dataset[0]["pixel_values"]
    assert item.shape == (3, 4, 32, 32) and torch.equal(item, dataset[0]["pixel_values"])
    starts = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        clip = dataset[0]["pixel_values"]
        place = (clip[0] > 0).float().sum(1).argmax(-1)  # the left edge of what moves
        assert (place.diff() == 3).all()
        starts.add(int(place[0]))
    assert starts == {0, 3, 6}


# ---- training, distillation, evaluation ----

TINY = [f"model.transformer_config.{name}={value}" for name, value in FLOW.items()]
TINY += ["report_to=tensorboard", "num_samples=1", "codec.batch_size=4", "flow.batch_size=4"]
TINY += ["attention=sdpa"]  # the fastest differs from run to run, and runs are compared
for stage in ("codec", "flow"):
    TINY += [
        f"{stage}.{name}={value}"
        for name, value in (("max_steps", 2), ("eval_batches", 1), ("warmup_steps", 1))
    ]


@pytest.mark.parametrize("kind", ["captions", "blocks", "quantized"])
def test_one_command_trains_a_model_of_the_shipped_clips_and_its_student(kind, tmp_path):
    overrides = list(TINY)
    if kind == "blocks":
        overrides += ["model.transformer_config.block_size=16", "data.caption_column=none"]
    if kind == "quantized":
        overrides += [f"model.codec_config.{name}={value}" for name, value in QUANTIZED.items()]
        overrides += ["model.quantize_prediction=true", "model.timestep_sampling=linear"]
    output = tmp_path / "out"
    train(["--preset", "video-tiny", *overrides, f"output_dir={output}"])
    pipe = TokComVideoPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(num_inference_steps=2, generator=seeded()).videos[0]) == 8
    assert (output / "run/flow/samples-2.png").is_file()
    stages = {"codec", "flow"} if kind == "quantized" else {"flow"}
    assert {p.parent.name for p in output.glob("run/*/summary.json")} == stages
    facts = json.loads((output / "run/flow/summary.json").read_text())
    assert facts["tokens"] == 2 * 4 * 128
    data = [f"data.train={ROOT / 'sample_data/clips_train.parquet'}"]
    data += ["data.caption_column=none"] if kind == "blocks" else []
    small = ["max_steps=1", "batch_size=2", "num_pairs=4", "pair_steps=2", "num_inference_steps=2"]
    small = [f"distill.{option}" for option in small]
    student = [
        "stage=distill",
        f"init_from={output}",
        f"output_dir={tmp_path / 'student'}",
        "report_to=none",
    ]
    train([*student, *small, *data])
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "student")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        moved or kind == "quantized"
    )  # whose student and teacher round to the same codes so early
    assert all(name.startswith(("transformer.", "condition_embedding")) for name in moved)
    student = TokComVideoPipeline.from_pretrained(tmp_path / "student")
    assert (
        student.scheduler.config.stochastic_sampling
        and student.model.config.num_inference_steps == 2
    )
    given = Image.new("RGB", (32, 32), (200, 0, 0))
    assert np.array_equal(np.asarray(student(frames=[[given]]).videos[0][0]), np.asarray(given))


def test_the_next_frame_is_measured_beside_copying_it(tmp_path):
    pipeline(codec=dict(num_frames=8, height=32, width=32)).save_pretrained(tmp_path / "model")
    source = str(ROOT / "sample_data/clips_validation.parquet")
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        source,
        "--num_samples",
        "3",
        "--steps",
        "1",
        "2",
    ]
    rows = measure_videos(
        [*arguments, "--students", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    )
    assert [row["system"] for row in rows] == ["copy of the last frame", "model", "model", "model"]
    records = ImageDataset(
        datasets.load_dataset("parquet", data_files=source, split="train"),
        "image",
        "",
        None,
        0,
        False,
    )
    clips = torch.stack(
        [records.fit(TokComVideoCodecConfig())[i]["pixel_values"] for i in range(3)]
    )
    error = (clips[:, :, 0] - clips[:, :, 1]).square().flatten(1).mean(1) / 4
    assert abs(rows[0]["1 known"] - float((-10 * error.log10()).mean())) < 1e-3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.md",
        "strips.png",
        "clips.gif",
    }
    with pytest.raises(SystemExit, match="use TokComPipeline"):
        measure_videos(
            ["--model", str(ROOT), "--data", source, "--output_dir", str(tmp_path / "out")]
        )


def test_the_codes_of_held_out_clips_are_counted_and_shown(tmp_path):
    pipe = pipeline(codec={**QUANTIZED, "num_frames": 8, "height": 32, "width": 32})
    pipe.save_pretrained(tmp_path / "model")
    source = str(ROOT / "sample_data/clips_validation.parquet")
    options = ["--data", source, "--output_dir", str(tmp_path)]
    facts = call("evaluate", "codebook", "--model", str(tmp_path / "model"), *options)
    assert facts["latents"] == 16 * 128
    level = facts["levels"][0]
    assert (
        level["codes"] == 16
        and 0 < level["usage"] <= 1
        and level["dead_codes"] == round(16 * (1 - level["usage"]))
    )
    assert Image.open(tmp_path / "codes.png").size[0] > 0 and (tmp_path / "usage.png").is_file()
    with pytest.raises(SystemExit, match="no quantiser"):
        call("evaluate", "codebook", "--model", str(ROOT), *options)


def test_the_command_line_animates_a_picture(tmp_path, capsys):
    pipeline(transformer=dict(block_size=6)).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 30), (10, 200, 10)).save(tmp_path / "first.png")
    arguments = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--mode",
        "animate",
        "--num_steps",
        "1",
        "--seed",
        "0",
    ]
    infer(
        [
            *arguments,
            "--input_image",
            str(tmp_path / "first.png"),
            "--video_file",
            str(tmp_path / "a.mp4"),
        ]
    )
    infer([*arguments, "--video_file", str(tmp_path / "b.gif"), "--num_frames", "9"])
    assert "4 frames written" in capsys.readouterr().out
    assert len(Frames(str(tmp_path / "a.mp4"))) == 4 and len(Frames(str(tmp_path / "b.gif"))) == 9
    with pytest.raises(SystemExit, match="bad.png. holds no picture"):
        (tmp_path / "bad.png").write_text("no")
        infer(
            [
                *arguments,
                "--input_image",
                str(tmp_path / "bad.png"),
                "--video_file",
                str(tmp_path / "c.gif"),
            ]
        )


def test_memory_of_a_larger_model_is_foretold_by_smaller_ones():
    for attention in ("full", "factorized"):
        config = preset_config("video-tiny", transformer_config={"attention_type": attention})
        config = resized(config, layers=6, frames=6, side=8)
        for checkpointing in (False, True):
            wanted = saved_bytes(config, checkpointing)
            assert abs(activations(config, checkpointing) - wanted) < 0.02 * wanted
    full, factorized = (
        operations(preset_config("video-large", transformer_config={"attention_type": kind}), 10**9)
        for kind in ("full", "factorized")
    )
    assert full > 3 * factorized


@pytest.mark.slow
def test_small_takes_a_training_step_of_its_published_size():
    found = run_step(preset_config("video-small"))
    assert 0 < found["loss"] < 10


@pytest.mark.parametrize(
    "name,millions",
    [("video-small", 22.3), ("video-medium", 164.6), ("video-large", 1257), ("video-dmd", 164.6)],
)
def test_published_presets_have_their_published_size(name, millions):
    with torch.device("meta"):
        net = TokComModel(preset_config(name))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - millions) < 0.02 * millions


def test_a_bidirectional_teacher_is_distilled_at_the_positions_of_its_patches():
    net, seen = model(transformer={"attention_type": "factorized"}), []
    net.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    x = torch.randn(2, 24, 192)
    estimate = ModelDenoiser(net)(x, torch.tensor([0.3, 0.7]), {})
    assert torch.equal(seen[0][1], net.codec.grid(4, 16, 24))
    wanted = net.denoise(
        x, torch.tensor([0.3, 0.7]), net.codec.grid(4, 16, 24).expand(2, -1, -1)
    ).latents
    torch.testing.assert_close(estimate, wanted)


@pytest.mark.parametrize("attention", ["full", "factorized"])
def test_a_guided_teacher_of_clips_leaves_out_what_the_pipeline_leaves_out(attention):
    net = model(transformer={"attention_type": attention})
    latents, x, known = (
        torch.randn(2, 24, 192),
        torch.randn(2, 24, 192),
        torch.zeros(2, 24, dtype=torch.bool),
    )
    known[:, :12] = True
    t, where = torch.tensor([0.3, 0.7]), net.codec.grid(4, 16, 24).expand(2, -1, -1)
    given = {"known": known, "latents": latents}
    plain, double = (ModelDenoiser(net, scale)(x, t, given)[:, 12:] for scale in (1.0, 2.0))
    free = net.denoise(x[:, 12:], t, where[:, 12:]).latents
    torch.testing.assert_close(2 * plain - double, free, atol=1e-4, rtol=1e-4)


def test_codes_are_counted_without_room_for_those_that_never_occur():
    codes = torch.tensor([5**20, 5**20, 3])
    found = code_statistics(codes, 5**24)
    assert found["dead_codes"] == 5**24 - 2 and abs(found["entropy_bits"] - 0.918) < 1e-3


def test_a_text_model_with_the_schedule_of_a_diffusion_trains_and_shows_samples(tmp_path):
    small = [
        f"{stage}.{key}=2"
        for stage in ("codec", "flow")
        for key in ("max_steps", "batch_size", "eval_batches")
    ]
    small += [f"{stage}.sequence_length=32" for stage in ("codec", "flow")]
    options = [
        "--preset",
        "debug",
        f"output_dir={tmp_path}",
        "model.timestep_sampling=linear",
        "num_samples=1",
    ]
    train([*options, *small, "report_to=none"])
    assert TokComPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type == "sample"
