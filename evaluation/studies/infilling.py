"""Measure what a model gains from the text after a gap: the likelihood of the true filling given
both sides, and given the left side.

    python -m tokcom.evaluation.studies.infilling --model . --data held_out.parquet

Gaps of several lengths are cut out of held-out texts, at any place in a chunk. The same tokens are
scored twice: as a gap with all other tokens known, and as a continuation of the text before them.

With `--candidates 16` the gaps are filled, too. *Exact* is the share of the fillings that are the
true one, of single draws and of the likeliest of so many. *Resampled* are the nats of the true
filling if one of so many is chosen in proportion to how much likelier the whole text is from left to
right than the filling from both sides (sampling and importance resampling): the more candidates, the
nearer is the model to what its own reading from left to right says of the gap, by Bayes' rule.
"""

import argparse

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import likeliest, text_ids
from tokcom.sampling_tokcom import TokComSampling, spawn_generators

LENGTHS = (1, 2, 4, 8, 16)  # tokens of a gap
BEFORE = 16  # least number of tokens before a gap
AFTER = 24  # least number of tokens after it


@torch.no_grad()
def token_nats(model, rows: list[list[int]], start: int, stop: int) -> tuple[torch.Tensor, ...]:
    """Nats `(B, T)` of the tokens of `rows`, which have one length: of those from `start` to `stop`
    given both sides, the others 0, and of all tokens given those before them."""
    size = model.config.codec_config.chunk_size
    count = len(rows[0])
    padding = -count % size
    whole = torch.tensor([row + [0] * padding for row in rows], device=model.device)  # (B, T)
    real = torch.ones_like(whole)
    real[:, count:] = 0
    known = real.clone()
    known[:, start:stop] = 0
    both = model.objective.loss(model, whole, real, known_mask=known, fills_gaps=True)
    left = model.objective.loss(model, whole, real)
    return tuple(output.token_losses.flatten(1)[:, :count] for output in (both, left))


def gap_nats(model, ids: list[int], start: int, stop: int) -> tuple[float, float]:
    """Nats of the tokens from `start` to `stop` given both sides, and given the left side alone."""
    return tuple(float(nats[0, start:stop].sum()) for nats in token_nats(model, [ids], start, stop))


def draw_fillings(
    pipe: TokComPipeline, ids: list[int], start: int, stop: int, count: int, seed: int, **settings
) -> list[list[int]]:
    """`ids` with its gap filled `count` times."""
    known = [not start <= place < stop for place in range(len(ids))]
    sources = spawn_generators(torch.Generator().manual_seed(seed), count)
    return pipe.fill_ids(ids, known, TokComSampling(generator=sources, **settings))[0]


@torch.no_grad()
def resampled_nats(
    pipe: TokComPipeline, ids: list[int], start: int, stop: int, count: int, seed: int
) -> float:
    """Nats of the true filling if one of `count` is chosen in proportion to p / q: the text's
    likelihood from left to right over the filling's from both sides.

    The true filling x is chosen with probability q(x) E[count w(x) / (w(x) + the others' w)], whose
    mean is taken over one set of others, so that the nats are too high on average.
    """
    others = []
    if count > 1:
        exact = {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 1.0}  # as q is scored
        others = draw_fillings(pipe, ids, start, stop, count - 1, seed, **exact)
    both, left = token_nats(pipe.model, [ids, *others], start, stop)
    log_q = -both[:, start:stop].double().sum(1)
    log_p = -left[:, start:].double().sum(1)  # what stands before the gap is the same in all
    share = (log_p - log_q).log_softmax(0)[0]
    return float(-(log_q[0] + share + np.log(count)))


@torch.no_grad()
def exact_fillings(
    pipe: TokComPipeline, ids: list[int], start: int, stop: int, count: int, seed: int
) -> tuple[float, float]:
    """Share of `count` fillings that are the true one, and whether the likeliest of them is."""
    drawn = draw_fillings(pipe, ids, start, stop, count, seed)
    scores = pipe.score([pipe.tokenizer.decode(filled) for filled in drawn])
    right = [filled[start:stop] == ids[start:stop] for filled in drawn]
    return float(np.mean(right)), float(right[likeliest(scores)])


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
    parser.add_argument(
        "--candidates", type=int, default=0, help="fillings to choose from (default: none)"
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
    pipe.set_progress_bar_config(disable=True)
    heading = "gap length | both sides | left side | gain, nats per token | its standard error"
    if args.candidates:
        heading += (
            f" | exact, one draw | exact, likeliest of {args.candidates} | its standard error"
            " | resampled | gain, resampled | its standard error"
        )
    print(heading)
    for length in LENGTHS:
        gaps = []
        exact = []
        resampled = []
        for ids in tqdm([row for row in rows if len(row) >= BEFORE + length + AFTER], leave=False):
            start = int(generator.integers(BEFORE, len(ids) - AFTER - length + 1))
            stop = start + length
            gaps.append(gap_nats(model, ids, start, stop))
            if args.candidates:
                options = (pipe, ids, start, stop, args.candidates, len(gaps))
                exact.append(exact_fillings(*options))
                resampled.append(resampled_nats(*options))
        nats = np.array(gaps).reshape(-1, 2) / length
        both, left = nats.mean(axis=0)
        error = (nats[:, 1] - nats[:, 0]).std() / np.sqrt(len(nats))
        line = f"{length} | {both:.3f} | {left:.3f} | {left - both:.3f} | {error:.3f}"
        if exact:
            one, best = np.mean(exact, axis=0)
            error = np.std(np.array(exact)[:, 1]) / np.sqrt(len(exact))
            line += f" | {one:.3f} | {best:.3f} | {error:.3f}"
            gain = nats[:, 1] - np.array(resampled) / length
            error = gain.std() / np.sqrt(len(gain))
            line += f" | {left - gain.mean():.3f} | {gain.mean():.3f} | {error:.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
