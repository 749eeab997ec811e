"""What every command of `tokcom` can be told: options, their help and their defaults.

Parsers live here, apart from the work, so that `tokcom COMMAND --help` imports neither torch nor
transformers. A mode is one way to use a model; `inference.py` chooses among them with `--mode`,
`tokcom` by its command, and both read the same tables.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tokcom
from tokcom.cli.server_settings import LIMITS, ServerSettings

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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every option that does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or action.required or action.default is argparse.SUPPRESS:
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


CHECKPOINT = "model directory or Hub id"
DEVICE = "cpu, cuda, cuda:1 ... (default: auto, cuda if there is one, else cpu)"
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
        "help": "picture to write, such as .png; of decode the one to read (default: none)"
    },
    "input_image": {
        "help": "picture to read; of animate a .gif or film of the first frames (default: none)"
    },
    "input_audio": {"help": "sound to read, such as .wav or .flac (default: none)"},
    "audio_file": {"help": ".wav file to write (default: none)"},
    "video_file": {"help": ".gif, .webp or .mp4 file to write (default: none)"},
    "num_frames": {"type": int, "help": "frames of the clip (default: the model's)"},
    "fps": {"type": float, "default": 8, "help": "frames per second of the file"},
    "num_tokens": {"type": int, "help": "tokens of the picture to keep (default: all)"},
    "image_width": {"type": int, "help": "pixels in a row (default: the model's)"},
    "num_chunks": {"type": int, "default": 256, "help": "chunks to generate from nothing"},
    "num_generate_chunks": {"type": int, "default": 64, "help": "chunks to write after the prompt"},
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
        "type": int,
        "help": "the same seed gives the same sample (default: another one each time)",
    },
    "int8": {"action": "store_true", "help": "8-bit weights in the transformer; needs torchao"},
    "compile": {
        "action": "store_true",
        "help": "compile the transformer: a slow start, then faster",
    },
    "output_file": {"help": "file to write texts to, or the latents of encode (default: none)"},
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
    "infill": ("input_text", "TEXT", "text with gaps, each of them three or more underscores"),
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
            parser.add_argument(f"--{name}", required=required, **OPTIONS[name])


def chosen_mode(command: str, args: argparse.Namespace) -> str:
    """The name of the mode that the arguments of a command ask for."""
    modes = modes_of(command)
    for name, mode in modes.items():
        if mode.chosen_by is not None and getattr(args, mode.chosen_by) is not None:
            return name
    return next(name for name, mode in modes.items() if mode.chosen_by is None)


def check_mode(
    parser: argparse.ArgumentParser, mode: str, args: argparse.Namespace, command: str | None = None
) -> None:
    """End with a usage error if something is missing that `mode` needs.

    With a `command` the message spells it as that command does.
    """
    positional = POSITIONALS.get(command, (None, None))
    for name in MODES[mode].needs:
        if getattr(args, name) is None:
            spelt = positional[1] if name == positional[0] else f"--{name}"
            parser.error(f"{spelt} is required for {command or f'mode {mode}'}")
    if vars(args).get("batch_size", 1) < 1:
        parser.error(f"--batch_size {args.batch_size}: there must be at least 1 sample")


def refuse_unused(
    parser: argparse.ArgumentParser, mode: str, args: argparse.Namespace, names
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
        message = (
            f"--{name} {getattr(args, name)} has no effect in mode {mode}; it is an option of: "
            f"{takers}"
        )
        if name in names:
            parser.error(message)
        print(f"note: {message}", file=sys.stderr)


# ---- the other commands ----


def add_sample_corpus_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of the causal language model")
    add("--output", type=Path, required=True, help="folder of the corpus")
    add(
        "--num_texts",
        type=int,
        help="stop after the batch that reaches this many texts (default: no limit)",
    )
    add(
        "--num_characters",
        type=int,
        help="stop after the batch that reaches this many (default: no limit)",
    )
    add("--batch_size", type=int, default=128, help="texts sampled side by side")
    add("--max_new_tokens", type=int, default=255, help="longest text, in tokens")
    add("--temperature", type=float, default=1.0, help="divides the logits; below 1 is safer")
    add(
        "--min_p", type=float, default=0.02, help="least share of the likeliest token's probability"
    )
    add("--top_k", type=int, default=64, help="sample among this many tokens; 0 for all of them")
    add("--min_characters", type=int, default=1, help="leave shorter texts out")
    add("--prompt", help="what every text begins with, kept in it (default: the BOS token)")
    add("--validation", type=int, default=0, help="how many first texts go to validation.parquet")
    add(
        "--exclude",
        type=Path,
        nargs="*",
        default=[],
        help="parquet files of texts to leave out (default: none)",
    )
    add("--texts_per_file", type=int, default=10000, help="texts in each part-*.parquet")
    add("--seed", type=int, default=0, help="seed; batch b draws from its own, (seed, b)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--device", default="auto", help=DEVICE)
    add("--compile", action="store_true", help="fuse the attention; needs a C++ compiler on a cpu")


def check_sample_corpus(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.num_texts is None and args.num_characters is None:
        parser.error("nothing says when to stop; give --num_texts or --num_characters.")
    limits = ("num_texts", "num_characters")
    for name in ("temperature", "batch_size", "max_new_tokens", "texts_per_file", *limits):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {getattr(args, name)} must be more than 0.")
    if not 0 <= args.min_p <= 1:
        parser.error(f"--min_p {args.min_p} is a share; give a number from 0 to 1.")


def add_app_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    # a Space can be configured by its environment alone
    add(
        "--checkpoint",
        default=os.environ.get("TOKCOM_MODEL", default_checkpoint()),
        help=f"{CHECKPOINT} of a text model",
    )
    add(
        "--models",
        nargs="*",
        default=shipped_zoo(),
        metavar="MODEL",
        help="models of pixels, pictures, clips and several streams, each with a tab of its own "
        "(default: those in zoo/)",
    )
    add("--device", default="auto", help=DEVICE)
    add(
        "--host",
        # a Space is reached from outside its container; a page at home should not be
        default="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1",
        help="address to listen at",
    )
    add("--port", type=port, default=7860, help="port to listen at")


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", default=default_checkpoint(), help=CHECKPOINT)
    add("--host", default="127.0.0.1", help="0.0.0.0 for all interfaces; give an API key then")
    add("--port", type=port, default=8000, help="0 takes a free one")
    add("--device", default="auto", help=DEVICE)
    add("--compile", **OPTIONS["compile"])
    add(
        "--api_key",
        # the environment, since other users of a machine can read its command lines
        default=os.environ.get("TOKCOM_API_KEY"),
        help="asked of every request but /health (default: TOKCOM_API_KEY, or no key)",
    )
    add("--model_name", default=ServerSettings.model_name, help="the name clients ask for")
    for name, text in LIMITS.items():
        value = getattr(ServerSettings, name)
        add(f"--{name}", type=type(value), default=value, help=text)


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "predictions",
        nargs="*",
        help="files of {id, reference, prediction} records, or NAME=FILE, to score instead",
    )
    add("--checkpoint", default=".", help=CHECKPOINT)
    add("--data", default="sample_data/stories_validation.jsonl", help="held-out text")
    add(
        "--train_data",
        default="sample_data/stories_train.jsonl",
        help="what the model was trained on",
    )
    add("--text_column", default="text", help="field of the records that holds the text")
    add(
        "--judge",
        action="append",
        default=[],
        help="causal language model; may be repeated (default: a small one is trained first)",
    )
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="autoregressive model to measure beside it; may be repeated (default: none)",
    )
    add(
        "--sections",
        nargs="+",
        choices=EVALUATION_SECTIONS,
        default=list(EVALUATION_SECTIONS),
        metavar="SECTION",
        help=f"parts to measure, of {', '.join(EVALUATION_SECTIONS)} (default: all)",
    )
    add(
        "--output_dir",
        default="outputs/evaluation",
        help="folder for results.json, results.md and plots",
    )
    add("--max_tokens", type=int, default=65536, help="held-out tokens for reconstruction")
    add("--samples", type=int, default=1000, help="texts to sample")
    add("--seeds", type=int, default=3, help="repetitions with different seeds")
    add("--length", type=int, default=128, help="tokens of a sample")
    add("--seed", type=int, default=0, help="first seed")
    add("--steps", type=int, help="denoising steps per block (default: the model's)")
    add("--guidance_scale", type=float, default=1.0, help="above 1 follows the prompt more closely")
    add("--noise_scale", type=float, default=1.0, help="scale of the initial noise")
    add("--temperature", type=float, default=1.0, help="of the model's token probabilities")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the fewest tokens that reach this probability",
    )
    add("--peer_temperature", type=float, default=1.0, help="of the peers' token probabilities")
    add("--device", default="auto", help=DEVICE)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="published .pt file")
    parser.add_argument("output_dir", help="directory to create")
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of a tokenizer (default: the one the file names)"
    )


def add_kmeans_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="directory of an image model")
    add("output_dir", help="directory to create")
    add(
        "--data",
        required=True,
        help="pictures: a folder, a .parquet file or the name of a Hub dataset",
    )
    add("--image_column", default="image", help="field of the records that holds the picture")
    add("--num_codes", type=int, default=1024, help="size of the codebook")
    add(
        "--metric",
        choices=["euclidean", "cosine"],
        default="euclidean",
        help="distance between tokens",
    )
    add("--iterations", type=int, default=20, help="of k-means")
    add("--limit", type=int, default=4096, help="pictures to use")
    add("--seed", type=int, default=0, help="of the choice of pictures and of the first centres")


def add_publish_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="model directory")
    add("repo_id", help="user/name; created if there is none")
    add(
        "--evaluation",
        type=Path,
        help="output of tokcom evaluate, a section of the card (default: no such section)",
    )
    add(
        "--private",
        action="store_true",
        default=None,
        help="create a private repository (default: public)",
    )
    add("--token", help="access token (default: that of `hf auth login` or HF_TOKEN)")
    add("--revision", help="branch to push to (default: main)")
    add("--create_pr", action="store_true", help="open a pull request instead of committing")
    add(
        "--max_shard_size",
        help="split the weights into files of at most this size, e.g. 1GB (default: no split)",
    )


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", default=".", help="model directory")
    parser.add_argument(
        "--write",
        action="store_true",
        help="first write checksums.json anew, for files that were changed on purpose",
    )
