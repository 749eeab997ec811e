"""Measure what a model gains from the text after a gap: the likelihood of the true filling given
both sides, and given the left side.

    python -m tokcom.evaluation.studies.infilling --model . --data held_out.parquet

Gaps of several lengths are cut out of held-out texts, at any place in a chunk. The same tokens are
scored twice: as a gap with all other tokens known, and as a continuation of the text before them.
"""

import argparse

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import text_ids

LENGTHS = (1, 2, 4, 8, 16)  # tokens of a gap
BEFORE = 16  # least number of tokens before a gap
AFTER = 24  # least number of tokens after it


@torch.no_grad()
def gap_nats(model, ids: list[int], start: int, stop: int) -> tuple[float, float]:
    """Nats of the tokens from `start` to `stop` given both sides, and given the left side alone."""
    size = model.config.codec_config.chunk_size
    padding = -len(ids) % size
    whole = torch.tensor([ids + [0] * padding], device=model.device)  # (1, T)
    real = torch.ones_like(whole)
    real[0, len(ids) :] = 0
    known = real.clone()
    known[0, start:stop] = 0
    # padding after the text is not a gap
    known = torch.where(real.bool(), known, 1)
    both = model.objective.loss(model, whole, real, known_mask=known, fills_gaps=True)
    left = model.objective.loss(model, whole, real)
    return tuple(float(output.token_losses.flatten()[start:stop].sum()) for output in (both, left))


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=".", help="TokCom model directory or Hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--data", required=True, help="parquet file with held-out text in a column `text`"
    )
    parser.add_argument(
        "--texts", type=int, default=200, help="texts that are used (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the places of the gaps (default: %(default)s)"
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    pipe = TokComPipeline.from_pretrained(args.model).to(args.device)
    model = pipe.model.eval()
    if not model.config.transformer_config.start_latents:
        raise SystemExit(
            f"{args.model} was trained without `start_latents`, so its gaps only see their left "
            "side; give a model that has them."
        )
    texts = datasets.load_dataset("parquet", data_files=args.data, split="train")["text"][
        : args.texts
    ]
    rows = [text_ids(pipe.tokenizer, text)[: pipe.max_length] for text in texts]
    generator = np.random.default_rng(args.seed)
    print("gap length | both sides | left side | gain, nats per token")
    for length in LENGTHS:
        totals = np.zeros(2)
        count = 0
        for ids in tqdm([row for row in rows if len(row) >= BEFORE + length + AFTER], leave=False):
            start = int(generator.integers(BEFORE, len(ids) - AFTER - length + 1))
            totals += gap_nats(model, ids, start, start + length)
            count += length
        both, left = totals / max(1, count)
        print(f"{length} | {both:.3f} | {left:.3f} | {left - both:.3f}", flush=True)


if __name__ == "__main__":
    main()
