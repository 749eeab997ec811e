"""Measure the defects of text models that version 0.2 fixed, in one checkout.

    python scripts/text_defects.py MODEL --data held_out.parquet --judge stories15M [--codec CODEC]

To compare with an old checkout, run it there too: `cd OLD && python NEW/scripts/text_defects.py
...`. It prints the nats of one text at every alignment of its chunks, the filling of one gap before
three endings, whether a shorter length gives the beginning of a text, a judge's score of texts at
two shifts of the scheduler, and how many strings survive the codec: random ones, and with
`--passages` as many passages of real text that hold characters beyond ASCII.
"""

import argparse
import itertools
import os
import sys

import datasets
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# the modules of the checkout that it is run in, not of the one that holds this file
sys.path.insert(0, os.getcwd())
try:  # version 0.1 was not a package
    from evaluation.judges import TextJudge
    from evaluation.reconstruction import token_losses_at
    from pipeline_tokcom import TokComPipeline

    # old models may begin chunks anywhere, new ones at the text alone
    ALIGNMENTS = (0, 1, 2, 3)
except ImportError:
    from tokcom.evaluation.judges import TextJudge
    from tokcom.evaluation.reconstruction import token_losses_at
    from tokcom.pipeline_tokcom import TokComPipeline

    ALIGNMENTS = (0,)

ENDINGS = (
    " who lived in a big wood.",
    " that had no door and no window.",
    ", and the king was angry.",
)
TEXT = "“Do you know Zürich?” – he said… “No,” I said — naïve. 😀\u00a0x\r\n"
PROMPT = "Once upon a time"
CONTEXT = 64  # tokens before those that are scored
SCORED = 60  # tokens


def random_string(generator: np.random.Generator) -> str:
    """Up to 60 characters from all planes of Unicode, half of them from its first blocks."""
    length = int(generator.integers(1, 60))
    points = np.where(
        generator.random(length) < 0.5,
        generator.integers(1, 0x3000, size=length),
        generator.integers(1, 0x110000, size=length),
    )
    # surrogates are no characters
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@torch.no_grad()
def nats_at(pipe: TokComPipeline, ids: torch.Tensor, padding: int) -> float:
    """Nats per token of `SCORED` tokens after `CONTEXT` tokens, if chunks begin `padding` tokens
    before the text."""
    shifted = torch.cat((torch.zeros(len(ids), padding, dtype=torch.long), ids), dim=1)
    shifted = shifted[:, : ids.shape[1]]  # (B, T): the end is lost instead
    mask = torch.ones_like(shifted)
    mask[:, :padding] = 0
    losses = token_losses_at(pipe.model, shifted, 0.0, mask).flatten(1)
    # the same tokens at every alignment
    return losses[:, CONTEXT + padding : CONTEXT + padding + SCORED].mean().item()


@torch.no_grad()
def survives(pipe: TokComPipeline, text: str) -> tuple[bool, str]:
    """Whether the codec returns the ids of a text, and the text that it returns."""
    ids = pipe.tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids)
    # filled up to whole chunks
    whole = torch.tensor([ids + [0] * (-count % pipe.chunk_size)])
    mask = torch.zeros_like(whole)
    mask[0, :count] = 1
    found = pipe.model.to_ids(pipe.model.encode(whole, mask).latents)[0, :count]
    return bool((found == whole[0, :count]).all()), pipe.tokenizer.decode(found)


def passages_beyond_ascii(texts: list[str], count: int, length: int = 300) -> list[str]:
    """The first `count` passages of up to `length` characters that hold a character beyond
    ASCII."""
    pieces = (text[at : at + length] for text in texts for at in range(0, len(text), length))
    return list(itertools.islice((piece for piece in pieces if not piece.isascii()), count))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory of a text model whose tokens take turns")
    parser.add_argument(
        "--data", required=True, help="parquet file with held-out text in a column `text`"
    )
    parser.add_argument("--judge", required=True, help="causal language model that scores samples")
    parser.add_argument("--codec", help="another model whose codec is tried with random strings")
    parser.add_argument(
        "--passages", help="parquet file with a column `text` full of quotes, dashes and accents"
    )
    args = parser.parse_args()
    # both checkouts alike, whatever their defaults
    torch.set_num_threads(1)
    pipe = TokComPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.model.eval().set_stage("flow")

    def seed(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    texts = datasets.load_dataset("parquet", data_files=args.data, split="train")["text"][:40]
    rows = [pipe.tokenizer(text, add_special_tokens=False)["input_ids"][:128] for text in texts]
    ids = torch.tensor([row for row in rows if len(row) == 128])
    for padding in ALIGNMENTS:
        nats = nats_at(pipe, ids, padding)
        print(f"chunks begin {padding} tokens before the text: {nats:.3f} nats per token")
    for ending in ENDINGS:
        filled = pipe.infill(
            f"{PROMPT} there was a ____{ending}", gap_length=4, generator=seed(0)
        ).texts[0]
        print(f"filled: {filled!r}")
    long, short = (
        pipe(PROMPT, gen_length=n, generator=seed(0), output_type="seq").sequences[0]
        for n in (40, 12)
    )
    print(f"gen_length 12 is the beginning of gen_length 40: {bool((long[:12] == short).all())}")
    judge = TextJudge(args.judge)
    # no shift, and the one that training's times imply for the shipped model
    for shift in (1.0, 1.82):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        written = [
            pipe(PROMPT, gen_length=64, temperature=0.7, generator=seed(i)).texts[0]
            for i in range(40)
        ]
        # NaN is an empty text
        nats = np.nanmean(judge.nats_per_character(written, [PROMPT] * len(written)))
        print(f"stock scheduler, shift {shift}: {nats:.3f} nats per character of the judge")
    codec = TokComPipeline.from_pretrained(args.codec) if args.codec else pipe
    generator = np.random.default_rng(1)
    exact = sum(survives(codec, random_string(generator))[0] for _ in range(1000))
    print(f"random Unicode strings that survive: {exact} of 1000")
    if args.passages:
        texts = datasets.load_dataset("parquet", data_files=args.passages, split="train")["text"]
        passages = passages_beyond_ascii(texts, 1000)
        exact = sum(survives(codec, passage)[0] for passage in passages)
        print(f"passages beyond ASCII that survive: {exact} of {len(passages)}")
    print(f"{TEXT!r} becomes {survives(codec, TEXT)[1]!r}")


if __name__ == "__main__":
    main()
