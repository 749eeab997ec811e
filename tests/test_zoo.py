"""The small models in `zoo/`: each is whole, small, without code, and loads in every way; the judge
of captions; the demo."""

import importlib.util
import io
import json
import subprocess
import sys

import datasets
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors import safe_open

from tokcom.evaluation import retrieval
from tokcom.evaluation.linear_codecs import PCA, QuantisedPCA, lloyd
from tokcom.evaluation.parts import fingerprint
from tokcom.integrity_tokcom import check_checksums
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.data import train_tokenizer
from tokcom.training.pipelines import build_pipeline, load_pipeline
from tokcom.training.presets import preset_config

ZOO = sorted(file.parent for file in (ROOT / "zoo").glob("*/model_index.json"))
MOST = 10_000_000  # parameters of all together


def stored(directory) -> dict[str, tuple[str, int]]:
    """Type and size of every stored tensor."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: (part.get_dtype(), torch.Size(part.get_shape()).numel())
            for name, part in slices.items()
        }


def load_script(folder: str, name: str):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what lies in zoo/ ----


def test_the_zoo_is_small_stored_in_bfloat16_and_holds_no_code():
    total = 0
    for directory in ZOO:
        tensors = stored(directory)
        total += sum(size for _, size in tensors.values())
        half = sum(size for kind, size in tensors.values() if kind == "BF16")
        assert half > 0.8 * sum(size for _, size in tensors.values()), directory
        assert not list(directory.rglob("*.py")) and not (directory / "run").exists()
        card = (directory / "README.md").read_text(encoding="utf-8")
        for heading in ("## Data", "## Training", "## Evaluation", "## Samples", "## Limitations"):
            assert heading in card, (directory, heading)
    assert total <= 1.02 * MOST  # buffers are not parameters


@pytest.mark.parametrize("directory", ZOO, ids=lambda directory: directory.name)
def test_a_model_of_the_zoo_loads_through_its_pipeline_in_float32(directory):
    pipe = load_pipeline(directory)
    assert pipe.model.dtype == torch.float32 and pipe.tokenizer is not None
    assert json.loads((directory / "model_index.json").read_text())["model"][1] == "TokComModel"


def test_the_emoji_and_the_clips_are_made_for_captions():
    made = {"emoji": ("images", Image.Image), "clips": ("videos", list)}
    for directory in ZOO:
        if directory.name in made:
            field, kind = made[directory.name]
            pipe = load_pipeline(directory)
            pipe.set_progress_bar_config(disable=True)
            output = pipe("red apple, rising", num_inference_steps=1)
            assert isinstance(getattr(output, field)[0], kind)
    if (ROOT / "zoo" / "emoji") in ZOO:
        codes = load_pipeline(ROOT / "zoo" / "emoji").encode(Image.new("RGB", (40, 40))).codes
        assert codes.shape == (1, 36, 1)


@pytest.mark.slow
@pytest.mark.parametrize("directory", ZOO, ids=lambda directory: directory.name)
def test_what_publish_adds_makes_automodel_and_diffusionpipeline_load_it(directory, tmp_path):
    load_pipeline(directory).save_pretrained(tmp_path / "whole")  # what publish uploads
    code = f"""
from diffusers import DiffusionPipeline
from transformers import AutoModel
path = {str(tmp_path / "whole")!r}
model = AutoModel.from_pretrained(path, trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)
for a, b in zip(model.parameters(), pipe.model.parameters()):
    assert (a == b).all()
print("same", type(pipe).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "same TokCom" in done.stdout, done.stderr[-2000:]


def test_packing_a_model_rounds_its_matrices_and_leaves_its_code(tmp_path):
    if not ZOO:
        pytest.skip("there is no model in zoo/ to pack again")
    packing = load_script("scripts", "pack_zoo")
    load_pipeline(ZOO[0]).save_pretrained(tmp_path / "run")
    packing.pack(tmp_path / "run", tmp_path / "packed", None)
    assert stored(tmp_path / "packed") == stored(ZOO[0])
    assert not list((tmp_path / "packed").glob("*.py"))


# ---- digits ----


@pytest.fixture
def digits(tmp_path):
    """A random model of the digits' streams as a finished run, and records for its samples."""
    torch.manual_seed(0)
    words = train_tokenizer(["the digit seven", "the digit two"], 300)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    audio = {"num_frames": 16, "num_channels": 10, "fft_length": 128, "hop_length": 64}
    config = preset_config(
        "zoo-digits",
        vocabulary_size(words),
        codec_config={"streams": {"audio": audio}},
        transformer_config=small,
        num_inference_steps=1,
    )
    run = tmp_path / "digits-run"
    build_pipeline(TokComModel(config), words).save_pretrained(run)
    (run / "run" / "flow").mkdir(parents=True)
    summary = {"steps": 7, "precision": "no", "device": "cpu", "processes": 1}
    (run / "run" / "flow" / "summary.json").write_text(json.dumps(summary))
    settings = {"seed": 3, "flow": {"batch_size": 5}}
    (run / "run" / "train_config.json").write_text(json.dumps(settings))
    sound = {"bytes": (ROOT / "sample_data" / "seven.flac").read_bytes(), "path": None}
    buffer = io.BytesIO()
    Image.new("L", (28, 28), 90).save(buffer, "PNG")
    record = {"caption": "the digit two", "audio": sound}
    record["image"] = {"bytes": buffer.getvalue(), "path": None}
    records = datasets.Dataset.from_list([record] * 10)
    records.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / "test.parquet")
    return run, str(tmp_path / "test.parquet")


def test_the_card_of_digits_has_the_numbers_of_its_own_weights(digits, tmp_path):
    run, data = digits
    packing = load_script("scripts", "pack_zoo")
    target = tmp_path / "digits"
    packing.main([str(run), str(target)])
    results = tmp_path / "results"
    results.mkdir()
    settings = {"digits": "/some/train.parquet", "digits_test": data, "steps": 4, "seed": 0}
    settings |= {"samples": None, "epochs": 3, "weights": "of another model"}
    parts = {
        "sound to text, guidance 1": {"right": 0.95},
        "from nothing, guidance 1": {"agree": 0.5},
    }
    parts["text to sound, guidance 1"] = {"right": 0.4}
    (results / "results.md").write_text("## Directions\n\na table\n")
    command = [str(run), str(target), "--results", str(results), "--data", data]
    command += ["--card", str(ROOT / "scripts" / "cards" / "digits.md"), "--trained", "In a day."]

    def write_results() -> None:
        (results / "results.json").write_text(json.dumps({"settings": settings, "parts": parts}))

    write_results()
    with pytest.raises(SystemExit):
        packing.main(command)
    settings["weights"] = fingerprint(load_pipeline(target).model)
    write_results()
    packing.main(command)
    card = (target / "README.md").read_text()
    assert "Seed 3; 7 steps of 5 records for the stage flow (float32 on 1 x cpu). In a day." in card
    assert "1 of 2 directions reach the goal of 90%" in card and "**missed**" in card
    assert "### Directions\n\na table" in card and "/some" not in card and "$" not in card
    for name in ("samples.png", "sample_1.wav", "sample_3.wav"):
        assert (target / name).is_file() and name in card
    assert "license: " in card.split("---")[1] and "| 10 | the digit two |" in card
    assert check_checksums(target)


def test_the_demo_hears_draws_and_speaks_a_digit(digits, tmp_path, monkeypatch):
    demo = load_script("examples", "demo")
    monkeypatch.setitem(demo.PARTS, "digits", (digits[0], demo.show_digits))
    demo.main(["--only", "digits", "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    made = ["digit_given.flac", "digit_heard.png", "digit_for_text.png", "digit_for_text.wav"]
    for name in [*made, "digit_from_nothing.png", "digit_from_nothing.wav"]:
        assert (tmp_path / "out" / name).is_file() and name in page


# ---- the judge ----

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255),
    "black": (0, 0, 0), "yellow": (255, 255, 0), "cyan": (0, 255, 255), "pink": (255, 0, 255),
}  # fmt: skip
SHAPES = ("above", "below", "left", "right")


def coloured(colour: str, shape: str) -> Image.Image:
    """A grey picture of which one half has a colour."""
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    boxes = {"above": (0, 0, 32, 16), "below": (0, 16, 32, 32), "left": (0, 0, 16, 32)}
    image.paste(COLOURS[colour], boxes.get(shape, (16, 0, 32, 32)))
    return image


def test_a_judge_finds_what_it_has_learnt_and_nothing_in_other_pictures(tmp_path):
    rows = {"image": [], "caption": []}
    for colour in COLOURS:
        for shape in SHAPES:
            file = tmp_path / f"{colour}-{shape}.png"
            coloured(colour, shape).save(file)
            rows["image"].append(file.read_bytes())
            rows["caption"].append(f"{colour} {shape}")
    source = str(tmp_path / "train.parquet")
    datasets.Dataset.from_dict(rows).to_parquet(source)
    command = ["--train", source, "--test", source, "--judge", str(tmp_path / "judge")]
    command += ["--output_dir", str(tmp_path / "results"), "--epochs", "40"]
    real, others = retrieval.main(command)
    assert real["found"] > 0.8 and others["found"] < 0.3
    again = retrieval.main(command)[0]  # the judge in the folder is the one that was frozen
    assert again == real
    assert "found" in (tmp_path / "results" / "results.md").read_text()


def test_words_that_training_never_had_are_counted_apart():
    judge = retrieval.Judge(retrieval.JudgeConfig(words=["red", "apple"])).eval()
    assert judge.knows("a red apple".removeprefix("a ")) and not judge.knows("red fox")
    captions = [f"red {i}" for i in range(24)] + ["red apple"]
    held_out = retrieval.HeldOut(judge, captions, 0)
    assert held_out.choices.shape == (25, 20) and held_out.known.sum() == 1
    assert all(len(set(row)) == 20 for row in held_out.choices.tolist())
    with pytest.raises(ValueError, match="too few"):
        retrieval.HeldOut(judge, captions[:5], 0)


def test_a_judge_of_clips_names_motions(tmp_path):
    config = retrieval.JudgeConfig(frames=2, words=["dot"], motions=["rising", "sinking"])
    clips = torch.ones(32, 3, 2, 32, 32)
    captions = []
    for i in range(32):
        top = 16 - 8 * (i % 2)
        clips[i, :, 0, top : top + 8, 8:16] = -1
        clips[i, :, 1, 24 - top : 32 - top, 8:16] = -1
        captions.append("dot, " + ("sinking" if i % 2 else "rising"))
    judge = retrieval.train_judge(config, clips, captions, epochs=30, seed=0)
    named = judge.name_motion(clips).argmax(1)
    assert (named == torch.arange(32) % 2).float().mean() > 0.9
    assert judge.look(clips).shape == (32, 64)


# ---- what a linear map can do ----


def test_quantised_components_approach_the_components_with_more_bits():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 48, generator=generator, dtype=torch.double)
    images = (torch.randn(400, 6, generator=generator, dtype=torch.double) @ mixing * 0.1).tanh()
    images = images.float().view(-1, 3, 4, 4)
    errors = [
        (QuantisedPCA(images, bits).reconstruct(images) - images).square().mean().item()
        for bits in (6, 12, 36)
    ]
    assert errors[0] > errors[1] > errors[2]
    best = (PCA(images).reconstruct(images, 6) - images).square().mean().item()
    assert errors[2] < best + 0.1 * errors[0]


def test_bits_go_where_the_error_is_and_levels_where_the_values_are():
    shares = QuantisedPCA.divide(torch.tensor([64.0, 5.0, 1.0]), 6)
    assert shares.tolist() == [4, 2, 0]  # errors of 0.25, 0.3 and 1 are left
    values = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0, 9.1], dtype=torch.double)
    torch.testing.assert_close(lloyd(values, 3), values.view(3, 2).mean(1))


# ---- data and demo ----


def test_clips_hold_out_two_motions_of_every_picture_and_each_motion_equally():
    clips = load_script("examples/data", "clips")
    parts = [[clips.part_of(picture, motion) for motion in range(6)] for picture in range(12)]
    for row in parts:
        assert row.count("test") == row.count("validation") == 1
    for motion in range(6):
        assert [row[motion] for row in parts].count("test") == 2


def test_pictures_are_dealt_to_three_parts_at_one_size(tmp_path, monkeypatch):
    emoji = load_script("examples/data", "emoji")
    monkeypatch.setattr(emoji, "PARTS", {"test": 10, "validation": 6})
    source = str(ROOT / "sample_data" / "emoji_train.parquet")
    emoji.main(["--pictures", source, "--output_dir", str(tmp_path)])
    seen = []
    for part, count in (("test", 10), ("validation", 6), ("train", 40)):
        rows = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / f"{part}.parquet"), split="train"
        )
        assert len(rows) == count and not any(c.startswith("an emoji of") for c in rows["caption"])
        seen += rows["image"]
    assert len(set(map(str, seen))) == 56


def write_photographs(folder, column: str, labels: list[int]) -> None:
    """Splits of pictures whose red says their label."""
    rows = {
        column: [Image.new("RGB", (32, 32), (20 * label, 0, 0)) for label in labels],
        "label": labels,
    }
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        records = datasets.Dataset.from_dict(rows, features=features)
        records.to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("column", ["img", "image"])
def test_photographs_are_captioned_by_their_class(tmp_path, monkeypatch, column):
    photographs = load_script("examples/data", "photographs")
    monkeypatch.setattr(photographs, "COUNTS", {"train": 5, "test": 3})
    write_photographs(tmp_path / "source", column, [7, 0, 7, 0, 7, 0, 7, 0])
    photographs.main(["--dataset", str(tmp_path / "source"), "--output_dir", str(tmp_path / "out")])
    for split, count in (("train", 5), ("test", 3)):
        file = str(tmp_path / "out" / f"{split}.parquet")
        rows = datasets.load_dataset("parquet", data_files=file, split="train")
        assert len(rows) == count
        for row in rows:
            shown = "a photo of a horse" if row["label"] == 7 else "a photo of an airplane"
            assert row["caption"] == shown
            assert row["image"].getpixel((0, 0)) == (20 * row["label"], 0, 0)


@pytest.mark.parametrize("labels", [[10, 0, 1, 2, 3], [0, 1]])
def test_photographs_of_other_classes_or_too_few_are_refused(tmp_path, monkeypatch, labels):
    photographs = load_script("examples/data", "photographs")
    monkeypatch.setattr(photographs, "COUNTS", {"train": 5, "test": 3})
    write_photographs(tmp_path / "source", "image", labels)
    with pytest.raises(SystemExit, match="not CIFAR-10.*5 or more"):
        photographs.main(["--dataset", str(tmp_path / "source"), "--output_dir", str(tmp_path)])


def test_the_demo_names_what_is_not_there_and_writes_its_page(tmp_path, capsys):
    demo = load_script("examples", "demo")
    for name, (_, show) in demo.PARTS.items():
        demo.PARTS[name] = (tmp_path / name, show)
    demo.main(["--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    for name in demo.PARTS:
        assert f"{name}: left out" in printed and f"{name}: left out" in page


@pytest.mark.parametrize("name", ["emoji", "clips"])
def test_the_demo_shows_pictures_and_clips(name, tmp_path):
    if (ROOT / "zoo" / name) not in ZOO:
        pytest.skip(f"zoo/{name} is not there")
    load_script("examples", "demo").main(["--only", name, "--output_dir", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    files = {
        "emoji": ["emoji.png", "emoji_prefixes.png", "emoji_codes.png"],
        "clips": ["clip_0.gif"],
    }
    for file in files[name]:
        assert (tmp_path / file).is_file() and file in page
