"""The work of `tokcom verify`: is a model directory whole, and does everything in it fit together?

Every check runs, even after one has failed, so that one call shows all that is wrong.
`checksums.json` holds the SHA-256 of every file that running the model reads; it says whether a
download is what was released, the other checks whether that can run.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import transformers

from tokcom.cli.loading import MODALITIES, check_model_path
from tokcom.configuration_tokcom import TokComConfig
from tokcom.integrity_tokcom import CHECKSUMS, check_checksums, check_files, write_checksums
from tokcom.modeling_tokcom import TokComModel
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.checkpoints import first_line

# ---- the checks; each returns what it found, and raises if that is wrong ----


def check_readable(directory: Path) -> str:
    check_files(directory)
    return "none is missing, all can be read"


def check_configuration(directory: Path) -> str:
    config = TokComConfig.from_pretrained(directory)
    made, _ = MODALITIES[config.codec_config.modality]
    return f"a model of {made} with a {config.codec_config.model_type} codec"


def check_loading(directory: Path) -> str:
    """Weights and configuration name the same tensors of the same shapes, and every number is
    finite."""
    model = TokComModel.from_pretrained(directory)
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, all finite"


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


def check_released(directory: Path) -> str:
    if not (directory / CHECKSUMS).is_file():
        return f"no {CHECKSUMS}, so nothing to compare with"
    return f"{check_checksums(directory)} files as released"


CHECKS: dict[str, Callable[[Path], str]] = {
    "checksums": check_released,
    "files": check_readable,
    "configuration": check_configuration,
    "weights": check_loading,
    "tokenizer": check_tokenizer,
}


def verify(args: argparse.Namespace) -> None:
    """Print the result of every check; raises `ValueError` if one has failed."""
    directory = Path(args.directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory.")
    check_model_path(str(directory), "DIR")
    if args.write:
        print(f"written: {write_checksums(directory)}")
    failed = []
    for name, check in CHECKS.items():
        try:
            print(f"ok      {name:13} {check(directory)}")
        except Exception as error:  # whatever it is, the other checks still say something
            failed.append(name)
            print(f"FAILED  {name:13} {first_line(error.__cause__ or error)}")
    if failed:
        raise ValueError(
            f"{args.directory} failed {len(failed)} of {len(CHECKS)} checks ({', '.join(failed)}); "
            "see above."
        )
    print(f"{args.directory} is whole.")
