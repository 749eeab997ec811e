"""Laws of the command line: help at once, mistakes in one sentence, the same work by every
entrance."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file

from tokcom.cli import options
from tokcom.cli.errors import explain, report_errors
from tokcom.cli.loading import add_device_option, usable_device
from tokcom.cli.main import COMMANDS, build_parser, call, main, parse, usage
from tokcom.integrity_tokcom import CHECKSUMS, check_checksums, write_checksums
from tokcom.training.stopping import TrainingStopped

OWN = [name for name, command in COMMANDS.items() if command.add_options is not None]
TEXT_COMMANDS = ["generate", "infill", "reconstruct", "denoise", "encode"]
HEAVY = ("torch", "transformers", "diffusers", "datasets", "gradio")


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    """`tokcom` in a process of its own."""
    import os

    command = [sys.executable, "-m", "tokcom.cli.main", *argv]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)


@pytest.fixture(scope="module")
def model(tmp_path_factory, stories):
    """A directory of a tiny text model."""
    from helpers import tiny_config

    from tokcom.modeling_tokcom import TokComModel
    from tokcom.pipeline_tokcom import TokComPipeline
    from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
    from tokcom.training.data import train_tokenizer

    path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    pipe = TokComPipeline(
        TokComModel(tiny_config()), TokComFlowMatchScheduler(), train_tokenizer(stories, 320)
    )
    pipe.save_pretrained(path)
    return path


# ---- help ----


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in OWN)], ids=lambda names: "".join(names) or "list"
)
def test_help_imports_nothing_heavy_and_comes_at_once(arguments):
    code = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "from tokcom.cli.main import main\n"
        f"try: main([*{arguments!r}, '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)\n"
        "assert time.process_time() - began < 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: tokcom" in done.stdout


def test_the_list_names_every_command_and_what_it_does():
    began = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - began < 5  # on a busy machine; 0.1 s on an idle one
    assert done.stdout.strip() == usage()
    for name, command in COMMANDS.items():
        assert f"{name} " in usage() and command.help in usage()


@pytest.mark.parametrize("name", OWN)
def test_every_option_has_help_and_says_its_default(name):
    parser = build_parser(name)
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        text = parser._get_formatter()._get_help_string(action)
        assert text, action.option_strings
        if action.option_strings and not action.required:
            assert "default" in text, action.option_strings


def test_every_mode_belongs_to_a_command_and_knows_its_options():
    from tokcom.cli.modes import RUN

    assert set(RUN) == set(options.MODES)
    for mode in options.MODES.values():
        assert mode.command in COMMANDS
        assert set(mode.needs) <= set(mode.options) <= set(options.OPTIONS)


# ---- usage errors: status 2 ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generte"], "no command 'generte'; did you mean generate?"),
        (["poem"], "no command 'poem'; it has generate, infill"),
        (["infill"], "TEXT"),
        (["reconstruct"], "TEXT is required"),
        (["draw", "a cat"], "--image_file"),
        (["generate", "--num_steps", "many"], "'many'"),
        (["generate", "Once", "--num_chunks", "4"], "--num_chunks 4 has no effect with PROMPT"),
        (["generate", "Once", "--num_chunks", "0"], "--num_chunks 0 has no effect with PROMPT"),
        (["generate", "--batch_size", "0"], "--batch_size 0"),
        (["decode", "--image_file", "a.png", "--latents_file", "b"], "--latents_file"),
        (["sample-corpus", "--model", "m", "--output", "o"], "--num_texts"),
        (["evaluate", "--sections", "poetry"], "poetry"),
        (["serve", "--port", "99999"], "99999 is no port"),
        (["app", "--port", "many"], "'many'"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2_and_names_what_is_wrong(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# ---- other errors: one sentence, status 1 ----

MISSING = {
    "generate": ["--checkpoint", "PATH"],
    "infill": ["a ____ b", "--checkpoint", "PATH"],
    "reconstruct": ["--input_image", "PATH", "--image_file", "rebuilt.png"],
    "denoise": ["a", "--output_file", "PATH/out.txt"],
    "encode": ["a", "--output_file", "PATH/out.safetensors"],
    "decode": ["PATH"],
    "draw": ["--image_file", "PATH/drawn.png"],
    "animate": ["--input_image", "PATH", "--video_file", "clip.gif"],
    "any-to-any": ["--input_audio", "PATH"],
    "sample-corpus": ["--model", "PATH", "--output", "corpus", "--num_texts", "1"],
    "app": ["--checkpoint", "PATH"],
    "evaluate": ["--checkpoint", "PATH"],
    "serve": ["--checkpoint", "PATH"],
    "convert": ["PATH", "out"],
    "kmeans": ["PATH", "out", "--data", "x"],
    "publish": ["PATH", "user/name"],
    "verify": ["PATH"],
}


def test_no_command_is_left_out_of_the_missing_paths():
    assert set(MISSING) == set(OWN)


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_path_is_named_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "no" / "such" / "thing")
    with pytest.raises(SystemExit) as end:
        call(name, *(argument.replace("PATH", path) for argument in MISSING[name]))
    message = str(end.value.code)
    assert message.startswith("error: ") and path in message
    assert "\n" not in message.strip() and "unexpected" not in message


@pytest.mark.parametrize(
    "error", [ValueError("so wrong"), FileNotFoundError(2, "No such file", "there")]
)
def test_an_expected_error_is_one_sentence_and_status_1(error):
    with pytest.raises(SystemExit) as end, report_errors():
        raise error
    assert end.value.code in ("error: so wrong", "error: there does not exist.")


def test_an_unexpected_error_keeps_its_traceback_only_when_asked(monkeypatch):
    with (
        pytest.raises(SystemExit, match="unexpected ZeroDivisionError: division by zero .--debug"),
        report_errors(),
    ):
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), report_errors(debug=True):
        _ = 1 / 0
    monkeypatch.setenv("TOKCOM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError), report_errors():
        _ = 1 / 0


def test_a_warning_is_one_sentence_without_our_source(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with report_errors():
            print(warnings.formatwarning("so odd", UserWarning, "file.py", 1), file=sys.stderr)
    assert capsys.readouterr().err.strip() == "warning: so odd"
    assert "file.py" in warnings.formatwarning("so odd", UserWarning, "file.py", 1)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("draw", "drawn.xyz", "'.xyz' is no picture that can be written; name a .png"),
        ("draw", "drawn.psd", "'.psd' is no picture that can be written"),
        ("encode", "text.webp", "each of them is a token"),
        ("draw", "drawn", "name a .png"),
        ("encode", "text.jpg", "each of them is a token"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    name, file, message
):
    with pytest.raises(SystemExit, match=message):
        call(name, "a cat", "--image_file", file, "--checkpoint", "no/model")


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("any-to-any", ("--audio_file", "out.mp3"), "out.mp3: sounds are written as .wav"),
        ("animate", ("--video_file", "out.mov"), "out.mov: films are written as .mp4"),
        ("sample-corpus", ("--num_texts", "0"), "num_texts 0 must be more than 0"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(
    name, option, message, capsys
):
    place = ("--checkpoint", "no/model")
    if name == "sample-corpus":
        place = ("--model", "no/model", "--output", "corpus")
    with pytest.raises(SystemExit) as caught:
        call(name, *option, *place)
    assert message in f"{caught.value}{capsys.readouterr().err}"


@pytest.mark.slow
def test_processes_end_with_the_documented_status():
    wrong = run("verify", "nowhere")
    assert (
        wrong.returncode == 1
        and wrong.stderr.startswith("error: ")
        and "Traceback" not in wrong.stderr
    )
    assert "Traceback" in run("verify", "nowhere", "--debug").stderr
    assert "Traceback" in run("verify", "nowhere", TOKCOM_DEBUG="1").stderr


def test_a_package_that_is_not_installed_is_named_with_its_remedy():
    assert "pip install 'tokcom[app]', or gradio alone" in explain(
        ModuleNotFoundError("No module named 'gradio'", name="gradio")
    )
    assert "unexpected" in explain(
        ModuleNotFoundError("No module named 'tokcom.x'", name="tokcom.x")
    )


def test_a_run_that_a_signal_stopped_is_no_surprise():
    assert explain(TrainingStopped("stopped by SIGTERM")) == "stopped by SIGTERM"


# ---- the work ----


def test_a_leading_argument_is_the_text_or_the_prompt():
    assert parse("generate", ["Once"]).mode == "conditional"
    assert parse("generate", []).mode == "generate"
    assert parse("infill", ["a ____ b"]).input_text == "a ____ b"
    assert parse("decode", ["latents.safetensors"]).mode == "decode"
    assert parse("decode", ["--image_file", "a.png"]).mode == "image_to_text"
    assert parse("encode", ["a", "--image_file", "a.png"]).mode == "text_to_image"
    assert (
        parse("reconstruct", ["--input_image", "a.png", "--image_file", "b.png"]).mode
        == "reconstruct_image"
    )


def test_both_entrances_write_the_same_texts(model, capsys):
    from tokcom.inference import main as inference

    same = ["--checkpoint", str(model), "--device", "cpu", "--seed", "3", "--num_steps", "2"]
    printed = []
    for first, second in (
        (["generate", "Squinty"], ["--mode", "conditional", "--prompt", "Squinty"]),
        (["infill", "a ____ pig"], ["--mode", "infill", "--input_text", "a ____ pig"]),
        (["denoise", "a pig"], ["--mode", "denoise_reconstruct", "--input_text", "a pig"]),
    ):
        main([*first, *same])
        printed.append(capsys.readouterr().out)
        inference([*second, *same])
        assert capsys.readouterr().out == printed[-1]
    assert len(set(printed)) == 3


@pytest.mark.parametrize("gap", ["___", "____", "__________"])
def test_three_or_more_underscores_are_one_gap(model, capsys, gap):
    same = [
        "--checkpoint",
        str(model),
        "--device",
        "cpu",
        "--seed",
        "3",
        "--num_steps",
        "2",
        "--gap_length",
        "4",
    ]
    main(["infill", f"a {gap} pig", *same])
    found = capsys.readouterr().out
    assert "_" not in found
    main(["infill", "a ____ pig", *same])
    assert capsys.readouterr().out == found


@pytest.mark.parametrize("name", ["draw", "animate", "any-to-any"])
def test_a_model_of_another_modality_is_refused_with_the_command_to_use(model, name, tmp_path):
    files = {
        "draw": ["--image_file", str(tmp_path / "a.png")],
        "animate": ["--video_file", str(tmp_path / "a.gif")],
    }
    with pytest.raises(SystemExit, match="is a model of text, not .*: use `tokcom generate`"):
        call(name, "--checkpoint", str(model), "--device", "cpu", *files.get(name, []))


@pytest.mark.parametrize(
    ("modality", "command"), [("image", "draw"), ("video", "animate"), ("several", "any-to-any")]
)
def test_commands_for_text_name_the_command_of_other_models(modality, command):
    from tokcom.cli.loading import check_modality
    from tokcom.cli.options import MODES

    codec = SimpleNamespace(modality=modality)
    pipe = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(codec_config=codec)))
    for mode in ("generate", "infill", "reconstruct", "decode"):
        with pytest.raises(ValueError, match=f"not text: use `tokcom {command}`"):
            check_modality(pipe, "a-model", MODES[mode].modality)


def test_every_modality_is_known_to_training_to_a_pipeline_and_to_a_command():
    from tokcom.cli import loading
    from tokcom.cli.options import MODES
    from tokcom.pipeline_base_tokcom import PIPELINE_NAMES
    from tokcom.training import modalities
    from tokcom.training.pipelines import PIPELINES

    known = set(PIPELINES)
    assert set(PIPELINE_NAMES) == set(modalities.MODALITIES) == set(loading.MODALITIES) == known
    assert {mode.modality for mode in MODES.values()} == known


def test_what_a_stream_can_hold_is_read_by_training_and_by_pipelines():
    from tokcom.cli.modes import STREAM_FILES
    from tokcom.codec_composite_tokcom import CONTENTS
    from tokcom.training.streams import STREAMS

    assert set(STREAMS) == set(CONTENTS)
    assert set(STREAM_FILES) <= set(CONTENTS)


# ---- verify ----


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def failures(directory, capsys) -> set[str]:
    """The checks that fail."""
    with pytest.raises(SystemExit, match="error: .*failed"):
        call("verify", str(directory))
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[1] for line in lines if line.startswith("FAILED")}


def change_weights(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_directory_passes(copy, capsys):
    write_checksums(copy)
    call("verify", str(copy))
    printed = capsys.readouterr().out
    assert "FAILED" not in printed and printed.endswith("is whole.\n")
    assert "a model of text with a " in printed
    assert check_checksums(copy) > 4


def test_every_export_carries_checksums_that_name_changed_and_missing_files(copy, capsys):
    names = json.loads((copy / CHECKSUMS).read_text())
    assert {"model.safetensors", "config.json", "scheduler/scheduler_config.json"} <= set(names)
    assert CHECKSUMS not in names
    with (copy / "modeling_tokcom.py").open("a") as file:
        file.write("# changed\n")
    (copy / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="not the released file: modeling_tokcom.py"):
        check_checksums(copy)
    (copy / "layers_tokcom.py").unlink()
    with pytest.raises(ValueError, match="missing: .*layers_tokcom.py"):
        check_checksums(copy)
    assert failures(copy, capsys) == {"checksums"}


def test_a_number_that_is_not_finite_is_found(copy, capsys):
    def spoil(tensors):
        tensors[next(name for name in tensors if name.endswith("weight"))].view(-1)[0] = float(
            "nan"
        )

    change_weights(copy, spoil)
    assert failures(copy, capsys) == {"checksums", "weights"}


def test_a_tensor_too_few_or_too_many_is_found(copy, capsys):
    change_weights(copy, lambda tensors: tensors.pop(next(iter(tensors))))
    assert failures(copy, capsys) == {"checksums", "weights"}


def test_a_tokenizer_of_another_model_is_found(copy, capsys, stories):
    from tokcom.training.data import train_tokenizer

    train_tokenizer(stories, 300).save_pretrained(copy)
    assert "tokenizer" in failures(copy, capsys)


def test_a_truncated_file_is_found(copy, capsys):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert {"checksums", "weights"} <= failures(copy, capsys)


def test_an_impossible_configuration_is_found(copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    config["transformer_config"]["num_attention_heads"] = 0
    (copy / "config.json").write_text(json.dumps(config))
    assert "configuration" in failures(copy, capsys)


# ---- a text that is watched ----


class Screen:
    """What a terminal shows of what is written to it."""

    def __init__(self):
        self.lines = [""]
        self.widest = 0

    def write(self, text: str) -> None:
        for line in re.split(r"(\n|\r\033\[K)", re.sub(r"\033\[33m|\033\[0m", "", text)):
            if line == "\n":
                self.lines.append("")
            elif line == "\r\033[K":
                self.lines[-1] = ""
            else:
                self.lines[-1] += line
            wide = sum(unicodedata.east_asian_width(c) == "W" for c in self.lines[-1])
            self.widest = max(self.widest, len(self.lines[-1]) + wide)

    def flush(self) -> None:
        pass


def test_a_watched_text_ends_as_the_text_whatever_the_drafts_and_the_width(tokenizer, stories):
    from tokcom.cli.terminal import TerminalStreamer

    text = stories[0][:300]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    for width in (20, 80):
        screen = Screen()
        streamer = TerminalStreamer(tokenizer, pause=0, file=screen, width=width)
        for block in ids.split(4):
            streamer.put_draft(block.flip(0))
            streamer.put(block)
        streamer.end()
        assert " ".join(screen.lines).split() == text.split()
        assert screen.widest < width


def test_a_watched_line_of_wide_characters_stays_within_the_terminal(tokenizer):
    from tokcom.cli.terminal import TerminalStreamer

    text = "从前有一只小兔子住在森林里" * 4
    screen = Screen()
    streamer = TerminalStreamer(tokenizer, pause=0, file=screen, width=20)
    for block in torch.tensor(tokenizer(text)["input_ids"]).split(4):
        streamer.put_draft(block)
        streamer.put(block)
    streamer.end()
    assert "".join(screen.lines).replace(" ", "") == text
    assert screen.widest < 20


def test_watching_needs_a_terminal(model, capsys):
    with pytest.raises(SystemExit, match="draws in a terminal"):
        main(["generate", "Squinty", "--checkpoint", str(model), "--watch"])


def test_a_prompt_beyond_the_window_is_cut_on_request(model, capsys):
    words = "Squinty was a pig. " * 60
    arguments = ["generate", words, "--checkpoint", str(model), "--num_generate_chunks", "1"]
    with pytest.raises(SystemExit, match="truncation='left'"):
        main(arguments)
    main([*arguments, "--truncation", "left"])
    assert capsys.readouterr().out.startswith("[1] Squinty was a pig.")


def test_without_a_model_in_the_current_directory_the_shipped_one_is_used(monkeypatch, tmp_path):
    assert options.default_checkpoint() == "."
    monkeypatch.chdir(tmp_path)
    assert options.default_checkpoint() == str(ROOT)
    (tmp_path / "model_index.json").write_text("{}")
    assert options.default_checkpoint() == "."


# ---- devices ----

# the launch or the page chooses the device, or they count on `meta`, or compare bits on a CPU
WITHOUT_DEVICE = {
    *("ablation", "autoregressive", "compression", "fine_tune_lora", "train_on_your_text"),
    *("memory", "scaling", "compare_trees", "time_step", "text_defects", "pack_zoo", "screenshots"),
}


def test_every_script_that_runs_a_model_can_be_told_the_device():
    runs = re.compile(r"from_pretrained\(|load_pipeline\(|open_pipeline\(|Teacher\(|Judge\(")
    checked = 0
    for folder in ("evaluation", "evaluation/studies", "examples", "scripts"):
        for file in sorted((ROOT / folder).glob("*.py")):
            text = file.read_text(encoding="utf-8")
            if "ArgumentParser(" in text and runs.search(text) and file.stem not in WITHOUT_DEVICE:
                assert "add_device_option(" in text, file
                checked += 1
    assert checked > 10


def test_a_device_is_found_or_refused_in_one_sentence(capsys):
    parser = argparse.ArgumentParser()
    add_device_option(parser)
    assert parser.parse_args([]).device == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("quantum", "meta"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--device", name])
        assert f"device '{name}' cannot be used" in capsys.readouterr().err
        with pytest.raises(ValueError, match="try --device cpu"):
            usable_device(name)
