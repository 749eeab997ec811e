"""Measure how much the text after a gap says about the gap: to the model that wrote the text, which
is what an ideal reader of it gains, and to a TokCom model.

    python -m tokcom.evaluation.studies.gap_information --model . --teacher stories15M \
        --data held_out.parquet

By Bayes' rule the gain of the author is

    log p(gap | left, right) - log p(gap | left) = log p(right | left, gap) - log p(right | left)

The last term averages p(right | left, gap) over all gaps. The author's top-k and min-p leave few
choices for the last token of a gap, so that the average over this token is exact. Gaps of one token
of the author need no more. In longer ones the tokens before the last are the true ones or one of
`--draws` beginnings that the author draws:

- *most*: the true beginning counts with its own probability, and the draws stand for all others.
  This estimate of p(right | left) has no bias, so its logarithm is too low on average and the gain
  too high.
- *least*: the true beginning is one more draw. It is a draw given both sides, so the estimate is
  too high on average and the gain too low (as in InfoNCE, https://arxiv.org/abs/1807.03748).

The author's cuts may give a gap away: a filling that makes one of the next 32 tokens fall below
min-p is impossible, however small its influence, and only the author knows its logits so exactly.
*plain* is the gain of a reader who knows the author's model but not its cuts after the gap.

The two tokenizers differ. Gaps have whole tokens of both, and all numbers are per token of TokCom.
A model that knows less of the left side than the author may gain more than the author does.
"""

import argparse
import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.divergence import Teacher
from tokcom.evaluation.parts import Parts, fingerprint
from tokcom.evaluation.studies.infilling import AFTER, BEFORE, gap_nats
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import text_ids

RIGHT = 32  # tokens of the author after a gap
HOPELESS = 12.0  # a filling so many nats behind the true one does not count


@dataclass
class Gain:
    """What the right side says to the author about one gap, in nats."""

    left: float  # nats of the gap given the left side
    least: float
    most: float
    least_plain: float  # without top-k and min-p on the right side
    most_plain: float


def truncated(teacher: Teacher, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `(..., k)` after top-k and min-p, -inf for what min-p cuts, and their
    tokens."""
    kept, tokens = logits.topk(min(teacher.top_k, logits.shape[-1]), dim=-1)
    kept = kept.masked_fill(kept < kept[..., :1] + math.log(teacher.min_p), float("-inf"))
    return kept.log_softmax(-1), tokens


def read(teacher: Teacher, rows: torch.Tensor, cache: DynamicCache, last: int = 0):
    """`truncated` of what follows each token of `rows (N, T)`, or only the `last` ones. The cache
    grows by the rows."""
    output = teacher.model(input_ids=rows, past_key_values=cache, logits_to_keep=last)
    return truncated(teacher, output.logits)


def log_probs_of(targets: torch.Tensor, log_probs: torch.Tensor, tokens: torch.Tensor):
    """Log-probabilities `(N, T)` of `targets (N, T)` among the `tokens` of `read`."""
    found = tokens == targets[..., None]
    return log_probs.masked_fill(~found, float("-inf")).amax(-1)


def branch(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a cache of one row, for this number of rows."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


def draw(teacher: Teacher, last: torch.Tensor, cache: DynamicCache, shape: tuple[int, int]):
    """The token `last (1,)` and T tokens after it that the author draws, `shape (M, T)`, after what
    the `cache` has read."""
    rows = last.expand(shape[0], 1)
    cache = branch(cache, shape[0])
    drawn = [rows]
    for _ in range(shape[1]):
        log_probs, tokens = read(teacher, rows, cache)
        rows = tokens[:, 0].gather(1, log_probs[:, 0].exp().multinomial(1))
        drawn.append(rows)
    return torch.cat(drawn, dim=1)


def right_log_probs(
    teacher: Teacher, last: torch.Tensor, right: torch.Tensor, cache: DynamicCache, true: int
) -> torch.Tensor:
    """Log-probabilities `(N, 2)` of `right (R,)` after the tokens `last (N,)` of gaps that follow
    what the `cache` has read: with top-k and min-p, and without.

    A row that falls `HOPELESS` nats behind the row `true` is not read any further.
    """
    totals = torch.full((len(last), 2), float("-inf"), device=last.device)
    alive = torch.arange(len(last), device=last.device)
    rows = torch.cat((last[:, None], right.expand(len(last), -1)), dim=1)
    scores = torch.zeros(len(last), 2, device=last.device)
    start = 0
    stride = 1
    while start < len(right):
        # most fillings fall behind within a few tokens, so the strides begin short
        stop = min(start + stride, len(right))
        targets = rows[:, start + 1 : stop + 1]
        logits = teacher.model(input_ids=rows[:, start:stop], past_key_values=cache).logits
        cut = log_probs_of(targets, *truncated(teacher, logits))
        plain = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        scores = scores + torch.stack((cut.sum(1), plain.sum(1)), dim=1)
        behind = scores[alive == true] - scores
        hopeful = (behind[:, 1] < HOPELESS).nonzero()[:, 0]
        scores = scores[hopeful]
        alive = alive[hopeful]
        rows = rows[hopeful]
        cache.batch_select_indices(hopeful)
        start = stop
        stride *= 2
    totals[alive] = scores
    return totals


@torch.no_grad()
def gain(teacher: Teacher, ids: torch.Tensor, start: int, stop: int, draws: int) -> Gain | None:
    """What the tokens from `stop` on say about the gap `ids[start:stop]`.

    None if the author's top-k and min-p do not allow one of the true tokens.
    """
    # the last token of the left side is read with each beginning: it predicts the first of the gap
    cache = DynamicCache(config=teacher.model.config)
    if start > 1:
        teacher.model.model(input_ids=ids[None, : start - 1], past_key_values=cache)
    right = ids[stop : stop + RIGHT]
    # beginnings (., stop - start) are the last token of the left side and all but one of the gap
    true = ids[start - 1 : stop - 1]
    if len(true) == 1:
        draws = 1  # they are all the same
    drawn = draw(teacher, true[:1], cache, (draws, len(true) - 1))
    heads, of_draw = torch.cat((true[None], drawn)).unique(dim=0, return_inverse=True)
    true_head = of_draw[0]
    counts = of_draw[1:].bincount(minlength=len(heads))

    log_probs, tokens = read(teacher, true[None], branch(cache, 1))
    head_log_prob = log_probs_of(true[None, 1:], log_probs[:, :-1], tokens[:, :-1]).sum()
    cache = branch(cache, len(heads))
    log_probs, tokens = read(teacher, heads, cache, last=1)
    head, choice = log_probs[:, -1].isfinite().nonzero(as_tuple=True)
    last_tokens = tokens[head, -1, choice]
    weights = log_probs[head, -1, choice]
    is_true = (head == true_head) & (last_tokens == ids[stop - 1])
    if not is_true.any():
        return None
    cache.batch_select_indices(head)
    rights = right_log_probs(teacher, last_tokens, right, cache, int(is_true.nonzero()))
    if not (rights[is_true] + head_log_prob).isfinite().all():
        return None
    # p(right | left, beginning) / p(right | left, true gap), with top-k and min-p and without
    ratios = torch.zeros(len(heads), 2, dtype=torch.float64, device=ids.device)
    ratios.index_add_(0, head, (weights[:, None] + rights - rights[is_true]).double().exp())
    others = counts.double() @ ratios - counts[true_head] * ratios[true_head]
    unbiased = head_log_prob.double().exp() * ratios[true_head] + others / draws
    with_true = (ratios[true_head] * (1 + counts[true_head]) + others) / (draws + 1)
    least, least_plain = (-with_true.log()).tolist()
    most, most_plain = (-unbiased.log()).tolist()
    return Gain(-float(head_log_prob + weights[is_true]), least, most, least_plain, most_plain)


def boundaries(tokenizer, text: str) -> dict[int, int]:
    """Number of tokens before each place of a text, in characters, where a token ends and the next
    begins."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    places = {}
    for index in range(1, len(offsets)):
        # the bytes of one character overlap
        if offsets[index - 1][1] == offsets[index][0]:
            places[offsets[index][0]] = index
    return places


def places_of_gaps(
    pipe: TokComPipeline, teacher: Teacher, text: str, length: int
) -> list[tuple[int, ...]]:
    """Starts and ends of gaps of `length` tokens of TokCom: in its own tokens and in the
    author's."""
    own = boundaries(pipe.tokenizer, text)
    author = {
        own[place]: index
        for place, index in boundaries(teacher.tokenizer, text).items()
        if place in own
    }
    size = len(text_ids(pipe.tokenizer, text))
    if size > pipe.max_length:
        return []
    last = size - AFTER - length
    return [
        (start, start + length, author[start], author[start + length])
        for start in range(BEFORE, last + 1)
        if start in author and start + length in author
    ]


def measure(
    pipe: TokComPipeline, teacher: Teacher, text: str, length: int, draws: int, seed: list[int]
) -> dict[str, float] | None:
    """Nats of one gap; None if the text has no place for it or the author could not write it."""
    places = places_of_gaps(pipe, teacher, text, length)
    if not places:
        return None
    start, stop, author_start, author_stop = np.random.default_rng(seed).choice(places).tolist()
    torch.manual_seed(seed[-1])
    ids = torch.tensor(teacher.tokenizer(text)["input_ids"], device=pipe.model.device)
    # the author has read BOS
    found = gain(teacher, ids, 1 + author_start, 1 + author_stop, draws)
    if found is None:
        return None
    both, left = gap_nats(pipe.model, text_ids(pipe.tokenizer, text), start, stop)
    return asdict(found) | {"model_left": left, "model_gain": left - both}


def report(length: int, gaps: list[dict[str, float]]) -> str:
    """A row of the table, nats per token of TokCom; standard errors in brackets."""
    cells = []
    for name in gaps[0]:
        values = np.array([gap[name] for gap in gaps]) / length
        cells.append(f"{values.mean():.3f} ({values.std() / math.sqrt(len(values)):.3f})")
    return f"| {length} | {len(gaps)} | " + " | ".join(cells) + " |"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=".", help="TokCom model directory or Hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher", required=True, help="causal language model that wrote the text"
    )
    parser.add_argument("--data", required=True, help="parquet file with its text, column `text`")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="tokens of the gaps (default: %(default)s)",
    )
    numbers = {"texts": 100, "draws": 64, "seed": 0, "top_k": 64}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.018,
        help="of the sampling of the text, a little lower for what rounding let through "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gap_information.json"),
        help="JSON file of the gaps; a run that was stopped goes on (default: %(default)s)",
    )
    add_device_option(parser)
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    pipe = TokComPipeline.from_pretrained(args.model).to(args.device)
    pipe.model.eval()
    teacher = Teacher(args.teacher, args.top_k, args.min_p, device=args.device)
    settings = {name: getattr(args, name) for name in ("data", "draws", "seed", "top_k", "min_p")}
    settings["model"] = fingerprint(pipe.model)
    parts = Parts(args.output, settings)
    texts = datasets.load_dataset("parquet", data_files=args.data, split="train")["text"]
    print(
        "| gap | gaps | author, left side | its gain, least | most | model, left side | its gain |"
    )
    for length in args.lengths:
        gaps = []
        for index, text in enumerate(tqdm(texts[: args.texts], leave=False)):
            values = (text, length, args.draws, [args.seed, length, index])
            gap = parts.measure(
                f"{length} of text {index}", lambda values=values: measure(pipe, teacher, *values)
            )
            if gap is not None:
                gaps.append(gap)
        if gaps:
            print(report(length, gaps), flush=True)


if __name__ == "__main__":
    main()
