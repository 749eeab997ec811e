import sys

import pytest
import torch

from tokcom.cli.loading import speed_up
from tokcom.cli.options import MODES
from tokcom.inference import build_parser, main
from tokcom.training.presets import preset_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stories):
    import torch
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


def run(checkpoint, capsys, *arguments) -> str:
    main(["--checkpoint", str(checkpoint), "--num_steps", "2", "--device", "cpu", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--mode", "generate", "--num_chunks", "4", "--batch_size", "2"),
        ("--mode", "reconstruct", "--input_text", "Squinty was a pig."),
        (
            "--mode",
            "denoise_reconstruct",
            "--input_text",
            "Squinty was a pig.",
            "--noise_level",
            "0.5",
        ),
        (
            "--mode",
            "conditional",
            "--prompt",
            "The family of four was ",
            "--num_generate_chunks",
            "3",
        ),
        (
            "--mode",
            "infill",
            "--input_text",
            "Squinty was a ____ pig.",
            "--num_generate_chunks",
            "1",
        ),
    ],
)
def test_every_mode_prints_and_saves_texts(checkpoint, capsys, tmp_path, arguments):
    printed = run(
        checkpoint, capsys, *arguments, "--seed", "0", "--output_file", str(tmp_path / "out.txt")
    )
    assert printed.startswith("[1] ")
    assert (tmp_path / "out.txt").read_text().startswith("[1] ")
    if "--prompt" in arguments:
        assert printed.startswith("[1] The family of four was ")


def test_encode_writes_a_file_that_decode_reads(checkpoint, capsys, tmp_path):
    file = str(tmp_path / "latents.safetensors")
    assert "mean" in run(
        checkpoint, capsys, "--mode", "encode", "--input_text", "Squinty", "--output_file", file
    )
    assert run(checkpoint, capsys, "--mode", "decode", "--latents_file", file).startswith("[1] ")


def test_defaults_are_the_documented_ones():
    args = build_parser().parse_args(["--checkpoint", "x"])
    documented = dict(
        mode="generate", num_chunks=256, num_generate_chunks=64, num_steps=None, noise_level=0.5
    )
    documented |= dict(batch_size=1, output_file=None, input_text=None, prompt=None)
    assert {name: getattr(args, name) for name in documented} == documented
    assert build_parser().parse_args([]).checkpoint == "."
    assert args.gap_length == 16
    assert preset_config("v5.2").num_inference_steps == 50


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    return str(error.value.code) + capsys.readouterr().err


def test_bad_arguments_are_named(checkpoint, capsys, tmp_path):
    assert "invalid choice: 'dream'" in fails(
        capsys, "--checkpoint", str(checkpoint), "--mode", "dream"
    )
    assert "--prompt is required" in fails(
        capsys, "--checkpoint", str(checkpoint), "--mode", "conditional"
    )
    missing = fails(capsys, "--checkpoint", str(tmp_path / "nothing"))
    assert "does not exist" in missing and "nothing" in missing
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in fails(capsys, "--checkpoint", str(tmp_path / "empty"))
    options = ("--checkpoint", str(checkpoint), "--device", "cpu")
    assert "--num_steps 0: give at least 1" in fails(capsys, *options, "--num_steps", "0")
    assert "nowhere" in fails(
        capsys, *options, "--output_file", str(tmp_path / "nowhere" / "x.txt")
    )
    assert "--device cpu" in fails(capsys, "--checkpoint", str(checkpoint), "--device", "quantum")
    arguments = ("--mode", "denoise_reconstruct", "--input_text", "Hi", "--noise_level", "2")
    assert "--noise_level 2.0: give a number from 0 to 1" in fails(capsys, *options, *arguments)


def test_truncated_and_wrong_weights_are_named(checkpoint, capsys, tmp_path):
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "truncated" in fails(capsys, "--checkpoint", str(broken), "--device", "cpu")
    shutil.copy(checkpoint / "model.safetensors", weights)
    config = json.loads((broken / "config.json").read_text())
    config["transformer_config"]["intermediate_size"] = 64
    (broken / "config.json").write_text(json.dumps(config))
    assert "do not fit" in fails(capsys, "--checkpoint", str(broken), "--device", "cpu")
    shutil.copy(checkpoint / "config.json", broken / "config.json")
    weights.unlink()
    assert "model.safetensors" in fails(capsys, "--checkpoint", str(broken), "--device", "cpu")


def test_eight_bit_weights_without_their_library_name_the_remedy(build):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(ValueError, match="pip install torchao"):
            speed_up(build(), int8=True, compiled=False)


def test_eight_bit_weights_change_predictions_little_and_text_goes_on(build, tmp_path, capsys):
    pytest.importorskip(
        "torchao", reason="optional: prints warnings at every import of transformers"
    )
    pipe, plain = build(), build()
    speed_up(pipe, int8=True, compiled=False)
    linears = [m for m in pipe.model.transformer.modules() if isinstance(m, torch.nn.Linear)]
    assert all(type(m.weight).__name__ == "Int8Tensor" for m in linears)
    latents = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (p.model.predict(latents, 0.5).latents for p in (pipe, plain))
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    build().save_pretrained(tmp_path / "model")
    main(
        [
            "--checkpoint",
            str(tmp_path / "model"),
            "--mode",
            "generate",
            "--num_chunks",
            "2",
            "--int8",
            "--device",
            "cpu",
        ]
    )
    assert "[1]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "option", "value"),
    [
        ("infill", "batch_size", "2"),
        ("encode", "temperature", "0.5"),
        ("reconstruct", "top_p", "0.9"),
    ],
)
def test_an_option_without_effect_is_refused_with_the_modes_that_read_it(
    capsys, mode, option, value
):
    with pytest.raises(SystemExit) as end:
        main(["--checkpoint", "x", "--mode", mode, "--input_text", "a ____", f"--{option}", value])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert (
        f"--{option} {value} has no effect in mode {mode}" in printed and "conditional" in printed
    )


def test_a_published_option_without_effect_is_named_and_the_command_goes_on(checkpoint, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--num_steps", "1", "--num_generate_chunks", "1"]
    main([*arguments, "--prompt", "Once upon a time"])
    note = "note: --prompt Once upon a time has no effect in mode generate; it is an option of"
    assert note in capsys.readouterr().err


def test_a_continuation_is_printed_while_it_is_written(checkpoint, monkeypatch):
    from tokcom.pipeline_tokcom import TokComPipeline

    order = []
    original = TokComPipeline.stream

    def stream(self, *args, **kwargs):
        for piece in original(self, *args, **kwargs):
            order.append("made")
            yield piece

    def write(text, **_):
        order.append("shown")

    monkeypatch.setattr(TokComPipeline, "stream", stream)
    monkeypatch.setattr("builtins.print", write)
    arguments = [
        "--prompt",
        "The family",
        "--num_generate_chunks",
        "8",
        "--num_steps",
        "1",
        "--seed",
        "0",
    ]
    main(["--checkpoint", str(checkpoint), "--mode", "conditional", "--device", "cpu", *arguments])
    made = order.count("made")
    assert made > 1 and order[: 2 * made] == ["made", "shown"] * made


def test_every_published_mode_is_still_there():
    published = {"generate", "reconstruct", "denoise_reconstruct", "encode", "conditional"}
    assert published <= set(MODES)
