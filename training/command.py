"""The command line of training: a preset, `dotted.key=value` overrides of it, and `--help` with
every key.

Nothing heavy is imported, so that `--help` and mistakes are answered at once.
"""

import argparse
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

from tokcom.training.config import TrainConfig, as_override, known_keys, load_train_config


def parse_config(description: str | None, argv: list[str] | None) -> TrainConfig:
    """The configuration that a command line asks for; raises `ValueError`, and exits for
    `--help`."""
    # options may stand between overrides, as people write them
    args = build_parser(description).parse_intermixed_args(argv)
    overrides = list(args.overrides)
    if args.output_dir:
        overrides.append(as_override("output_dir", args.output_dir))
    if args.push_to_hub is not None:
        overrides.append("push_to_hub=true")
    if args.push_to_hub:
        # the bare option swallows an override that follows it
        is_override = "=" in args.push_to_hub
        name = as_override("hub_model_id", args.push_to_hub)
        overrides.append(args.push_to_hub if is_override else name)
    return load_train_config(args.preset, overrides)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        # argparse would leave the command out: `usage: tokcom [-h]`
        prog="tokcom train" if Path(sys.argv[0]).stem == "tokcom" else None,
        description=description,
        epilog=keys_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        default="debug",
        help="a file in presets/, or a path to a YAML file (default: debug)",
    )
    parser.add_argument("--output_dir", help="the same as output_dir=...")
    parser.add_argument(
        "--push_to_hub",
        nargs="?",
        const="",
        metavar="USER/NAME",
        help="push the finished model; the default name is that of output_dir",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any of the keys below")
    return parser


def keys_help() -> str:
    """The list of all keys: type, default, one line of help. Stages that share a key share its
    line."""
    lines = ["keys, with their type and the default that holds where the preset says nothing:"]
    shown = set()
    for key, field in known_keys():
        stage, _, name = key.rpartition(".")
        if stage in ("flow", "head"):
            continue  # the same class as codec
        section = {"codec": "{codec,flow,head}"}.get(stage, stage)
        if section not in shown:
            shown.add(section)
            lines.append("")
        kind = getattr(field.type, "__name__", str(field.type))
        if isinstance(field.type, types.GenericAlias | types.UnionType):
            kind = str(field.type)
        default = (
            field.default if field.default is not dataclasses.MISSING else field.default_factory()
        )
        shown_key = f"{section}.{name}" if section else name
        lines.append(f"  {shown_key}  [{kind.removeprefix('typing.')}, {_as_yaml(default)}]")
        lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def _as_yaml(value: Any) -> str:
    """A default as it would be written in an override."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, str | bool | None) and value in words:
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
