"""Every example and every snippet of the documents runs."""

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from transformers import AutoTokenizer

from tokcom import inference, train_accelerate
from tokcom.cli.main import COMMANDS, call, parse
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.command import parse_config
from tokcom.training.data import train_tokenizer
from tokcom.training.pipelines import build_pipeline
from tokcom.training.presets import preset_config

QUICK = [
    *(
        "codec.max_steps=2",
        "codec.eval_batches=1",
        "codec.batch_size=2",
        "codec.sequence_length=32",
        "seed=1",
    ),
    *("flow.max_steps=2", "flow.eval_batches=1", "flow.batch_size=2", "flow.sequence_length=32"),
]
TEXT = str(ROOT / "sample_data" / "stories_validation.jsonl")
PICTURES = str(ROOT / "sample_data" / "emoji_validation.parquet")
STREAMS = str(ROOT / "sample_data" / "streams_validation.parquet")


def speak_of_images(folder: Path) -> list[str]:
    """Arguments for a language model of pictures, whose codec is made first."""
    steps = [
        f"{stage}.{key}=2" for stage in ("codec", "flow") for key in ("max_steps", "batch_size")
    ]
    model, coded = str(folder / "model"), str(folder / "coded")
    options = [
        "--preset",
        "style-tiny",
        "--output_dir",
        model,
        *steps,
        f"data.train={PICTURES}",
        "report_to=none",
    ]
    train_accelerate.main([*options, "num_samples=0", "data.validation_fraction=0.3"])
    call("kmeans", model, coded, "--data", PICTURES, "--num_codes", "16")
    small = ["--max_steps", "2", "--hidden_size", "32", "--num_hidden_layers", "1"]
    small += ["--proxy_codes", "8"]
    return [
        "--model",
        coded,
        "--train",
        PICTURES,
        "--test",
        PICTURES,
        "--output_dir",
        str(folder / "llama"),
        *small,
    ]


EXAMPLES = {
    "train_on_your_text": lambda folder: [TEXT, "--output_dir", str(folder), *QUICK],
    "swap_schedulers": lambda folder: ["--steps", "2", *QUICK],
    "read_latents": lambda folder: [],
    "compress_document": lambda folder: QUICK,
    "image_language": speak_of_images,
    "distill_2d": lambda folder: [
        "--teacher_steps",
        "2",
        "--student_steps",
        "2",
        "--picture",
        str(folder / "a.png"),
    ],
    "moving_pictures": lambda folder: [
        "--pictures",
        PICTURES,
        "--output",
        str(folder / "clips.parquet"),
        "--count",
        "6",
    ],
    "several_streams": lambda folder: [
        *(
            "--pictures",
            PICTURES,
            "--sounds",
            STREAMS,
            "--silent",
            "--output",
            str(folder / "joined.parquet"),
        )
    ],
}
EXPECTED = {
    "several_streams": "8 records, 0 with a sound",
    "train_on_your_text": "2: Once upon a time",
    "swap_schedulers": "UniPCMultistepScheduler",
    "read_latents": "1.00 'The young fox ran away fast.",
    "compress_document": "bits per token",
    "image_language": "dB by patches in one step",
    "distill_2d": "matching + regression, 1 step",
    "moving_pictures": "6 clips of 8 frames",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(EXAMPLES[name](tmp_path))
    printed = capsys.readouterr().out
    assert EXPECTED[name] in printed and "cannot" not in printed


def test_no_example_is_left_out():
    elsewhere = {"demo", "fine_tune_lora"}  # below, and in test_ecosystem.py, which needs peft
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == set(EXAMPLES) | elsewhere


def test_the_demo_shows_every_use_of_the_shipped_model_with_progress(capsys, tmp_path):
    demo = SimpleNamespace(**runpy.run_path(str(ROOT / "examples/demo.py")))
    demo.main(["--only", "text", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr()
    assert demo.PROMPT in printed.out and demo.GAPPED in printed.out
    before, after = demo.GAPPED.split("____")
    assert (
        printed.out.count(before) == 2 and printed.out.count(after) == 2
    )  # the gap, and what fills it
    assert (
        printed.out.count(demo.TEXT) == 2
    )  # all of it is kept at noise level 1, and by its latents
    assert "denoising" in printed.err


def blocks(language: str) -> list[tuple[str, str]]:
    """`(file, code)` of every fenced block of that language in the documents."""
    files = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    pairs = {}  # code that two documents share runs once; comments may be in two languages
    for file in files:
        for code in found.findall(file.read_text()):
            pairs.setdefault(re.sub(r"\s*#.*", "", code), (file.name, code))
    return list(pairs.values())


def test_both_readmes_show_the_same_ten_stories():
    stories = [
        re.findall(r"^  (\d)\. (Once upon a time.*)$", (ROOT / name).read_text(), re.MULTILINE)
        for name in ("README.md", "README_zh.md")
    ]
    assert stories[0] == stories[1]
    assert [int(seed) for seed, _ in stories[0]] == list(range(10))


def untrained(preset: str, tokenizer, **overrides) -> TokComBasePipeline:
    config = preset_config(preset, vocabulary_size(tokenizer), **overrides)
    return build_pipeline(TokComModel(config), tokenizer)


@pytest.mark.parametrize(("file", "code"), blocks("python"))
def test_python_in_the_documents_runs(file, code, tmp_path):
    pixels, pictures, clips, streams = (
        tmp_path / name for name in ("pixels", "pictures", "clips", "streams")
    )
    one_layer = {"transformer_config": {"num_hidden_layers": 1}}
    if "pixel_model" in code:
        untrained("pixel-tiny", AutoTokenizer.from_pretrained(ROOT), **one_layer).save_pretrained(
            pixels
        )
    if "image_model" in code:
        pipe = untrained("style-tiny", train_tokenizer(["a cat"], 300))
        config = pipe.model.config.codec_config
        pipe.model.codec.fit_codebook(torch.randn(8, config.num_tokens, config.latent_channels), 16)
        pipe.save_pretrained(pictures)
    if "video_model" in code:
        untrained(
            "video-tiny", train_tokenizer(["a cat, turning"], 300), **one_layer
        ).save_pretrained(clips)
    if "omni_model" in code:
        untrained(
            "omni-tiny", train_tokenizer(["the spoken digit seven"], 300), **one_layer
        ).save_pretrained(streams)
    script = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\npath_or_id, pixel_model, image_model = {str(ROOT)!r}, {str(pixels)!r}, {str(pictures)!r}\nvideo_model, omni_model = {str(clips)!r}, {str(streams)!r}\n{code}"
    reads_checkout = re.search(r'(from_pretrained|load_pipeline)\("(\.|zoo/\w+)"\)', code)
    here = ROOT if reads_checkout else tmp_path
    done = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, f"{file}: {done.stderr[-2000:]}"


def commands() -> list[tuple[str, str]]:
    """Every command line of the documents, continuation lines joined and comments cut."""
    lines = [
        (f, line) for f, code in blocks("bash") for line in code.replace("\\\n", " ").splitlines()
    ]
    cut = [(file, line.split(" #")[0].split("   #")[0].strip()) for file, line in lines]
    return [(file, line) for file, line in cut if line and not line.startswith("#")]


@pytest.mark.parametrize(("file", "line"), commands())
def test_commands_in_the_documents_exist_and_their_options_are_known(file, line):
    """Scripts, targets, presets and configurations exist, and every option is one that the script's
    help knows."""
    words = [
        w for w in shlex.split(line.replace("...", "x")) if not re.fullmatch(r"[A-Z_]+=\S*", w)
    ]
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        return
    if "train_accelerate.py" in words:
        at = words.index("train_accelerate.py")
        for word in words[:at]:
            assert not word.endswith(".yaml") or (ROOT / word).is_file(), line
        parse_config(None, words[at + 1 :])
        return
    if words[0] == "tokcom":
        command = COMMANDS[words[1]]
        if command.add_options is not None and words[1:3] != ["evaluate", "codebook"]:
            parse(words[1], words[2:])
            return
        work = "evaluation.codebook" if words[1] == "evaluate" else command.work.split(":")[0]
        words = ["python", "-m", f"tokcom.{work}", *words[2:]]
    if "inference.py" in words:
        words = ["generate" if word == "MODE" else word for word in words]
        if "--help" not in words:
            inference.build_parser().parse_args(words[words.index("inference.py") + 1 :])
            return
    if words[1:2] == ["app.py"]:
        parse("app", words[2:])
        return
    if words[0] not in ("python", "python3"):
        assert words[0] in ("accelerate", "pip", "curl", "git", "hf", "rm"), line
        return
    script = words[2] if words[1] == "-m" else words[1]
    path = ROOT / (
        script.removeprefix("tokcom.").replace(".", "/") + ".py" if words[1] == "-m" else script
    )
    assert path.is_file(), line
    known = path.read_text()
    for option in (w.split("=")[0] for w in words if w.startswith("--")):
        assert re.search(rf"[\"'({{]{option}[\"'}}]|\b{option[2:]}\b", known), (
            f"{option} in {file}: {line}"
        )


@pytest.mark.slow
def test_the_first_training_command_of_the_readme_runs(tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "train_accelerate.py",
        "--preset",
        "debug",
    ]
    done = subprocess.run(
        [*command, f"output_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (Path(tmp_path) / "model.safetensors").is_file()
