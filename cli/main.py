"""The `tokcom` command: one subcommand for each thing to do with a model.

    tokcom generate "Once upon a time" --temperature 0.7
    tokcom serve --checkpoint my-model

A command is a line in `COMMANDS`: what it does, its options (`cli/options.py` and
`cli/other_options.py`) and where its work is. The work is imported after the options are read, so that `--help` and usage errors come at once.
"""

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tokcom.cli import options, other_options
from tokcom.cli.errors import report_errors
from tokcom.cli.options import HelpFormatter


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        help: one line for the list of commands.
        work: `module:function`, relative to `tokcom`. With `add_options` the function takes the
            parsed arguments; without, it takes the list of them and reads it itself.
        add_options: adds the command's options to a parser.
        check: ends with a usage error if the options do not go together.
        description: more than `help` says, for the command's own `--help`.
    """

    help: str
    work: str
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None
    description: str = ""


def _mode_command(name: str, help: str) -> Command:
    """A command that uses a model in one of its modes."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        options.add_mode_options(parser, name)

    def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        args.command = name
        args.mode = options.chosen_mode(name, args)
        # argparse knows the options of the command, not which of them belong to the mode
        own = [name for name in options.OPTIONS if name in vars(args) and name not in options.MODEL]
        # first: who adds what is missing should not hear of a conflict then
        options.refuse_unused(parser, args.mode, args, own, name)
        options.check_mode(parser, args.mode, args, name)

    return Command(help, "cli.modes:run_mode", add_options, check)


EVALUATION = """
    tokcom evaluate --data held_out.jsonl --judge judge --peer "equal FLOPs=peer"
    tokcom evaluate a=a_seed_0.json a=a_seed_1.json b=b_seed_0.json   # BLEU-4, ROUGE-L, METEOR
    tokcom evaluate codebook --model model --data held_out.parquet    # use of a quantiser's codes

Writes results.json, results.md and plots. A judge with the model's tokenizer scores token ids; any
other causal language model scores text."""
COMMANDS = {
    "generate": _mode_command("generate", "continue PROMPT, or write from nothing"),
    "infill": _mode_command("infill", "fill the gaps ____ in TEXT"),
    "reconstruct": _mode_command("reconstruct", "encode and decode TEXT or a picture"),
    "denoise": _mode_command("denoise", "keep a share of TEXT and make up the rest"),
    "encode": _mode_command(
        "encode", "turn TEXT into latents, or into a picture with a pixel model"
    ),
    "decode": _mode_command("decode", "turn what encode wrote back into text"),
    "draw": _mode_command("draw", "draw a picture for CAPTION"),
    "animate": _mode_command("animate", "make a clip for CAPTION or after first frames"),
    "any-to-any": _mode_command("any-to-any", "make a text, a picture or a sound from others"),
    "sample-corpus": Command(
        "sample a training corpus from any causal language model",
        "cli.sample_corpus:run_until_stopped",
        other_options.add_sample_corpus_options,
        other_options.check_sample_corpus,
        "The same command given again goes on where it was stopped.",
    ),
    "inspect": Command("say what a training run would read of DATA", "cli.inspect:main"),
    "train": Command("train a model, stage by stage", "train_accelerate:main"),
    "serve": Command(
        "serve OpenAI's completions and chat interfaces",
        "cli.serve:run",
        other_options.add_serve_options,
    ),
    "app": Command(
        "open a page to play with a model", "cli.app:run", other_options.add_app_options
    ),
    "evaluate": Command(
        "measure a text model against controls, judges and a peer",
        "cli.evaluate:run",
        other_options.add_evaluate_options,
        other_options.check_evaluate,
        description=EVALUATION,
    ),
    "convert": Command(
        "turn a published .pt file into a model directory",
        "cli.convert:convert",
        other_options.add_convert_options,
    ),
    "kmeans": Command(
        "make a codebook for an image model",
        "cli.convert:fit_codebook",
        other_options.add_kmeans_options,
    ),
    "publish": Command(
        "push a model directory to the Hub",
        "cli.convert:publish",
        other_options.add_publish_options,
    ),
    "verify": Command(
        "check that a model directory is whole and loads",
        "cli.verify:verify",
        other_options.add_verify_options,
    ),
}


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tokcom COMMAND [OPTION ...]",
            "",
            *lines,
            "",
            "tokcom COMMAND --help lists the options of a command.",
            "--debug, or TOKCOM_DEBUG=1, shows the traceback of an error.",
        ]
    )


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command that has `add_options`."""
    command = COMMANDS[name]
    description = f"{command.help[0].upper()}{command.help[1:]}.\n{command.description}"
    parser = argparse.ArgumentParser(
        prog=f"tokcom {name}", description=description, formatter_class=HelpFormatter
    )
    command.add_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse(name: str, argv: list[str]) -> argparse.Namespace:
    """The arguments of a command that has `add_options`, checked; a mistake ends with status 2."""
    parser = build_parser(name)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(options.explain_unknown(parser, unknown))
    check = COMMANDS[name].check
    if check is not None:
        check(parser, args)
    return args


def call(name: str, *argv: str) -> Any:
    """Run a command; returns what its work returns, and ends with status 1 if that fails."""
    command = COMMANDS[name]
    arguments = list(argv)
    debug = "--debug" in arguments
    module, function = command.work.split(":")
    if name == "evaluate" and arguments[:1] == ["codebook"]:  # it has options of its own
        command = Command(command.help, "evaluation.codebook:main")
        module = "evaluation.codebook"
        function = "main"
        arguments = arguments[1:]
    given: argparse.Namespace | list[str] = arguments
    if command.add_options is not None:
        given = parse(name, arguments)
        # reports quote the command that made them
        given.command_line = shlex.join(["tokcom", name, *argv])
    elif debug:
        # a command that reads its own arguments does not know it
        arguments.remove("--debug")
    # importing is part of the work: it fails where an optional package is missing
    with report_errors(debug):
        work = getattr(import_module(f"tokcom.{module}"), function)
        return work(given)


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    # status 2, as argparse gives a wrong command line
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else f"it has {', '.join(COMMANDS)}."
        print(f"error: tokcom has no command {name!r}; {advice}", file=sys.stderr)
        sys.exit(2)
    call(name, *rest)


if __name__ == "__main__":
    main()
