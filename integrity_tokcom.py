"""Whether a saved model is whole: its checksums, its JSON files, and what its weights hold.

Notable choices:
- Everything here raises `ValueError` with one sentence that names the file or the tensor and what
  to do. A damaged download must not become a model that merely writes badly.
- `checksums.json`, file name -> SHA-256, lists what running the model reads: weights,
  configurations, tokenizer, scheduler, and in an export the code. In a checkout of the source the
  code is not listed: there git keeps it, and it changes every day without the model becoming
  another one. Cards and pictures may change at any time and are never listed.
- Checksums tell accidents from the released files. They are no signature: whoever can change a
  weight can change them.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

CHECKSUMS = "checksums.json"
DATA = (
    *("model*.safetensors", "model*.safetensors.index.json", "model_index.json", "config.json"),
    *("generation_config.json", "preprocessor_config.json", "tokenizer*.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"),
    *("scheduler/*.json", "vae/*.json", "vae/*.safetensors"),
)
CODE = ("*_tokcom.py",)  # what `trust_remote_code=True` runs
SOURCE = "pyproject.toml"  # only a checkout of the source has it
# one of them holds the tokens
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
SHOWN = 3  # names in a message


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


# ---- checksums ----


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def released_files(directory: Path) -> list[Path]:
    """The files of a model directory that `checksums.json` covers, in order of their names."""
    is_checkout = (directory / SOURCE).is_file()
    patterns = DATA if is_checkout else DATA + CODE
    found = {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}
    return sorted(found)


def write_checksums(directory: str | os.PathLike) -> Path:
    """Write `checksums.json` of a model directory; returns its path."""
    directory = Path(directory)
    digests = {
        file.relative_to(directory).as_posix(): file_digest(file)
        for file in released_files(directory)
    }
    target = directory / CHECKSUMS
    target.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    return target


def check_checksums(directory: str | os.PathLike) -> int:
    """How many files have the SHA-256 that `checksums.json` says.

    Raises `ValueError` that names the files that are missing, changed or not listed, and
    `FileNotFoundError` without `checksums.json`.
    """
    directory = Path(directory)
    file = directory / CHECKSUMS
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no {CHECKSUMS} to verify it with; `tokcom verify {directory} "
            "--write` makes one of the files as they are now."
        )
    expected = read_json(file)
    # all problems are collected first: a message names every kind
    missing = [name for name in expected if not (directory / name).is_file()]
    changed = [
        name
        for name, digest in expected.items()
        if name not in missing and file_digest(directory / name) != digest
    ]
    found = {file.relative_to(directory).as_posix() for file in released_files(directory)}
    problems = []
    if missing:
        problems.append(f"missing: {_some(missing)}")
    if changed:
        problems.append(f"not the released file: {_some(changed)}")
    if found - set(expected):
        problems.append(f"not in {CHECKSUMS}: {_some(found - set(expected))}")
    if problems:
        raise ValueError(
            f"{directory} is not what was released ({'; '.join(problems)}); download it again."
        )
    return len(expected)


def verified(path: str | os.PathLike, **hub: Any) -> str:
    """The directory `path`, or a snapshot of that Hub repository, once its files match their
    checksums.

    `hub` is what `snapshot_download` reads, such as `revision`. Raises as `check_checksums` does.
    """
    directory = str(path)
    if not os.path.isdir(directory):
        # what is not covered by checksums is not downloaded either, but for what tells a checkout
        wanted = [CHECKSUMS, SOURCE, *DATA, *CODE]
        directory = snapshot_download(str(path), allow_patterns=wanted, **hub)
        if not os.path.isfile(os.path.join(directory, CHECKSUMS)):
            raise FileNotFoundError(
                f"the repository {path} has no {CHECKSUMS} to verify it with; load it without "
                "`verify=True` if you trust it."
            )
    check_checksums(directory)
    return directory


# ---- files ----


def read_json(file: Path) -> dict:
    """The object in a JSON file; raises `ValueError` that names the file if it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of json or of the encoding
        raise ValueError(f"{file} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{file} must hold an object, not a {type(value).__name__}; download it again."
        )
    return value


def check_files(directory: str | os.PathLike) -> None:
    """Raise `ValueError` or `FileNotFoundError` if a file of a pipeline's directory is missing or
    cannot be read."""
    directory = Path(directory)
    for name in ("model_index.json", "config.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no {name}, so it is not a TokCom model directory."
            )
    # the last form is that of components of a pipeline, such as the scheduler; what else lies here
    # is nobody's business
    patterns = [CHECKSUMS, *(name for name in DATA if name.endswith(".json")), "*/*_config.json"]
    for file in sorted({file for pattern in patterns for file in directory.glob(pattern)}):
        read_json(file)
    index = read_json(directory / "model_index.json")
    if index.get("scheduler") and not (directory / "scheduler" / "scheduler_config.json").is_file():
        raise FileNotFoundError(f"{directory / 'scheduler' / 'scheduler_config.json'} is missing.")
    kept = [name for pattern in TOKENIZERS for name in directory.glob(pattern)]
    if (index.get("tokenizer") or [None])[0] and not kept:  # [None, None] is no tokenizer
        raise FileNotFoundError(
            f"{directory} names a tokenizer in model_index.json but holds none, such as "
            "tokenizer.json."
        )


# ---- weights ----


class _NoReport(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)  # transformers' table of tensors


@contextlib.contextmanager
def explain_loading(where: str) -> Iterator[None]:
    """Turn what libraries raise for weights that cannot be read into one sentence, instead of their
    table of tensors."""
    logger = logging.getLogger("transformers.modeling_utils")
    quiet = _NoReport()
    logger.addFilter(quiet)
    try:
        yield
    # a RuntimeError too, though nothing is wrong with the file
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]  # its first line
        raise ValueError(
            f"the weights in {where} cannot be read ({reason}); model.safetensors is damaged: "
            "download it again."
        ) from error
    finally:
        logger.removeFilter(quiet)


def weight_files(path: str | os.PathLike, kwargs: dict[str, Any]) -> list[Path]:
    """The safetensors files of a model in a directory, or of one from the Hub that has just been
    loaded."""
    folder = Path(path)
    if not folder.is_dir():
        names = ("cache_dir", "revision", "subfolder")
        hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        config = cached_file(
            str(path),
            "config.json",
            local_files_only=True,  # it has just been loaded, so it is in the cache
            _raise_exceptions_for_missing_entries=False,  # None instead
            **hub,
        )
        return sorted(Path(config).parent.glob("model*.safetensors")) if config else []
    return sorted((folder / (kwargs.get("subfolder") or "")).glob("model*.safetensors"))


def check_keys(directory: str, facts: dict, weights_may_differ: bool) -> None:
    """Raise `ValueError` if weights and configuration do not name the same tensors of the same
    shapes.

    `facts` is the loading information of transformers.
    """
    if weights_may_differ:
        return
    shapes = [
        f"{name} is {list(had)}, not {list(needed)}"
        for name, had, needed in facts["mismatched_keys"]
    ]
    problems = []
    if facts["missing_keys"]:
        problems.append(f"missing: {_some(facts['missing_keys'])}")
    if facts["unexpected_keys"]:
        problems.append(f"unexpected: {_some(facts['unexpected_keys'])}")
    if shapes:
        problems.append(f"of another shape: {_some(shapes)}")
    if problems:
        raise ValueError(
            f"the weights in {directory} do not fit its config.json ({'; '.join(problems)}); "
            "download both again."
        )


def check_types(files: Iterable[str | os.PathLike], model: torch.nn.Module) -> None:
    """Raise `ValueError` if safetensors files store whole numbers where the model has fractions, or
    the other way round."""
    state = model.state_dict()
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():
                stored = tensors.get_slice(name).get_dtype()
                known = state.get(name)
                # safetensors' names: F32, F16, BF16, F8_... are fractions; I64, U8, BOOL are not
                if known is None or known.is_floating_point() == stored.startswith(("F", "BF")):
                    continue
                raise ValueError(
                    f"{file} stores {name} as {stored}, but the model has {known.dtype}; download it "
                    "again."
                )


def check_values(model: torch.nn.Module, where: str) -> None:
    """Raise `ValueError` if a number of the model is not finite, or a standard deviation is not
    positive."""
    check_tensors(model.state_dict().items(), where)


@torch.no_grad()
def check_tensors(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """As `check_values`, of tensors and their names, one after the other."""
    bad = []
    for name, tensor in tensors:
        # of a sharded model every process checks its own part
        tensor = getattr(tensor, "to_local", lambda t=tensor: t)()
        # meta: of offloaded weights nothing is here
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        # one pass without a mask as large as the tensor; the sum of huge numbers may overflow
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            bad.append(name)
        elif name.endswith("latent_std") and not (tensor > 0).all():
            raise ValueError(
                f"{name} of {where} holds {float(tensor.min()):g}, but latents are divided by it; "
                "download it again."
            )
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of {where} hold numbers that are not finite ({_some(bad)}); "
            "download it again, or if it was loaded in half precision, use dtype=torch.float32."
        )


def check_shards(directory: str | os.PathLike) -> None:
    """Refuse an index of weights that names files outside its own directory."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if not os.path.isfile(index):
        return
    with open(index, encoding="utf-8") as file:
        names = set(json.load(file).get("weight_map", {}).values())
    for name in sorted(names):
        # `../` or an absolute path would load a file of this machine
        if os.path.basename(name) != name:
            raise ValueError(
                f"{index} names the file {name!r}, which is not in its directory; do not use this "
                "checkpoint."
            )


# values of `device_map` that may spread a model over several devices
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


class CheckedWeights:
    """Loading that refuses what does not fit or is not finite, and saving with checksums; mixed
    into models."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path=None, *args, verify: bool = False, **kwargs
    ):
        """As in transformers; with `verify` the files are first compared with the directory's
        `checksums.json`.

        Raises `ValueError` for missing, unexpected, misshapen or non-finite weights;
        `ignore_mismatched_sizes=True` allows all but the last. A `device_map` such as "auto" takes
        one device, since the networks of a model read each other's weights.
        """
        where = pretrained_model_name_or_path
        if kwargs.get("device_map") in SPREADING:
            kwargs["device_map"] = str(torch.accelerator.current_accelerator(True) or "cpu")
        if where is None:  # weights are given as a state dict
            return super().from_pretrained(where, *args, **kwargs)
        if verify:
            where = verified(where, revision=kwargs.get("revision"), token=kwargs.get("token"))
        check_shards(where)
        wants_facts = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        # other shapes are let through here, so that `check_keys` names all problems at once
        with explain_loading(str(where)):
            model, facts = super().from_pretrained(
                where, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        if getattr(model, "hf_quantizer", None) is None:  # which stores weights in its own way
            check_keys(str(where), facts, may_differ)
            check_types(weight_files(where, kwargs), model)
            check_values(model, str(where))
        model.set_stage("flow")  # loading replaces the parameters, and with them what was frozen
        return (model, facts) if wants_facts else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, with the checksums of what lies in the directory then."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # the other processes of a training run write nothing
        if kwargs.get("is_main_process", True):
            write_checksums(save_directory)


class CheckedFiles:
    """Loading that names the file that is missing or damaged; mixed into pipelines."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, verify: bool = False, **kwargs):
        """As in diffusers; with `verify` the files are first compared with the repository's
        `checksums.json`.

        Raises `ValueError` or `FileNotFoundError`.
        """
        where = pretrained_model_name_or_path
        if verify:
            where = verified(where, revision=kwargs.get("revision"), token=kwargs.get("token"))
        if os.path.isdir(where):
            check_files(where)
        return super().from_pretrained(where, **kwargs)


__all__ = [
    "CheckedFiles",
    "CheckedWeights",
    "check_shards",
    "check_tensors",
    "CHECKSUMS",
    "SafetensorError",
    "check_checksums",
    "check_files",
    "check_keys",
    "check_types",
    "check_values",
    "file_digest",
    "read_json",
    "released_files",
    "write_checksums",
]
