"""Laws of mistakes on the command line: told in the words that were typed, before a model is
loaded."""

import socket
from types import SimpleNamespace

import pytest
from helpers import ROOT

from tokcom.cli import options
from tokcom.cli.main import COMMANDS, build_parser, call, parse
from tokcom.cli.server_settings import LIMITS, ServerSettings

# commands of `tokcom` that run a model in a mode
MODAL = sorted({mode.command for mode in options.MODES.values()})


def usage_error(capsys, *argv: str) -> str:
    """The last line of a mistake that argparse reports, with status 2."""
    with pytest.raises(SystemExit) as end:
        parse(argv[0], list(argv[1:]))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def error(*argv: str) -> str:
    """The sentence that a command ends with, with status 1."""
    with pytest.raises(SystemExit) as end:
        call(*argv)
    return str(end.value.code)


# ---- conflicts ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "Once", "--num_chunks", "5"], "--num_chunks 5 has no effect with PROMPT"),
        (["generate", "--watch", "--num_chunks", "2"], "--watch has an effect only with PROMPT"),
        (["reconstruct", "a", "--input_image", "b"], "TEXT has no effect with --input_image"),
        (
            ["reconstruct", "a", "--image_file", "b.png"],
            "--image_file b.png has an effect only with --input_image",
        ),
        (
            ["reconstruct", "--input_image", "a.png"],
            "--image_file is required with --input_image: picture to write",
        ),
        (
            ["encode", "a", "--image_width", "4"],
            "--image_width 4 has an effect only with --image_file",
        ),
        (
            ["encode", "a", "--image_file", "a.png", "--output_file", "b"],
            "--output_file b has no effect with --image_file",
        ),
        (["decode", "a", "--image_file", "a.png"], "FILE has no effect with --image_file"),
    ],
)
def test_a_conflict_is_told_with_the_options_that_make_it(capsys, argv, message):
    told = usage_error(capsys, *argv)
    assert message in told


@pytest.mark.parametrize("name", MODAL)
def test_no_conflict_of_a_command_names_a_mode_or_an_option_that_it_does_not_have(name):
    known = {word for action in build_parser(name)._actions for word in action.option_strings}
    known.add(options.POSITIONALS.get(name, ("", "", ""))[1])
    modes = options.modes_of(name)
    for mode, facts in modes.items():
        for option in {other for taker in modes.values() for other in taker.options}:
            if option in facts.options:
                continue
            told = options.conflict(mode, option, True, name)
            assert "True" not in told and " mode" not in told
            words = [word.rstrip(";,") for word in told.split()]
            assert {word for word in words if word.startswith("--") or word.isupper()} <= known


# ---- numbers out of range ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "Once", "--num_generate_chunks", "0"], "--num_generate_chunks 0"),
        (["generate", "--num_chunks", "-1"], "--num_chunks -1"),
        (["generate", "--num_steps", "0"], "--num_steps 0"),
        (["generate", "--temperature", "-1"], "--temperature -1"),
        (["generate", "--temperature", "nan"], "--temperature nan"),
        (["generate", "--top_p", "2"], "--top_p 2"),
        (["generate", "Once", "--guidance_scale", "inf"], "--guidance_scale inf"),
        (["draw", "--image_file", "a.png", "--guidance_scale", "-1"], "--guidance_scale -1"),
        (["infill", "a ____", "--gap_length", "0"], "--gap_length 0"),
        (["infill", "a ____", "--num_candidates", "0"], "--num_candidates 0"),
        (["denoise", "a", "--noise_level", "1.5"], "--noise_level 1.5"),
        (["encode", "a", "--image_file", "a.png", "--image_width", "0"], "--image_width 0"),
        (["animate", "--video_file", "a.gif", "--num_frames", "0"], "--num_frames 0"),
        (["animate", "--video_file", "a.gif", "--fps", "0"], "--fps 0"),
        (["evaluate", "--samples", "0"], "--samples 0"),
        (["evaluate", "--seeds", "0"], "--seeds 0"),
        (["evaluate", "--top_p", "0"], "--top_p 0"),
    ],
)
def test_a_number_out_of_range_is_told_with_its_option_and_a_remedy(capsys, argv, message):
    told = usage_error(capsys, *argv)
    assert message in told and ": give a" in told


def test_the_ends_of_every_range_are_taken():
    parse("generate", ["--num_chunks", "1", "--top_p", "1", "--temperature", "0.001"])
    parse("generate", ["Once", "--guidance_scale", "0"])
    for level in ("0", "1"):
        parse("denoise", ["a", "--noise_level", level])
    assert parse("infill", ["a ____", "--gap_length", "auto"]).gap_length is None


def test_the_coldest_temperature_is_that_of_the_sampler():
    from tokcom.sampling_tokcom import COLDEST

    assert options.COLDEST == COLDEST


@pytest.mark.parametrize("name", ["generate", "draw", "evaluate", "sample-corpus", "kmeans"])
def test_every_seed_beyond_those_of_torch_is_told_alike(name, capsys):
    told = []
    for seed in ("99999999999999999999999", "1e30"):
        line = usage_error(capsys, name, "--seed", seed)
        told.append(line.replace(seed, "SEED"))
    assert "--seed" in told[0] and str(options.LAST_SEED) in told[0]
    assert told[0] == told[1]


@pytest.mark.parametrize("number", [options.FIRST_SEED, -1, 0, options.LAST_SEED])
def test_every_seed_that_is_taken_is_one_of_torch(number):
    import torch

    seed = parse("generate", ["--seed", str(number)]).seed
    assert seed == number
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_the_server_is_told_as_its_option(name):
    with pytest.raises(ValueError, match=f"^--{name} -1"):
        ServerSettings(**{name: type(getattr(ServerSettings, name))(-1)})


# ---- names that do not exist ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "Once", "--gen_length", "5"], "did you mean --num_generate_chunks?"),
        (["generate", "--num_inference_steps", "5"], "did you mean --num_steps?"),
        (["generate", "--num-steps", "5"], "did you mean --num_steps?"),
        (["generate", "--num_stpes=5"], "did you mean --num_steps?"),
        (["generate", "--zzz"], "see --help"),
        (["generate", "Once", "upon", "a"], "a text of several words needs quotes"),
    ],
)
def test_an_unknown_option_is_told_with_its_near_miss(capsys, argv, message):
    told = usage_error(capsys, *argv)
    assert "unrecognized arguments: " in told and message in told


# ---- texts and files ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", ""], "PROMPT is empty; fill it in or leave it out"),
        (["draw", "", "--image_file", "a.png"], "CAPTION is empty; fill it in or leave it out"),
        (["animate", "", "--video_file", "a.gif"], "CAPTION is empty; fill it in or leave it out"),
        (["infill", ""], "TEXT is empty; fill it in"),
        (["generate", "--output_file", ""], "--output_file is empty; fill it in or leave it out"),
    ],
)
def test_an_empty_text_is_refused_with_what_to_do_on_the_command_line(capsys, argv, message):
    assert usage_error(capsys, *argv).endswith(message)


def test_what_cannot_be_done_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    from tokcom.cli import modes

    monkeypatch.setattr(modes, "open_pipeline", lambda *_: pytest.fail("a model was loaded"))
    folder = str(tmp_path)
    assert f"--output_file {folder} is a folder" in error("generate", "--output_file", folder)
    assert "--image_file" in error("draw", "--image_file", folder)
    assert "--watch draws in a terminal" in error("generate", "Once", "--watch")
    several = ("generate", "Once", "--watch", "--batch_size", "2")
    assert "--watch shows one text, not --batch_size 2" in error(*several)


def test_a_file_to_read_is_told_as_it_was_given(tmp_path):
    file = str(tmp_path / "none")
    assert f"error: FILE {file} does not exist" in error("decode", file)
    assert f"error: --image_file {file} does not exist" in error("decode", "--image_file", file)


def test_a_picture_of_a_text_is_no_wider_than_the_text(tokenizer):
    from tokcom.cli.modes import text_to_image

    pipe = SimpleNamespace(tokenizer=tokenizer)
    args = SimpleNamespace(input_text="Squinty", image_width=1000, image_file="a.png")
    count = len(tokenizer("Squinty")["input_ids"])
    with pytest.raises(ValueError, match=f"--image_width 1000 is wider .* give at most {count}"):
        text_to_image(pipe, args)


def test_first_frames_that_do_not_fit_are_told_with_their_option():
    from tokcom.cli.modes import animate

    def pipe(*_, **__):
        raise ValueError("a clip of 1 frames")

    args = parse("animate", ["--input_image", "one.png", "--video_file", "a.gif"])
    with pytest.raises(ValueError, match="^with --input_image one.png: a clip of 1 frames"):
        animate(pipe, args)
    with pytest.raises(ValueError, match="^a clip of 1 frames"):
        animate(pipe, parse("animate", ["--video_file", "a.gif"]))


# ---- other commands ----


def test_a_teacher_that_is_none_is_named_with_what_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    corpus = ("--output", str(tmp_path / "corpus"), "--num_texts", "1", "--device", "cpu")
    for model, message in (
        (str(ROOT), "is a TokCom model, which cannot be the teacher"),
        (str(tmp_path), "holds no config.json"),
        ("no-such-model", "cannot be loaded"),
    ):
        told = error("sample-corpus", "--model", model, *corpus)
        assert f"--model {model} {message}" in told
        assert "name a causal language model" in told and "trust_remote_code" not in told


@pytest.mark.parametrize("option", ["data", "train_data"])
def test_a_missing_file_of_texts_is_told_with_its_option_before_the_model_is_loaded(
    option, tmp_path, monkeypatch
):
    from tokcom.cli import evaluate

    monkeypatch.setattr(evaluate, "open_pipeline", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there.jsonl"
    there.write_text('{"text": "a"}\n')
    files = {"data": str(there), "train_data": str(there)} | {option: "missing.jsonl"}
    arguments = [word for name, file in files.items() for word in (f"--{name}", file)]
    told = error("evaluate", "--checkpoint", str(ROOT), *arguments)
    assert f"--{option} missing.jsonl does not exist" in told


def test_an_address_that_is_taken_or_elsewhere_is_told_before_the_model_is_loaded(monkeypatch):
    from tokcom.cli import serve

    monkeypatch.setattr(serve, "open_pipeline", lambda *_: pytest.fail("a model was loaded"))
    assert "--host 192.0.2.1 --port 0" in error("serve", "--host", "192.0.2.1", "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be listened at" in error("serve", "--port", str(port))
    serve.check_address("127.0.0.1", port)


# ---- help ----


@pytest.mark.parametrize("name", MODAL)
def test_the_help_of_an_option_is_about_its_own_command(name):
    formatter = build_parser(name)._get_formatter()
    others = set(COMMANDS) | set(options.MODES)
    others -= {name, *options.modes_of(name), "draw", "encode", "train"}  # also plain words
    for action in build_parser(name)._actions:
        text = formatter._get_help_string(action)
        assert not set(text.replace(",", " ").split()) & others, (action.dest, text)
        assert not (action.required and "default" in text), (action.dest, text)
