"""Load a pipeline for a command: from where, on which device, and whether it fits the command."""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError

from tokcom import load_pipeline
from tokcom.cli.options import DEVICE
from tokcom.training.checkpoints import first_line

# modality of a model: what it makes, and the commands to use it with
MODALITIES = {
    "text": ("text", "`tokcom generate`"),
    "image": ("pictures", "`tokcom draw` or `tokcom reconstruct --input_image`"),
    "video": ("clips", "`tokcom animate`"),
    "several": ("several streams", "`tokcom any-to-any`"),
}

FILLINGS = 16  # of a gap, among which the likeliest text is chosen


def usable_device(name: str = "auto") -> str:
    """The device `name`; of `"auto"` cuda if there is one, else cpu.

    Raises `ValueError` for a device that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # of `meta` there is no number
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({first_line(error)}); try --device cpu."
        ) from error
    return name


def device_argument(name: str) -> str:
    """`usable_device` as argparse wants it: it would not show the message of a `ValueError`."""
    try:
        return usable_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device` of a script that runs models; the parsed value is a device that can be used."""
    parser.add_argument("--device", type=device_argument, default="auto", help=DEVICE)


def check_model_path(checkpoint: str, option: str = "--checkpoint") -> None:
    """Raise `FileNotFoundError` if a model directory is missing or is none; a Hub id passes."""
    path = Path(checkpoint)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no model_index.json, so it is not a TokCom model directory; name "
            f"one with {option}."
        )
    # a Hub id is USER/NAME; everything else that is not there was meant as a path
    is_hub_id = checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/"))
    if not path.exists() and not is_hub_id:
        raise FileNotFoundError(
            f"{option} {checkpoint} does not exist; give a model directory, Hub id or .pt file."
        )


def open_pipeline(checkpoint: str, device: str = "auto", option: str = "--checkpoint"):
    """The pipeline of a directory, a Hub id or a published `.pt`, on `device`.

    Raises `FileNotFoundError` if nothing is there, and `ValueError` for weights that do not fit or
    a device that cannot be used.
    """
    device = usable_device(device)
    path = Path(checkpoint)
    check_model_path(checkpoint, option)
    if path.suffix == ".pt":
        from tokcom.cli.convert import load_published_pipeline  # which imports this file

        return load_published_pipeline(path).to(device)
    try:
        pipe = load_pipeline(checkpoint)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"the weights in {checkpoint} are truncated or do not fit its config.json "
            f"({first_line(error)}); download them again."
        ) from error
    return pipe.to(device)


def check_modality(pipe, checkpoint: str, wanted: str = "text") -> None:
    """Raise `ValueError` with the command to use if a model is not of the modality `wanted`."""
    found = pipe.model.config.codec_config.modality
    if found != wanted:
        made, commands = MODALITIES[found]
        raise ValueError(
            f"{checkpoint} is a model of {made}, not {MODALITIES[wanted][0]}: use {commands}."
        )


def speed_up(pipe, int8: bool, compiled: bool) -> None:
    """Give the transformer 8-bit weights and compile it, as asked; `ValueError` without torchao."""
    # quantised weights have no gradient, and compiling for one would cost time
    pipe.model.requires_grad_(False)
    if int8:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ValueError(
                "--int8 needs torchao; install it with: pip install torchao"
            ) from error
        # before compiling, so that the graph reads these weights
        quantize_(pipe.model.transformer, Int8WeightOnlyConfig())
    if compiled:
        pipe.compile()


def num_fillings(pipe) -> int:
    """Fillings of a gap among which the likeliest is kept; 1 for models that cannot tell."""
    return FILLINGS if pipe.model.config.is_causal_lm else 1
