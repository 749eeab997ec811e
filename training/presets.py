"""Presets: a YAML file holds the shape of a model, `model`, and the settings of its training,
everything else.

A file may begin with `extends: NAME` and say only what differs. These files are the only place of
presets. The functions import torch when they need it, so that a command line can name its presets
at once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from tokcom.configuration_tokcom import TokComConfig

DEFAULT_CODEC = "tokcom_chunk_codec"
PRESET_DIR = Path(__file__).resolve().parent.parent / "presets"


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(file.stem for file in PRESET_DIR.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The settings of a preset, or of a YAML file, with what it extends.

    Files that the data of a shipped preset name are those of this repository; those of other YAML
    files are the user's. Data of its own free a file from the validation data of what it extends.
    Raises `ValueError` for an unknown name and for a file that is no dictionary.
    """
    file = PRESET_DIR / f"{name}.yaml"
    if not file.is_file() and Path(name).suffix in (".yaml", ".yml"):
        # a preset that ships comes before a file of the same name
        file = Path(name)
    if not file.is_file():
        raise ValueError(
            f"unknown preset {name!r}; known presets are {preset_names()}, or give the path of a "
            "YAML file."
        )
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not a readable YAML file ({error}); correct it.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; it needs lines of `key: value`.")
    data = settings.get("data")
    if file.parent == PRESET_DIR and data:
        for key, source in data.items():
            if isinstance(source, str) and (PRESET_DIR.parent / source).exists():
                data[key] = str(PRESET_DIR.parent / source)
    parent = settings.pop("extends", None)
    if parent is None:
        return settings
    merged = read_preset(parent)
    _merge(merged.setdefault("model", {}), settings.pop("model", {}))
    if isinstance(data, dict) and "train" in data:
        forget_data(merged)
    for key, value in settings.items():
        known = merged.get(key)
        # one level deep: a stage's `objective` is replaced as a whole
        merged[key] = (
            {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        )
    return merged


def forget_data(settings: dict[str, Any]) -> None:
    """Remove from the settings of a preset what belongs to its own training data alone."""
    data = settings.get("data", {})
    for key in ("validation", "name"):
        data.pop(key, None)


def preset_objective(name: str, stage: str = "flow") -> dict[str, Any]:
    """The settings of the objective with which a preset trains a stage, for `set_stage`."""
    return read_preset(name).get(stage, {}).get("objective", {})


def preset_config(name: str, vocab_size: int | None = None, **overrides) -> "TokComConfig":
    """The configuration of the model of a preset.

    Args:
        name: a preset, or the path of a YAML file.
        vocab_size: the *tokenizer's* length, by default `tokenizer_vocab_size` of the preset. The
            model's vocabulary is one larger (the mask token). Of pictures and clips it is that of
            their captions, and the model has none by default.
        overrides: top-level fields, and dictionaries for `codec_config` and `transformer_config`.

    Raises `ValueError` for an unknown name or key.
    """
    from tokcom.configuration_media_tokcom import CODEC_CONFIGS, TokComMediaCodecConfig
    from tokcom.configuration_tokcom import TokComConfig

    settings = read_preset(name)
    fields = settings.get("model", {})
    merge_overrides(fields, overrides)
    codec = fields.setdefault("codec_config", {})
    # building the model reports an unknown type
    codec_class = CODEC_CONFIGS.get(codec.get("model_type", DEFAULT_CODEC), TokComMediaCodecConfig)
    size = vocab_size or settings.get("tokenizer_vocab_size", 512)
    has_texts = codec_class.set_vocabulary(codec, size, vocab_size is not None)
    # then the texts are captions, and their vocabulary is the model's, with its pad token
    if vocab_size is not None and not has_texts:
        fields["condition_vocab_size"] = vocab_size + 1
    return TokComConfig(**fields)


def merge_overrides(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Write `overrides`, top-level values or dictionaries for a sub-configuration, into the
    `fields` of a TokComConfig.

    Raises `ValueError` for an unknown top-level key; unknown keys of sub-configurations fail when
    the config is built.
    """
    from tokcom.configuration_codec_tokcom import check_known_keys
    from tokcom.configuration_tokcom import TRAINING, TokComConfig

    # settings of training were once fields of the model, and are still looked for there
    for name in _names(overrides):
        if name in TRAINING:
            raise ValueError(
                f"`{name}` is a setting of training, not of the model: give "
                f"`flow.objective.{name}=...`, or for the codec `codec.objective.{name}=...`."
            )
    check_known_keys(TokComConfig, overrides, "")
    _merge(fields, overrides)


def _names(fields: dict[str, Any]) -> Iterator[str]:
    """All keys of nested dictionaries."""
    for name, value in fields.items():
        yield name
        if isinstance(value, dict):
            yield from _names(value)


def _merge(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Dictionaries are merged, but those of another codec replaced."""
    for key, value in overrides.items():
        known = fields.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            # the fields of one codec mean nothing to another, so those of the preset are dropped
            codec_type = known.get("model_type", DEFAULT_CODEC)
            if value.get("model_type", codec_type) == codec_type:
                # a copy, because `known` may belong to the caller
                merged = dict(known)
                _merge(merged, value)
                value = merged
        fields[key] = value


__all__ = [
    "PRESET_DIR",
    "forget_data",
    "merge_overrides",
    "preset_config",
    "preset_names",
    "read_preset",
]
