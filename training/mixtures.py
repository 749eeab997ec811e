"""What `data.train` says, before any of it is read: one source or several, and how much of each."""

from pathlib import Path
from typing import Any

import yaml

from tokcom.training.records import near_miss, shown

FORM = "- {path: a.jsonl, weight: 1.0}"  # of a line of a mixture, in messages


def read_mixture(source: Any, known: list[str]) -> list[dict[str, Any]]:
    """The sources of a path or name, a dictionary, a list of those, or a .yaml file with such a
    list, each as a dictionary; `ValueError` for keys that are not `known`."""
    place = ""
    if isinstance(source, str) and Path(source).suffix in (".yaml", ".yml"):
        place = f" of {source}"
        source = _read_yaml(Path(source))
    items = source if isinstance(source, list) else [source]
    return [_source_of(item, index, place, known) for index, item in enumerate(items)]


def _read_yaml(file: Path) -> Any:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # the whole message of YAML shows the text and its places over many lines
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        reason = f"{getattr(error, 'problem', None) or error}{place}"
        raise ValueError(f"{file} is not a readable YAML file ({reason}); correct it.") from error
    if not content:
        raise ValueError(f"{file} holds no sources; give it lines such as {FORM!r}.")
    return content


def _source_of(item: Any, index: int, place: str, known: list[str]) -> dict[str, Any]:
    """The fields of one source, the one of number `index`; `place` says of which file."""
    values = dict(item) if isinstance(item, dict) else {"path": item}
    # YAML reads a folder that is called 2024 as a number
    if isinstance(values.get("path"), int | float):
        values["path"] = str(values["path"])
    if not isinstance(values.get("path"), str):
        raise ValueError(
            f"source {index}{place} is {shown(item)}; it must have `path`, such as {FORM!r}."
        )
    for key in values:
        if key not in known:
            raise ValueError(
                f"source {index}{place} has an unknown key {key!r}{near_miss(str(key), known)} "
                f"Known are {', '.join(known)}."
            )
    return values


def check_amounts(path: str, weight: Any, fraction: Any, max_samples: Any) -> None:
    """Raise `ValueError` for the first of the numbers that say how much of a source is used that
    says nothing."""
    if weight is not None and not (_is_number(weight) and weight > 0):
        raise ValueError(f"source {path}: `weight` ({weight}) must be a positive number.")
    if not (_is_number(fraction) and 0 < fraction <= 1):
        raise ValueError(f"source {path}: `fraction` ({fraction}) must be a number in (0, 1].")
    if max_samples is not None and not (isinstance(max_samples, int) and max_samples >= 1):
        raise ValueError(
            f"source {path}: `max_samples` ({max_samples}) must be a whole number, at least 1."
        )


def _is_number(value: Any) -> bool:
    # a bool is an int to Python
    return isinstance(value, int | float) and not isinstance(value, bool)
