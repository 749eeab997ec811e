"""Load a pipeline for a command: from where, on which device, and whether it fits the command."""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError

from tokcom import load_pipeline
from tokcom.training.checkpoints import first_line

# modality of a model: what it makes, and the commands to use it with
MODALITIES = {
    "text": ("text", "`tokcom generate`"),
    "image": ("pictures", "`tokcom draw` or `tokcom reconstruct --input_image`"),
    "video": ("clips", "`tokcom animate`"),
    "several": ("several streams", "`tokcom any-to-any`"),
}
# modes of other models than those of text
NOT_TEXT = {
    "draw": "image",
    "reconstruct_image": "image",
    "animate": "video",
    "any_to_any": "several",
}


def best_device(device: str | None = None) -> str:
    """`device`, or if it is None the fastest there is."""
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device` of a script that measures or shows models."""
    parser.add_argument(
        "--device", default="cpu", help="where the models run, e.g. cuda (default: %(default)s)"
    )


def check_model_path(checkpoint: str, option: str = "--checkpoint") -> None:
    """Raise `FileNotFoundError` if a model directory is missing or is none; a Hub id passes."""
    path = Path(checkpoint)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{checkpoint} holds no model_index.json, so it is not a TokCom model directory; name one with {option}."
        )
    # a Hub id is USER/NAME; everything else that is not there was meant as a path
    is_hub_id = checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/"))
    if not path.exists() and not is_hub_id:
        raise FileNotFoundError(
            f"{option} {checkpoint} does not exist; give a model directory, Hub id or .pt file."
        )


def open_pipeline(checkpoint: str, device: str | None = None, option: str = "--checkpoint"):
    """The pipeline of a directory, a Hub id or a published `.pt`, on `device`.

    Raises `FileNotFoundError` if nothing is there, and `ValueError` for weights that do not fit or
    a device that cannot be used.
    """
    device = best_device(device)
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
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used ({first_line(error)}); try --device cpu."
        ) from error


def check_modality(pipe, checkpoint: str, mode: str) -> None:
    """Raise `ValueError` with the command to use if a model is not of the kind `mode` needs."""
    wanted = NOT_TEXT.get(mode, "text")
    found = pipe.model.config.codec_config.modality
    if found != wanted:
        made, commands = MODALITIES[found]
        raise ValueError(
            f"{checkpoint} is a model of {made}, not {MODALITIES[wanted][0]}: use {commands}."
        )


def speed_up(pipe, int8: bool, compiled: bool) -> None:
    """Give the transformer 8-bit weights and compile it, as asked; `ValueError` without torchao."""
    pipe.model.requires_grad_(False)
    if int8:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ValueError(
                "--int8 needs torchao; install it with: pip install torchao"
            ) from error
        quantize_(pipe.model.transformer, Int8WeightOnlyConfig())
    if compiled:
        pipe.compile()
