"""Options of the commands of `tokcom` that use no mode: `sample-corpus`, `serve`, `evaluate` and so
on. Like `cli/options.py` it imports nothing heavy."""

import argparse
import os
from pathlib import Path

from tokcom.cli.options import (
    AT_LEAST_ONE,
    CHECKPOINT,
    DEVICE,
    EVALUATION_SECTIONS,
    OPTIONS,
    RANGES,
    check_ranges,
    default_checkpoint,
    port,
    seed,
    shipped_zoo,
)
from tokcom.cli.server_settings import LIMITS, ServerSettings


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
    add("--seed", type=seed, default=0, help="seed; batch b draws from its own, (seed, b)")
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
    add("--seed", type=seed, default=0, help="first seed")
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


# 0 samples or seeds would measure nothing, after a judge was trained for it
EVALUATION_RANGES = {
    **dict.fromkeys(("max_tokens", "samples", "seeds", "length", "steps"), AT_LEAST_ONE),
    **{name: RANGES[name] for name in ("temperature", "top_p", "guidance_scale")},
    "peer_temperature": RANGES["temperature"],
}


def check_evaluate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_ranges(parser, args, EVALUATION_RANGES)


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
    add("--seed", type=seed, default=0, help="of the choice of pictures and of the first centres")


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
