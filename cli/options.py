"""What every command of `tokcom` can be told: options, their help and their defaults.

Parsers live here, apart from the work, so that `tokcom COMMAND --help` imports neither torch nor
transformers. A mode is one way to use a model; `inference.py` chooses among them with `--mode`,
`tokcom` by its command, and both read the same tables. Commands without modes have their options in
`cli/other_options.py`.
"""

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tokcom

EVALUATION_SECTIONS = (
    "reconstruction",
    "unconditional",
    "continuation",
    "frontier",
    "likelihood",
    "brier",
    "memorisation",
    "latency",
)


NO_DEFAULT = " (default: none)"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every option that does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return text.removesuffix(NO_DEFAULT)  # of an option that others need not
        if "default" in text or action.default is argparse.SUPPRESS:
            return text
        if action.default is False:
            return f"{text} (default: off)"
        return text if action.default is None else f"{text} (default: %(default)s)"


# ---- options of the modes; `inference.py` has all of them, a command those of its modes ----


def port(text: str) -> int:
    """A port as argparse wants it; 0 takes a free one."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port; give one from 0 to 65535")
    return number


def seed(text: str) -> int:
    """A seed as argparse wants it, within what torch takes."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not FIRST_SEED <= number <= LAST_SEED:
        raise argparse.ArgumentTypeError(
            f"{text} is no seed; give a whole number from {FIRST_SEED} to {LAST_SEED}"
        )
    return number


def gap_length(text: str) -> int | None:
    """A number of tokens, or None for `auto`."""
    return None if text == "auto" else int(text)


def default_checkpoint() -> str:
    """The current directory if it holds a model, else the model that ships with the package."""
    shipped = Path(tokcom.__file__).parent
    if Path("model_index.json").is_file() or not (shipped / "model_index.json").is_file():
        return "."
    return str(shipped)


def shipped_zoo() -> list[str]:
    """The models that lie in `zoo/` of this checkout; the installed package has none."""
    found = (Path(tokcom.__file__).parent / "zoo").glob("*/model_index.json")
    return sorted(str(file.parent) for file in found)


FIRST_SEED = -(2**63)
LAST_SEED = 2**64 - 1
CHECKPOINT = "model directory or Hub id"
DEVICE = "cpu, cuda, cuda:1 ... (default: auto, cuda if there is one, else cpu)"
CHUNK = "of chunk_size tokens each: 4 in the shipped model"
OPTIONS: dict[str, dict] = {
    "checkpoint": {
        "default": default_checkpoint(),
        "help": f"{CHECKPOINT}, or a published .pt file (default: the current directory if it is "
        "a model, else the one that ships with tokcom)",
    },
    "input_text": {
        "help": "text to work on; for infill with gaps of three or more underscores (default: none)"
    },
    "prompt": {"help": "text to continue, or the caption of a picture or clip (default: none)"},
    "latents_file": {"help": "file that encode wrote (default: none)"},
    "image_file": {
        "help": "picture to write, such as .png; image_to_text reads it (default: none)"
    },
    "input_image": {
        "help": "picture to read, or for animate a film of the first frames (default: none)"
    },
    "input_audio": {"help": "sound to read, such as .wav or .flac (default: none)"},
    "audio_file": {"help": ".wav file to write (default: none)"},
    "video_file": {"help": ".gif, .webp or .mp4 file to write (default: none)"},
    "num_frames": {"type": int, "help": "frames of the clip (default: the model's)"},
    "fps": {"type": float, "default": 8, "help": "frames per second of the file"},
    "num_tokens": {"type": int, "help": "tokens of the picture to keep (default: all)"},
    "image_width": {"type": int, "help": "pixels in a row (default: the model's)"},
    "num_chunks": {"type": int, "default": 256, "help": f"chunks to write from nothing, {CHUNK}"},
    "num_generate_chunks": {
        "type": int,
        "default": 64,
        "help": f"chunks to write after the prompt, {CHUNK}",
    },
    "gap_length": {
        "type": gap_length,
        "default": 16,
        "help": "tokens in each gap; auto tries several lengths and keeps the likeliest text",
    },
    "temperature": {
        "type": float,
        "help": "of token probabilities; lower is safer text (default: the model's)",
    },
    "top_p": {
        "type": float,
        "help": "sample from the fewest tokens that reach this probability (default: the model's)",
    },
    "num_steps": {"type": int, "help": "denoising steps per block (default: the model's)"},
    "noise_level": {
        "type": float,
        "default": 0.5,
        "help": "share of the text to keep: 0 is pure noise, 1 the text itself",
    },
    "guidance_scale": {
        "type": float,
        "help": "1 is off; above 1 follows what is given more closely, at twice the cost (default: "
        "the model's)",
    },
    "truncation": {
        "choices": ("left",),
        "help": "left: leave out the beginning of a prompt that is longer than the model sees at "
        "once (default: refuse it)",
    },
    "watch": {
        "action": "store_true",
        "help": "show every denoising step; for one text in a terminal",
    },
    "batch_size": {"type": int, "default": 1, "help": "samples to make"},
    "num_candidates": {
        "type": int,
        "help": "drawn, of which the best is kept: the likeliest filling, or the text most like the "
        "others (default: 16 fillings, 1 text)",
    },
    "device": {"default": "auto", "help": DEVICE},
    "seed": {
        "type": seed,
        "help": "the same seed gives the same sample (default: another one each time)",
    },
    "int8": {"action": "store_true", "help": "8-bit weights in the transformer; needs torchao"},
    "compile": {
        "action": "store_true",
        "help": "compile the transformer: a slow start, then faster",
    },
    "output_file": {"help": "file to write texts to, or the latents of encode (default: none)"},
}
# where a command says it in other words than `inference.py`, which has all options: only what it
# does itself
PICTURE = "picture to write, such as .png (default: none)"
TEXTS = "file to write the texts to (default: none)"
HELP: dict[str, dict[str, str]] = {
    "input_text": {"any-to-any": "text to read (default: none)"},
    "image_file": {
        **dict.fromkeys(("reconstruct", "draw", "any-to-any"), PICTURE),
        "encode": "picture to write with a pixel model, such as .png (default: none)",
        "decode": "picture to read, that encode wrote with a pixel model (default: none)",
    },
    "input_image": {
        **dict.fromkeys(("reconstruct", "any-to-any"), "picture to read (default: none)"),
        "animate": "first frames to read, as a .gif or a film such as .mp4 (default: none)",
    },
    "num_chunks": {"generate": f"chunks to write without PROMPT, {CHUNK}"},
    "num_generate_chunks": {"generate": f"chunks to write after PROMPT, {CHUNK}"},
    "num_candidates": {
        "infill": "fillings drawn, of which the likeliest is kept (default: 16, or 1 if the model "
        "cannot tell)",
        "any-to-any": "texts drawn, of which the one most like the others is kept (default: 1)",
    },
    "output_file": {
        **dict.fromkeys(("generate", "infill", "reconstruct", "denoise"), TEXTS),
        **dict.fromkeys(("decode", "any-to-any"), TEXTS),
        "encode": "file to write the latents to, such as .safetensors (default: none)",
    },
}
# files that must exist, and files whose folder must, before a model is loaded
READ = ("input_image", "input_audio", "latents_file")
WRITTEN = ("output_file", "image_file", "audio_file", "video_file")

# what every mode takes, every sampler, and every sampler of tokens
MODEL = ("checkpoint", "device", "int8", "compile")
SAMPLING = ("num_steps", "seed")
TOKENS = ("temperature", "top_p", *SAMPLING)


@dataclass(frozen=True)
class Mode:
    """One way to use a model.

    Args:
        command: of `tokcom`, that runs it.
        options: names of those it takes, besides those of every model.
        needs: options without which it cannot run.
        chosen_by: where a command has several modes, the option that chooses this one.
        modality: of the models it runs.
    """

    command: str
    options: tuple[str, ...]
    needs: tuple[str, ...] = ()
    chosen_by: str | None = None
    modality: str = "text"

    @property
    def reads_picture(self) -> bool:
        """Whether `image_file` is an input here."""
        return self.command == "decode"


MODES = {
    "generate": Mode("generate", ("num_chunks", "batch_size", *TOKENS, "output_file")),
    "conditional": Mode(
        "generate",
        (
            *("prompt", "num_generate_chunks", "truncation", "watch", "guidance_scale"),
            *("batch_size", *TOKENS, "output_file"),
        ),
        needs=("prompt",),
        chosen_by="prompt",
    ),
    "infill": Mode(
        "infill",
        ("input_text", "gap_length", "guidance_scale", "num_candidates", *TOKENS, "output_file"),
        needs=("input_text",),
    ),
    "reconstruct": Mode("reconstruct", ("input_text", "output_file"), needs=("input_text",)),
    "reconstruct_image": Mode(
        "reconstruct",
        ("input_image", "image_file", "num_tokens"),
        needs=("input_image", "image_file"),
        chosen_by="input_image",
        modality="image",
    ),
    "denoise_reconstruct": Mode(
        "denoise", ("input_text", "noise_level", *TOKENS, "output_file"), needs=("input_text",)
    ),
    "encode": Mode("encode", ("input_text", "output_file"), needs=("input_text",)),
    "text_to_image": Mode(
        "encode",
        ("input_text", "image_file", "image_width"),
        needs=("input_text", "image_file"),
        chosen_by="image_file",
    ),
    "decode": Mode("decode", ("latents_file", "output_file"), needs=("latents_file",)),
    "image_to_text": Mode(
        "decode", ("image_file", "output_file"), needs=("image_file",), chosen_by="image_file"
    ),
    "draw": Mode(
        "draw",
        ("prompt", "image_file", "guidance_scale", *SAMPLING),
        needs=("image_file",),
        modality="image",
    ),
    "animate": Mode(
        "animate",
        ("prompt", "input_image", "video_file", "num_frames", "fps", "guidance_scale", *SAMPLING),
        needs=("video_file",),
        modality="video",
    ),
    "any_to_any": Mode(
        "any-to-any",
        (
            *("input_text", "input_image", "input_audio", "image_file", "audio_file"),
            *("guidance_scale", "batch_size", "num_candidates", *SAMPLING, "output_file"),
        ),
        modality="several",
    ),
}
# the argument without dashes of a command: option, name in the help, help
POSITIONALS = {
    "generate": ("prompt", "PROMPT", "text to continue; without it texts are written from nothing"),
    "infill": (
        "input_text",
        "TEXT",
        "text with gaps, each of them ____ (three or more underscores)",
    ),
    "reconstruct": (
        "input_text",
        "TEXT",
        "text to encode and decode; for pictures give --input_image instead",
    ),
    "denoise": ("input_text", "TEXT", "text of which a share is kept"),
    "encode": ("input_text", "TEXT", "text to encode"),
    "decode": (
        "latents_file",
        "FILE",
        "latents that encode wrote; for a picture of text give --image_file instead",
    ),
    "draw": ("prompt", "CAPTION", "what to draw; without it anything the model knows"),
    "animate": ("prompt", "CAPTION", "what to show; without it anything the model knows"),
}


def modes_of(command: str) -> dict[str, Mode]:
    """The modes that a command runs, by name."""
    return {name: mode for name, mode in MODES.items() if mode.command == command}


def option_help(name: str, command: str | None = None) -> str:
    """What the help of a command, or of `inference.py`, says about an option."""
    return HELP.get(name, {}).get(command or "", OPTIONS[name]["help"])


def add_mode_options(parser: argparse.ArgumentParser, command: str) -> None:
    """The options of a command that uses a model."""
    modes = modes_of(command).values()
    positional = POSITIONALS.get(command)
    if positional is not None:
        name, metavar, text = positional
        needed = all(name in mode.needs for mode in modes)
        parser.add_argument(name, metavar=metavar, nargs=None if needed else "?", help=text)
    # modes share options, so each is added once, in the order of the table
    names = dict.fromkeys(name for mode in modes for name in (*mode.options, *MODEL))
    for name in sorted(names, key=list(OPTIONS).index):
        if positional is None or name != positional[0]:
            # needed by one mode only, an option may be missing in another; `check_mode` asks for it
            required = all(name in mode.needs for mode in modes)
            settings = OPTIONS[name] | {"help": option_help(name, command)}
            parser.add_argument(f"--{name}", required=required, **settings)


def chosen_mode(command: str, args: argparse.Namespace) -> str:
    """The name of the mode that the arguments of a command ask for."""
    modes = modes_of(command)
    for name, mode in modes.items():
        if mode.chosen_by is not None and getattr(args, mode.chosen_by) is not None:
            return name
    return next(name for name, mode in modes.items() if mode.chosen_by is None)


# ---- checks: mistakes are told in the words that were typed ----


def spelt(name: str, command: str | None = None) -> str:
    """An option as it is typed; a command has one that is typed without its name."""
    positional = POSITIONALS.get(command or "", ("", "", ""))
    return positional[1] if name == positional[0] else f"--{name}"


def given(name: str, value: object, command: str | None = None) -> str:
    """An option as it is typed, with its value; a flag has none, and a text may be long."""
    word = spelt(name, command)
    return word if value is True or not word.startswith("-") else f"{word} {value}"


@dataclass(frozen=True)
class Range:
    """What the number of an option may be, and how a mistake is told."""

    holds: Callable[[float], bool]
    remedy: str


COLDEST = 1e-4  # of `sampling_tokcom.py`, which imports torch
AT_LEAST_ONE = Range(lambda number: number >= 1, "give at least 1")
COUNTS = (
    *("num_chunks", "num_generate_chunks", "gap_length", "num_candidates", "batch_size"),
    *("num_steps", "num_frames", "num_tokens", "image_width"),
)
RANGES = {
    **dict.fromkeys(COUNTS, AT_LEAST_ONE),
    # NaN compares as false with everything, so it is never within a range
    "temperature": Range(
        lambda number: COLDEST < number < math.inf, f"give a number above {COLDEST:g}"
    ),
    "top_p": Range(lambda number: 0 < number <= 1, "give a number above 0, at most 1"),
    "noise_level": Range(lambda number: 0 <= number <= 1, "give a number from 0 to 1"),
    "guidance_scale": Range(lambda number: 0 <= number < math.inf, "give a number, at least 0"),
    "fps": Range(lambda number: 0 < number < math.inf, "give a number above 0"),
}


def check_ranges(
    parser: argparse.ArgumentParser, args: argparse.Namespace, ranges: Mapping[str, Range]
) -> None:
    """End with a usage error if a number is out of its range."""
    for name, limits in ranges.items():
        value = vars(args).get(name)
        if value is not None and not limits.holds(value):
            parser.error(f"--{name} {value}: {limits.remedy}")


def check_mode(
    parser: argparse.ArgumentParser, mode: str, args: argparse.Namespace, command: str | None = None
) -> None:
    """End with a usage error if something is missing that `mode` needs, if a text or the name of a
    file is empty, or if a number is out of range.

    With a `command` the message spells it as that command does.
    """
    facts = MODES[mode]
    for name in facts.needs:
        if getattr(args, name) is not None:
            continue
        word = spelt(name, command)
        if command is None:
            parser.error(f"{word} is required for mode {mode}")
        by = facts.chosen_by
        use = f"with {spelt(by, command)}" if by is not None else f"for {command}"
        meaning = option_help(name, command).removesuffix(NO_DEFAULT)
        if not word.startswith("-"):
            meaning = POSITIONALS[command][2]
        parser.error(f"{word} is required {use}: {meaning}")
    for name in (*facts.options, *MODEL):
        if vars(args).get(name) == "":
            needed = name in facts.needs
            if command is not None:
                # one mode may need what another leaves out
                needed = all(name in mode.needs for mode in modes_of(command).values())
            remedy = "fill it in" if needed else "fill it in or leave it out"
            parser.error(f"{spelt(name, command)} is empty; {remedy}")
    # a published command may give numbers that its mode does not read
    check_ranges(parser, args, {name: RANGES[name] for name in facts.options if name in RANGES})


def conflict(mode: str, name: str, value: object, command: str) -> str:
    """Why an option of `command` has no effect in its `mode`: the one that is missing or too
    much."""
    word = given(name, value, command)
    chosen_by = MODES[mode].chosen_by
    if chosen_by is not None:
        return f"{word} has no effect with {spelt(chosen_by, command)}; leave one of the two out"
    others = [other.chosen_by for other in modes_of(command).values() if name in other.options]
    needed = " or ".join(spelt(other, command) for other in others if other is not None)
    return (
        f"{word} has an effect only with {needed}; give {needed} too, or leave "
        f"{spelt(name, command)} out"
    )


def refuse_unused(
    parser: argparse.ArgumentParser,
    mode: str,
    args: argparse.Namespace,
    names,
    command: str | None = None,
) -> None:
    """End with a usage error if an option among `names` was given that `mode` does not read, and
    print a note for others."""
    for name in OPTIONS:
        takers = ", ".join(taker for taker, other in MODES.items() if name in other.options)
        # argparse does not tell a default from the same value given
        default = OPTIONS[name].get("default")
        value = vars(args).get(name, default)
        is_given = value != default and value is not False  # 0 is a value, and equal to False
        # options that no mode names are of all modes
        if not is_given or not takers or name in MODES[mode].options:
            continue
        message = f"{given(name, value)} has no effect in mode {mode}; it is an option of: {takers}"
        if name in names:
            parser.error(message if command is None else conflict(mode, name, value, command))
        print(f"note: {message}", file=sys.stderr)


# what Python and other tools call an option
ELSEWHERE = {
    "cfg_scale": "guidance_scale",
    "gen_length": "num_generate_chunks",
    "generator": "seed",
    "max_length": "num_generate_chunks",
    "max_new_tokens": "num_generate_chunks",
    "max_tokens": "num_generate_chunks",
    "model": "checkpoint",
    "num_inference_steps": "num_steps",
    "num_return_sequences": "batch_size",
    "steps": "num_steps",
}


def explain_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> str:
    """What to say of arguments that a parser does not know: the near miss of the first."""
    message = f"unrecognized arguments: {' '.join(unknown)}"
    first = unknown[0].partition("=")[0]
    if not first.startswith("-"):
        return f"{message}; a text of several words needs quotes around it"
    known = [word for action in parser._actions for word in action.option_strings]
    name = first.lstrip("-").replace("-", "_")
    meant = f"--{ELSEWHERE.get(name, name)}"
    close = difflib.get_close_matches(meant, known, n=1)
    return f"{message}; did you mean {close[0]}?" if close else f"{message}; see --help"
