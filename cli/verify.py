"""The work of `tokcom verify`: is a model directory whole, and does everything in it fit together?

Every check runs, even after one has failed, so that one call shows all that is wrong.
`checksums.json` holds the SHA-256 of every file that running the model reads; it says whether a
download is what was released, the other checks whether that can run.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers.utils import logging

from tokcom.cli.loading import check_model_path
from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.checkpoints import first_line

CHECKSUMS = "checksums.json"
# what a released directory is made of; its card and pictures may change without making it another
# model
RELEASED = (
    "*.safetensors",
    "*.json",
    "*_tokcom.py",
    "*.jinja",
    "*.model",
    "*/*.safetensors",
    "*/*.json",
)
SHOWN = 5  # names in a message


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---- checksums ----


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def released_files(directory: Path) -> list[Path]:
    """The files of a model directory that `checksums.json` covers, in order of their names."""
    found = {file for pattern in RELEASED for file in directory.glob(pattern) if file.is_file()}
    # a subfolder with a model of its own, such as a run beside it, is another directory to verify
    own = {
        file
        for file in found
        if file.parent == directory or not (file.parent / "model_index.json").exists()
    }
    return sorted(own - {directory / CHECKSUMS})


def write_checksums(directory: str | Path) -> Path:
    """Write `checksums.json`, file name -> SHA-256, of a model directory; returns its path."""
    directory = Path(directory)
    digests = {
        file.relative_to(directory).as_posix(): _digest(file) for file in released_files(directory)
    }
    target = directory / CHECKSUMS
    target.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    return target


def check_checksums(directory: str | Path) -> int:
    """How many files have the SHA-256 that `checksums.json` says.

    Raises `ValueError` that names every file that is missing or another one, and
    `FileNotFoundError` without `checksums.json`.
    """
    directory = Path(directory)
    try:
        digests = json.loads((directory / CHECKSUMS).read_text(encoding="utf-8"))
        expected = dict(digests.items())
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(
            f"{directory / CHECKSUMS} is not a table of checksums ({error})."
        ) from error
    missing = [name for name in expected if not (directory / name).is_file()]
    changed = [
        name
        for name, digest in expected.items()
        if name not in missing and _digest(directory / name) != digest
    ]
    problems = []
    if missing:
        problems.append(f"missing: {_some(missing)}")
    if changed:
        problems.append(f"not the released file: {_some(changed)}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; download the directory again.")
    return len(expected)


# ---- the checks; each returns what it found, and raises if that is wrong ----


def check_configuration(directory: Path) -> str:
    config = TokComConfig.from_pretrained(directory)
    return f"a {config.codec_config.modality} model with a {config.codec_config.model_type} codec"


def check_finite(directory: Path) -> str:
    """Every stored number is finite; tensors are read one by one, so memory holds one of them."""
    bad: list[str] = []
    count = 0
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no .safetensors file.")
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                count += tensor.numel()
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    bad.append(name)
    if bad:
        raise ValueError(f"{len(bad)} tensors hold numbers that are not finite: {_some(bad)}.")
    return f"{count:,} numbers, all finite"


def check_loading(directory: Path) -> str:
    """Weights and configuration name the same tensors of the same shapes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of what we raise as one sentence
    try:
        model, facts = TokComModel.from_pretrained(directory, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, facts[kind]))
        if names:
            problems.append(f"{len(names)} {kind.replace('_', ' ')}: {_some(names)}")
    if problems:
        raise ValueError(f"the weights do not fit config.json ({'; '.join(problems)}).")
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def check_tokenizer(directory: Path) -> str:
    config = TokComConfig.from_pretrained(directory)
    # the class by its name: AutoTokenizer would ask whether to run the code of the directory
    name = json.loads((directory / "model_index.json").read_text(encoding="utf-8")).get(
        "tokenizer", [None, None]
    )[1]
    if name is None:
        return "none; ids and latents work, text does not"
    tokenizer = getattr(transformers, name).from_pretrained(directory)
    found = vocabulary_size(tokenizer)
    wanted = config.text_vocab_size - 1  # the last id is that of padding
    if found != wanted:
        raise ValueError(f"the tokenizer has {found} tokens, but the model was built for {wanted}.")
    return f"{found} tokens, as the model has"


def check_files(directory: Path) -> str:
    if not (directory / CHECKSUMS).is_file():
        return f"no {CHECKSUMS}, so nothing to compare with"
    return f"{check_checksums(directory)} files as released"


CHECKS: dict[str, Callable[[Path], str]] = {
    "checksums": check_files,
    "configuration": check_configuration,
    "numbers": check_finite,
    "weights": check_loading,
    "tokenizer": check_tokenizer,
}


def verify(args: argparse.Namespace) -> None:
    """Print the result of every check; raises `ValueError` if one has failed."""
    directory = Path(args.directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory.")
    check_model_path(str(directory), "DIR")
    failed = []
    for name, check in CHECKS.items():
        try:
            print(f"ok      {name:13} {check(directory)}")
        except Exception as error:  # whatever it is, the other checks still say something
            failed.append(name)
            print(f"FAILED  {name:13} {first_line(error.__cause__ or error)}")
    if failed:
        raise ValueError(
            f"{args.directory} failed {len(failed)} of {len(CHECKS)} checks ({', '.join(failed)}); see above."
        )
    print(f"{args.directory} is whole.")
