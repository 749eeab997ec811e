"""What can be known of a run before its data are read: that the models it starts from are there, and
that its settings make a model.

Messages name keys as a command line does: a configuration knows nothing of `model.*`.
"""

import difflib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokcom.configuration_codec_tokcom import UnknownKeyError
from tokcom.configuration_tokcom import TokComConfig
from tokcom.training.build import (
    check_trained_codec,
    has_trainable_codec,
    outline,
    run_config,
    takes_own_codec,
)
from tokcom.training.checkpoints import first_line
from tokcom.training.config import TrainConfig
from tokcom.training.directory import WORK, RunDirectory
from tokcom.training.records import near_miss
from tokcom.training.tokens import load_tokenizer

SECTIONS = ("codec_config.", "transformer_config.")
QUOTED = re.compile(r"([`'])((?:\w+\.)*\w+)\1")  # names in messages


def check_plan(config: TrainConfig, directory: RunDirectory, stages: list[str]) -> None:
    """Raise `ValueError` or `FileNotFoundError` for what no data can mend; `stages` are those that
    are not finished."""
    # a finished run may outlive the models that it started from
    if not stages:
        return
    check_attention(config.attention)
    check_starts(config)
    # a student has its teacher's configuration
    if config.stage == "distill":
        return
    model = outline(expected_config(config))
    # in stage all the codec is trained first
    is_new = config.stage == "flow" and not (config.init_from or config.codec_from)
    if is_new and not takes_own_codec(config, "flow", directory):
        check_trained_codec(model, directory)
    for stage in stages:
        if stage == "codec" and not has_trainable_codec(model):
            continue
        settings = getattr(config, stage).objective
        try:
            model.set_stage(stage, **settings)
        except ValueError as error:
            raise ValueError(as_typed(str(error), f"{stage}.objective", settings)) from error


def check_attention(name: str) -> None:
    """Raise `ValueError` for a function that nobody has registered; whether its package is
    installed, the library says."""
    known = ["auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # a kernel of the Hub is USER/NAME
    if name not in known and "/" not in name:
        raise ValueError(
            f"`attention` ({name!r}) must be one of {', '.join(known)}{near_miss(name, known)}"
        )


# ---- what a run starts from ----


def check_starts(config: TrainConfig) -> None:
    """Raise `FileNotFoundError` or `ValueError`, with the key, if a model or a tokenizer that a run
    starts from is not there."""
    for key in ("init_from", "codec_from"):
        if name := getattr(config, key):
            check_model(key, name)
    # a run that goes on has a tokenizer of its own
    if config.tokenizer and not (Path(config.output_dir) / WORK / "tokenizer").is_dir():
        check_tokenizer(config.tokenizer)


def check_model(key: str, name: str) -> None:
    """Raise `FileNotFoundError` or `ValueError` if `name`, the value of `key`, is no model."""
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"`{key}` ({name}) holds no config.json, so it is no TokCom model directory; give one, "
            "such as the output_dir of a finished run."
        )
    # a Hub id is USER/NAME; everything else that is not there was meant as a path
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not path.exists() and not is_hub_id:
        raise FileNotFoundError(
            f"`{key}` ({name}) does not exist; give a model directory or Hub id."
        )
    try:
        fields, _ = TokComConfig.get_config_dict(name)
    except OSError as error:
        raise ValueError(_not_found(key, name, error, "a model directory")) from error
    found = fields.get("model_type")
    if found != TokComConfig.model_type:
        raise ValueError(f"`{key}` ({name}) is a model of type {found!r}; give a TokCom model.")


def check_tokenizer(name: str) -> None:
    """Raise `ValueError` if there is no tokenizer of this name."""
    try:
        load_tokenizer(name)
    # the library raises many kinds for files of other kinds
    except Exception as error:
        what = "a directory with a tokenizer"
        raise ValueError(_not_found("tokenizer", name, error, what)) from error


def _not_found(key: str, name: str, error: Exception, what: str) -> str:
    reason = first_line(error).rstrip(".")
    if Path(name).exists():
        return f"`{key}` ({name}) cannot be loaded ({reason}); give {what}, or its Hub id."
    return (
        f"`{key}` ({name}) does not exist here, and the Hub does not give it ({reason}); give "
        f"{what}, or its Hub id."
    )


# ---- the model ----


def expected_config(config: TrainConfig) -> TokComConfig:
    """The configuration of the model that a run trains, with a vocabulary in the place of its
    tokenizer's, which the data may decide; raises `ValueError` if the settings make none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # building the model warns again
        try:
            return run_config(config, config.tokenizer_vocab_size)
        except (ValueError, StrictDataclassError):
            pass  # a model of pictures may be one without captions
        try:
            return run_config(config, None)
        except UnknownKeyError as error:
            prefix = f"model.{error.prefix}"
            near = difflib.get_close_matches(error.key, error.known, 1)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else str(error).partition("; ")[2]
            raise ValueError(f"unknown training key '{prefix}{error.key}'; {hint}") from error
        except (ValueError, StrictDataclassError) as error:
            # without the name of the validator
            reason = str(error.__cause__ or error)
            raise ValueError(as_typed(reason, "model", config.model)) from error


def as_typed(reason: str, section: str, settings: dict[str, Any]) -> str:
    """A message about `settings` of a section with the keys as they were typed."""
    full = {}
    for key in dotted_keys(settings):
        full[key] = full[key.rpartition(".")[2]] = f"{section}.{key}"

    def name_in_full(found: re.Match) -> str:
        quote, name = found.groups()
        default = f"{section}.{name}" if name.startswith(SECTIONS) else name
        return f"{quote}{full.get(name, default)}{quote}"

    named = QUOTED.sub(name_in_full, reason)
    if settings and section not in named:
        keys = ", ".join(f"{section}.{key}" for key in dotted_keys(settings))
        return f"{keys}: {named}"
    return named


def dotted_keys(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of nested dictionaries, as `outer.inner`."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
