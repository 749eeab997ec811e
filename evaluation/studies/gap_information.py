"""Measure how much the text after a gap says about the gap, under the model that wrote the text.

    python -m tokcom.evaluation.studies.gap_information --teacher stories15M --data held_out.parquet

This bounds what filling from both sides can gain over continuing from the left. By Bayes' rule the
gain of the true author is

    log p(gap | left, right) - log p(gap | left) = log p(right | left, gap) - log p(right | left)

The last term averages p(right | left, gap) over gaps. For one token the average is exact, over all
tokens that the author's top-k and min-p allow. For more tokens the true gap counts with its own
probability, and `--draws` gaps that the author draws stand for all others. Their mean
underestimates log p(right | left), so the gain that is printed is at least the true one.
"""

import argparse
import math

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from tokcom.cli.loading import add_device_option
from tokcom.evaluation.divergence import Teacher, truncate
from tokcom.training.precision import half_precision

LENGTHS = (1, 2, 4)  # tokens of a gap
BEFORE = 64  # tokens of the left side
AFTER = 48  # tokens of the right side
BATCH = 64  # gaps that are scored at once


def next_log_probs(teacher: Teacher, rows: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(N, V)` of the token after `rows (N, T)`, with the author's top-k and
    min-p."""
    with half_precision(rows.device.type):
        # the output matrix on the last state alone: logits of all places would not fit
        states = teacher.model.model(input_ids=rows).last_hidden_state[:, -1]
        logits = teacher.model.lm_head(states).float()
    return truncate(logits, teacher.top_k, teacher.min_p)


@torch.no_grad()
def other_gaps(
    teacher: Teacher, left: torch.Tensor, true: torch.Tensor, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps `(N, length)` after `left (T,)` other than the `true` one `(length,)`, and their
    log-weights `(N,)`."""
    if len(true) == 1:
        log_probs = next_log_probs(teacher, left[None])[0]  # (V,)
        # the true gap is counted on its own
        log_probs[true] = float("-inf")
        allowed = log_probs.isfinite().nonzero()
        return allowed, log_probs[allowed[:, 0]]
    gaps = torch.empty(draws, 0, dtype=torch.long, device=left.device)  # (draws, tokens so far)
    for _ in range(len(true)):
        log_probs = next_log_probs(teacher, torch.cat((left.expand(draws, -1), gaps), dim=1))
        gaps = torch.cat((gaps, log_probs.exp().multinomial(1)), dim=1)
    # draws that hit the true gap are left out, as it counts with its own probability
    others = gaps[(gaps != true).any(dim=1)]
    # each draw stands for a share 1 / draws of the author's probability
    return others, torch.full((len(others),), -math.log(draws), device=left.device)


@torch.no_grad()
def gap_log_prob(teacher: Teacher, left: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """Log-probability of `gap (length,)` after `left (T,)`, with the author's top-k and min-p."""
    total = torch.zeros(())
    for index, token in enumerate(gap):
        known = torch.cat((left, gap[:index]))
        total += next_log_probs(teacher, known[None])[0, token]
    return total


@torch.no_grad()
def right_log_probs(
    teacher: Teacher, left: torch.Tensor, gaps: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Log-probability `(N,)` of `right (R,)` after `left` and each of `gaps (N, length)`."""
    totals = []
    for batch in gaps.split(BATCH):
        rows = len(batch)
        # (n, T + length + R)
        whole = torch.cat((left.expand(rows, -1), batch, right.expand(rows, -1)), dim=1)
        with half_precision(whole.device.type):
            states = teacher.model.model(input_ids=whole).last_hidden_state
            # the states that predict the right side, each from the token before
            logits = teacher.model.lm_head(states[:, -len(right) - 1 : -1]).float()
        targets = right.expand(rows, -1)[..., None]
        totals.append(logits.log_softmax(-1).gather(-1, targets).sum((1, 2)))
    return torch.cat(totals)


def gain(teacher: Teacher, ids: torch.Tensor, start: int, length: int, draws: int) -> float:
    """Nats that the right side says about the gap `ids[start : start + length]`."""
    left = ids[start - BEFORE : start]
    right = ids[start + length : start + length + AFTER]
    true = ids[start : start + length]
    likelihood = right_log_probs(teacher, left, true[None], right)
    others, weights = other_gaps(teacher, left, true, draws)
    joint = [likelihood + gap_log_prob(teacher, left, true)]
    if len(others):
        joint.append(right_log_probs(teacher, left, others, right) + weights)
    # log p(right | left, gap) - log p(right | left)
    return float(likelihood[0] - torch.cat(joint).logsumexp(0))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", required=True, help="causal language model that wrote the text"
    )
    parser.add_argument("--data", required=True, help="parquet file with its text, column `text`")
    numbers = {"texts": 50, "draws": 128, "seed": 0, "top_k": 64}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--min_p", type=float, default=0.02, help="(default: %(default)s)")
    add_device_option(parser)
    args = parser.parse_args(argv)
    teacher = Teacher(args.teacher, args.top_k, args.min_p, device=args.device)
    texts = datasets.load_dataset("parquet", data_files=args.data, split="train")["text"]
    rows = [teacher.tokenizer(text)["input_ids"] for text in texts[: args.texts]]
    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)
    print("gap length | gain of its author, nats per token | standard error")
    for length in LENGTHS:
        found = []
        long_enough = [row for row in rows if len(row) >= BEFORE + length + AFTER]
        for row in tqdm(long_enough, leave=False):
            start = int(generator.integers(BEFORE, len(row) - AFTER - length + 1))
            ids = torch.tensor(row, device=args.device)
            found.append(gain(teacher, ids, start, length, args.draws) / length)
        # one gap a text, so the values are independent
        error = np.std(found) / math.sqrt(len(found))
        print(f"{length} | {np.mean(found):.3f} | {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
