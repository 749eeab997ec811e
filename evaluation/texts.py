"""What measurements of text models share: options and text."""

import argparse

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokcom.cli.loading import add_device_option
from tokcom.evaluation.protocol import held_out_windows
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents, tokenize_documents


def study_parser(doc: str | None, work_dir: str) -> argparse.ArgumentParser:
    """A parser with the options of a study that trains models."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="parquet file with training text")
    parser.add_argument("--validation", required=True, help="parquet file with held-out text")
    parser.add_argument("--checkpoint", default=".", help="tokenizer (default: %(default)s)")
    parser.add_argument("--work_dir", default=work_dir, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def model_study_parser(doc: str | None, prompts: int, steps: str) -> argparse.ArgumentParser:
    """A parser with the options of a study that trains something beside a finished model; `steps`
    is the help of that option."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".", help="default: %(default)s")
    parser.add_argument("--train", required=True, help="parquet file with training text")
    parser.add_argument("--validation", required=True, help="parquet file with held-out text")
    parser.add_argument("--steps", type=int, default=400, help=f"{steps} (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=prompts, help="default: %(default)s")
    parser.add_argument("--output", help="JSON file for the numbers")
    add_device_option(parser)
    return parser


def read_tokens(file: str, tokenizer: PreTrainedTokenizerBase, split: str) -> np.ndarray:
    """Ids `(T,)` of the texts of a file; `split` is `"train"` or `"validation"`."""
    documents = load_documents(file, DataConfig(), split)
    name = "training text" if split == "train" else "held-out text"
    return tokenize_documents(documents, tokenizer, "text", name)


def likelihood_windows(tokens: np.ndarray) -> np.ndarray:
    """The windows `(48, 512)` of held-out `tokens (T,)` whose likelihood the ablations measure."""
    return held_out_windows(tokens, 512, 48)
