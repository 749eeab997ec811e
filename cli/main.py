"""The `tokcom` command: one subcommand for each thing to do with a model.

    tokcom generate "Once upon a time" --temperature 0.7
    tokcom serve --checkpoint my-model

Nothing heavy is imported before a subcommand is chosen, so the list of them appears at once. What follows the subcommand is
read by the module that does the work.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A subcommand: its `help`, the module whose `main` runs it, arguments that come first, and the option for which a leading
    argument without a dash stands."""

    help: str
    module: str
    first: tuple[str, ...] = ()
    positional: str | None = None

    def run(self, arguments: list[str]) -> None:
        if self.positional and arguments and not arguments[0].startswith("-"):
            arguments = [self.positional, *arguments]
        main: Callable = import_module(self.module).main
        main([*self.first, *arguments])


def _mode(help: str, mode: str, positional: str | None = None) -> Command:
    return Command(help, "tokcom.inference", ("--mode", mode), positional)


COMMANDS = {
    "generate": _mode("write from nothing, or continue PROMPT", "generate"),
    "infill": _mode("fill the gaps ____ in TEXT", "infill", "--input_text"),
    "reconstruct": _mode("encode and decode TEXT", "reconstruct", "--input_text"),
    "denoise": _mode("keep a share of TEXT and make up the rest", "denoise_reconstruct", "--input_text"),
    "encode": _mode("write the latents of TEXT to --output_file", "encode", "--input_text"),
    "decode": _mode("read the text of a file that encode wrote", "decode", "--latents_file"),
    "draw": _mode("draw a picture for a CAPTION", "draw", "--prompt"),
    "animate": _mode("make a clip for a CAPTION or after first frames", "animate", "--prompt"),
    "any-to-any": _mode("make a text, a picture or a sound from others", "any_to_any"),
    "train": Command("train both stages, or one", "tokcom.train_accelerate"),
    "evaluate": Command("measure a text model against controls, judges and a peer", "tokcom.cli.evaluate"),
    "convert": Command("turn a published .pt file into a model directory", "tokcom.cli.convert"),
    "kmeans": Command("make a codebook of a model of pictures", "tokcom.cli.convert", ("kmeans",)),
    "publish": Command("push a model directory to the Hub", "tokcom.cli.convert", ("publish",)),
    "serve": Command("serve OpenAI's completions interface", "tokcom.cli.serve"),
    "app": Command("open a page to play with a model", "tokcom.app"),
}


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: tokcom COMMAND [OPTION ...]", "", *lines, "", "tokcom COMMAND --help lists the options of a command."]
    )


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"error: tokcom has no command {name!r}; it has {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    if name == "generate" and rest and not rest[0].startswith("-"):  # it continues a prompt
        command = _mode(command.help, "conditional", "--prompt")
    command.run(rest)


if __name__ == "__main__":
    main()
