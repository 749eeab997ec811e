"""Measure how far a model's text is from its teacher's, in excess nats per character, both ways.

    python -m tokcom.evaluation.divergence --model . --teacher stories15M \
        --data held_out.parquet --output divergence.json

The teacher wrote the training text, so it is an exact reference:

- *Forward*: the model's nats on held-out teacher text, minus those of the distribution that the
  text was sampled from (with its top-k and min-p). High if the model does not expect what the
  teacher writes.
- *Reverse*: the plain teacher's nats on the model's samples, minus the model's own at the
  temperature of the samples. High if the model writes what the teacher would not.

The end of a text counts as one of its tokens. The same code measures an autoregressive peer
(`--peer`, a causal language model with the model's tokenizer), and says how far it is above the
model on the same texts, with a standard error over texts. A teacher does not judge quality;
that needs a judge who wrote none of the text.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.judges import load_language_model, load_peer, logits_of_text
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import text_ids, vocabulary_size
from tokcom.sampling_tokcom import TokComSampling, join_blocks, until_all_ended
from tokcom.tasks_tokcom import TokComTask, num_latents
from tokcom.training.precision import half_precision
from tokcom.training.tokens import load_tokenizer

ROWS = 16  # texts scored at once


def truncate(logits: torch.Tensor, top_k: int, min_p: float) -> torch.Tensor:
    """Log-probabilities `(..., V)` after `top_k` (0 is all) and `min_p`; -inf for tokens that are
    cut."""
    size = logits.shape[-1]
    kept, index = logits.topk(min(top_k or size, size), dim=-1)
    # min-p cuts below a share of the largest probability: a difference of logits
    kept = kept.masked_fill(kept < kept[..., :1] + np.log(min_p), float("-inf"))
    # the softmax over what is kept renormalises it
    return torch.full_like(logits, float("-inf")).scatter(-1, index, kept.log_softmax(-1))


class Teacher:
    """A causal language model that starts a text with BOS and ends it with `end` (EOS or BOS).

    `top_k`, `min_p` and `temperature` are those that its text was sampled with.
    Raises `ValueError` for a model without BOS or `end`.
    """

    def __init__(
        self,
        path: str,
        top_k: int,
        min_p: float,
        end: str = "eos",
        device: str = "cpu",
        temperature: float = 1.0,
    ):
        self.tokenizer = load_tokenizer(path)
        self.model = load_language_model(path, device)
        self.top_k = top_k
        self.min_p = min_p
        self.temperature = temperature
        self.start = self._special_id("bos", path)
        self.end = self._special_id(end, path)

    def _special_id(self, name: str, path: str) -> int:
        found = getattr(self.tokenizer, f"{name}_token_id")
        found = getattr(self.model.config, f"{name}_token_id", None) if found is None else found
        if found is None:
            raise ValueError(
                f"{path} has no {name.upper()} token, so the likelihood of its whole texts is not "
                "known; give a teacher whose texts begin with one and end with EOS or BOS."
            )
        return found

    @torch.no_grad()
    def nats(self, texts: list[str], ended: list[bool], truncated: bool) -> tuple[np.ndarray, int]:
        """Nats of each text `(B,)`, with its end if it has `ended`.

        The plain distribution scores tokens that the `truncated` one does not allow; the second
        result counts them.
        """
        totals = []
        impossible = 0
        for text, has_end in zip(tqdm(texts, desc="teacher", leave=False), ended):
            # the teacher's own tokens: nats are comparable per character only
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = [self.start, *ids, *([self.end] if has_end else [])]
            logits = logits_of_text(self.model, ids)[:-1]  # (T, V)
            targets = torch.tensor(ids[1:], device=logits.device)[:, None]  # (T, 1)
            plain = logits.log_softmax(-1).gather(-1, targets)[:, 0]
            if truncated:
                allowed = truncate(logits / self.temperature, self.top_k, self.min_p)
                cut = allowed.gather(-1, targets)[:, 0]
                # min-p in another precision may cut a token that was sampled
                impossible += int(cut.isinf().sum())
                # an infinity would be the sum of all texts; these are counted instead
                plain = torch.where(cut.isinf(), plain, cut)
            totals.append(-float(plain.sum()))
        return np.array(totals), impossible


@contextlib.contextmanager
def tempered(model, temperature: float) -> Iterator[None]:
    """Make the likelihood of a token model that of its samples at a temperature."""
    head = model.token_head
    nll = head.nll
    bias = head.bias.data

    def tempered_nll(states: torch.Tensor, *args):
        # logits are states @ embeddings + bias: dividing both divides the logits. The bias is also
        # what an unknown token looks like to the network, which no temperature changes.
        head.bias.data = bias / temperature
        try:
            return nll(states / temperature, *args)
        finally:
            head.bias.data = bias

    head.nll = tempered_nll
    try:
        yield
    finally:
        del head.nll


class TokComStudent:
    """A TokCom pipeline whose tokens take turns, with a likelihood and samples."""

    def __init__(self, pipe: TokComPipeline):
        self.pipe = pipe
        self.tokenizer = pipe.tokenizer
        # whose objective has the likelihood of token models
        pipe.model.set_stage("flow")
        pipe.model.eval()

    @torch.no_grad()
    def nats(self, rows: list[list[int]], temperature: float = 1.0) -> np.ndarray:
        """Nats `(B,)` of rows of ids, each a text from its start."""
        totals = []
        with tempered(self.pipe.model, temperature):
            for start in tqdm(range(0, len(rows), ROWS), desc="model", leave=False):
                ids, mask = self.pipe._pad(rows[start : start + ROWS], "right")
                # (B, N, K) summed to nats of a text; padding has no loss
                totals.append(self.pipe.model(ids, mask).token_losses.sum((1, 2)).cpu().numpy())
        return np.concatenate(totals)

    @torch.no_grad()
    def sample(self, count: int, length: int, temperature: float, seed: int) -> list[list[int]]:
        """Ids of unconditional texts, up to and including EOS."""
        pipe = self.pipe
        rows = []
        noise = pipe.prepare_latents(
            count, num_latents(pipe.model.config, length), torch.Generator().manual_seed(seed)
        )
        sampling = TokComSampling(
            temperature=temperature, generator=torch.Generator().manual_seed(seed)
        )
        eos = self.tokenizer.eos_token_id
        blocks = pipe.sample_blocks(TokComTask(noise), sampling)
        # stops when every text has ended, as no later block is scored
        _, ids = join_blocks(until_all_ended(blocks, eos, [0] * count), noise)
        for row in ids[:, :length].tolist():
            rows.append(row[: row.index(eos) + 1] if eos in row else row)
        return rows


class AutoregressiveStudent:
    """A causal language model with TokCom's tokenizer; a text begins after EOS."""

    def __init__(self, path: str, tokenizer, device: str = "cpu"):
        self.model = load_peer(path, tokenizer, device)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def nats(self, rows: list[list[int]], temperature: float = 1.0) -> np.ndarray:
        totals = []
        device = self.model.device
        for row in tqdm(rows, desc="peer", leave=False):
            # EOS in front, as in training, gives the first token a prediction
            whole = torch.tensor([[self.tokenizer.eos_token_id, *row]], device=device)
            with half_precision(device.type):
                logits = self.model(input_ids=whole).logits[0, :-1]  # (T, V)
            totals.append(
                float(F.cross_entropy(logits.float() / temperature, whole[0, 1:], reduction="sum"))
            )
        return np.array(totals)

    @torch.no_grad()
    def sample(self, count: int, length: int, temperature: float, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        eos = self.tokenizer.eos_token_id
        start = torch.full((count, 1), eos, device=self.model.device)  # (B, 1)
        self.model.generation_config.eos_token_id = eos
        # top_k 0: transformers would keep the likeliest 50 by default
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "pad_token_id": eos}
        ids = self.model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=length, **settings
        )
        rows = []
        for row in ids[:, 1:].tolist():
            rows.append(row[: row.index(eos) + 1] if eos in row else row)
        return rows


def difference(
    first: np.ndarray, second: np.ndarray, characters: np.ndarray
) -> tuple[float, float]:
    """How many nats per character the `second` student is above the `first`, and the standard
    error, from the nats of both on each text `(B,)` (a ratio of means over texts)."""
    above = second - first
    mean = above.sum() / characters.sum()
    deviations = above - mean * characters
    error = np.sqrt(len(above) / (len(above) - 1) * (deviations**2).sum()) / characters.sum()
    return float(mean), float(error)


def measure(
    student, teacher: Teacher, texts: list[str], args: argparse.Namespace
) -> tuple[dict, np.ndarray]:
    """Excess nats per character of a student: forward on held-out `texts`, reverse on its own
    samples. The second result is its nats on each text."""
    tokenizer = student.tokenizer
    eos = tokenizer.eos_token_id
    size = vocabulary_size(tokenizer)
    # per character, since the two models have different tokens
    characters = sum(map(len, texts))
    on_texts = student.nats([[*text_ids(tokenizer, text), eos] for text in texts])
    reference, impossible = teacher.nats(texts, [True] * len(texts), truncated=True)
    plain, _ = teacher.nats(texts, [True] * len(texts), truncated=False)
    facts = {
        # sums over sums: the mean over characters, not the mean of the means of texts
        "forward": float(on_texts.sum() - reference.sum()) / characters,
        "forward_over_plain_teacher": float(on_texts.sum() - plain.sum()) / characters,
        "nats_per_character": float(on_texts.sum()) / characters,
        "teacher_nats_per_character": float(reference.sum()) / characters,
        "teacher_tokens_not_allowed": impossible,
    }
    for temperature in args.temperatures:
        began = time.perf_counter()
        rows = student.sample(args.samples, args.length, temperature, args.seed)
        seconds = time.perf_counter() - began
        ended = [row[-1] == eos for row in rows]
        # without the pad token, which the teacher does not know
        written = [tokenizer.decode([i for i in row if i != eos and i < size]) for row in rows]
        count = sum(map(len, written))
        # under the distribution that the samples were drawn from, or the difference is no
        # divergence
        own = student.nats(rows, temperature)
        reference, _ = teacher.nats(written, ended, truncated=False)
        # an estimate of the KL divergence from the samples' distribution to the teacher
        facts[f"reverse_at_{temperature:g}"] = float(reference.sum() - own.sum()) / count
        facts[f"samples_at_{temperature:g}"] = {
            "characters": count,
            "ended": float(np.mean(ended)),
            "characters_per_second": count / seconds,
            "own_nats_per_character": float(own.sum()) / count,
            "teacher_nats_per_character": float(reference.sum()) / count,
            "first": written[:3],
        }
    return facts, on_texts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=".", help="TokCom model directory or Hub id (default: %(default)s)"
    )
    parser.add_argument("--peer", help="autoregressive model with the same tokenizer")
    parser.add_argument(
        "--teacher", required=True, help="causal language model that wrote the training text"
    )
    parser.add_argument(
        "--teacher_end", choices=("eos", "bos"), default="eos", help="token that ends its texts"
    )
    parser.add_argument(
        "--top_k", type=int, default=64, help="of the sampling of its text (default: %(default)s)"
    )
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.02,
        help="of the sampling of its text (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of the sampling of its text (default: %(default)s)",
    )
    parser.add_argument(
        "--data", required=True, help="parquet file with held-out teacher text in a column `text`"
    )
    parser.add_argument(
        "--texts",
        type=int,
        default=300,
        help="held-out texts that are scored (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=200, help="texts of each system (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=320, help="tokens of a sample at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[1.0, 0.7],
        help="of the samples (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    add_device_option(parser)
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    pipe = TokComPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    texts = datasets.load_dataset("parquet", data_files=args.data, split="train")["text"][
        : args.texts
    ]
    longest = pipe.max_length - 1  # and EOS
    kept = [text for text in texts if len(text_ids(pipe.tokenizer, text)) <= longest]
    how = args.top_k, args.min_p, args.teacher_end, args.device, args.temperature
    teacher = Teacher(args.teacher, *how)
    students = {"tokcom": TokComStudent(pipe)}
    if args.peer:
        students["peer"] = AutoregressiveStudent(args.peer, pipe.tokenizer, args.device)
    results = {
        "settings": vars(args) | {"output": str(args.output)},
        "texts": len(kept),
        "too_long": len(texts) - len(kept),
    }
    nats = {}
    for name, student in students.items():
        results[name], nats[name] = measure(student, teacher, kept, args)
        if name == "peer":
            mean, error = difference(nats["tokcom"], nats["peer"], np.array([*map(len, kept)]))
            results[name] |= {"above_tokcom": mean, "standard_error_of_above_tokcom": error}
        print(name, json.dumps(results[name], indent=2, ensure_ascii=False))
        if args.output:
            args.output.write_text(
                json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main()
