"""Students that draw several tokens of a chunk in one step, by reading the numbers that decide them.

    python -m tokcom.evaluation.studies.joint_steps --model . --train stories.parquet \\
        --validation held_out.parquet --judge judge --tokens_per_step 2

Tokens that are drawn together and independently do not fit each other. Here a token is a function of
its distribution and a uniform number u, so whoever knows u of the token before knows, in principle,
that token. The student, a copy of the denoising layers, reads these numbers in the place of tokens
that are not decided yet (parallel token prediction, Draxler et al. 2025). Its teacher takes turns:
for a token of real text, u is drawn from the interval that gives this token under the teacher's
distribution. The first token of a step is always the teacher's.

Three ways of sampling are measured: *turns*; *joint*, where what the student says stands; and
*checked*, where the teacher goes over it in the next step and the first token that it would have
drawn otherwise, with the same u, is replaced: these are exactly the samples of turns.

Shape legend: B batch, N latents, Q = 1 latent of a block, K tokens per chunk, R rows, D width, E
embedding, V vocabulary.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.judges import TokenJudge
from tokcom.evaluation.metrics import sample_entropy
from tokcom.evaluation.protocol import CONTINUATION, PROMPT, held_out_windows
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import TokComSampler
from tokcom.evaluation.studies.masked import MaskedSampler, uniform_numbers
from tokcom.evaluation.texts import read_tokens
from tokcom.heads_tokcom import draw_ids
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.data import PackedDataset, WindowShape
from tokcom.training.optimizer import build_optimizer, build_schedule
from tokcom.training.precision import half_precision
from tokcom.transformer_tokcom import read_text

WAVES = 6  # frequencies with which a uniform number is read
MODES = ("turns", "joint", "checked")


# ---- tokens as functions of a number ----


def draw_ranked(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Ids `(...)` drawn from `probabilities (..., V)` with `uniform (...)`; small numbers draw the
    likeliest, so that a number says most where distributions differ."""
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, draw_ids(ranked, uniform)[..., None])[..., 0]


def number_of(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Numbers `(...)`, uniform in what `draw_ranked` turns into `ids (...)`."""
    own = probabilities.gather(-1, ids[..., None])  # (..., 1)
    places = torch.arange(probabilities.shape[-1], device=ids.device)
    # equals stand in the order of their ids
    before = (probabilities > own) | ((probabilities == own) & (places < ids[..., None]))
    below = (probabilities * before).sum(-1)
    return (below + torch.rand_like(below) * own[..., 0]).clamp(0, 1)


class NumberReader(nn.Module):
    """Uniform numbers `(..., K)`, of which `shown (..., K)` are known -> `(..., D)`; 0 at first."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(count * (2 * WAVES + 3), width)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, numbers: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        angles = torch.pi * numbers[..., None] * 2.0 ** torch.arange(WAVES, device=numbers.device)
        # how rare a token is, which most of the interval is not about
        rare = -(1 - numbers).clamp_min(1e-4).log()[..., None]
        known = torch.ones_like(rare)
        features = torch.cat((angles.sin(), angles.cos(), numbers[..., None], rare, known), dim=-1)
        features = features * shown[..., None]
        return self.linear_2(F.silu(self.linear_1(features.flatten(-2)))) * shown.any(-1)[..., None]


# ---- the student ----


def later_places(tokens_per_step: int, size: int) -> list[tuple[int, int]]:
    """How many tokens are known, and the place that the student draws; the first unknown place is
    the teacher's."""
    return [
        (start, place)
        for start in range(0, size, tokens_per_step)
        for place in range(start + 1, min(start + tokens_per_step, size))
    ]


class Student(nn.Module):
    """A copy of the denoising layers that also reads numbers; the context is the teacher's."""

    def __init__(self, teacher: TokComModel):
        super().__init__()
        self.transformer = copy.deepcopy(teacher.transformer).requires_grad_(False)
        config = self.transformer.config
        for part in self.trained_parts():
            part.requires_grad_()
        self.reader = NumberReader(teacher.token_head.num_symbols, config.hidden_size)

    def trained_parts(self) -> list[nn.Module]:
        transformer = self.transformer
        denoising = transformer.layers[transformer.config.num_context_layers :]
        return [*denoising, transformer.norm, transformer.proj_out]


def expected(transformer, head, symbols, chunks, count: int, entry) -> torch.Tensor:
    """What a network expects `(1, R, K * E)` of chunks `(R, K)` whose first `count` tokens are
    known, given `entry (1, R, D)`."""
    times = (torch.arange(head.num_symbols, device=chunks.device) < count).float()
    times = times.expand(1, *chunks.shape)  # (1, R, K)
    now = torch.full(chunks.shape[:1], count / head.num_symbols, device=chunks.device)[None]
    features = head.read(symbols, None, times, chunks[None])
    latents = entry.new_zeros(1, len(chunks), transformer.config.latent_channels)
    return transformer(latents, now, features=features, entry=entry).latents


@torch.no_grad()
def teacher_numbers(model: TokComModel, symbols, chunks, before) -> tuple[torch.Tensor, float]:
    """Numbers `(R, K)` with which the teacher draws the tokens of `chunks (R, K)` in turn, and its
    nats per token."""
    head = model.token_head
    numbers = []
    losses = []
    for place in range(head.num_symbols):
        states = expected(model.transformer, head, symbols, chunks, place, before[None])
        states = states[0].unflatten(-1, (head.num_symbols, -1))[:, place]  # (R, E)
        probabilities = head.logits(states).softmax(-1)  # (R, V)
        numbers.append(number_of(probabilities, chunks[:, place]))
        own = probabilities.gather(-1, chunks[:, place, None])
        losses.append(-own.clamp_min(1e-12).log().mean().item())
    return torch.stack(numbers, dim=-1), sum(losses) / len(losses)


def student_loss(model, student, symbols, chunks, numbers, before, pairs) -> torch.Tensor:
    """Mean nats of the places that the student draws."""
    head = model.token_head
    places = torch.arange(head.num_symbols, device=chunks.device)
    losses = []
    for count, place in pairs:
        shown = ((places >= count) & (places < place)).expand_as(numbers)
        entry = before + student.reader(numbers, shown).to(before.dtype)
        states = expected(student.transformer, head, symbols, chunks, count, entry[None])
        chosen = (places == place).expand(1, *chunks.shape)
        times = torch.zeros(1, *chunks.shape, device=chunks.device)
        losses.append(head.nll(states, symbols, states, times, chunks[None], chosen)[0])
    return torch.stack(losses).mean()


def train_student(model: TokComModel, tokens: np.ndarray, eos: int, steps: int, pairs) -> Student:
    """A student of `model`, which stays as it is; prints the nats of both on the last batches."""
    student = Student(model).train()
    size = model.token_head.num_symbols
    data = PackedDataset(tokens, WindowShape(512, size, marks_starts=True), eos, 0, training=True)
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
    optimizer = build_optimizer(student, 2e-3, 8e-3, weight_decay=0.01)
    schedule = build_schedule(optimizer, steps, steps // 10, cooldown_share=0.3)
    done = 0
    torch.manual_seed(0)
    with tqdm(total=steps, desc="student") as bar:
        while done < steps:
            for batch in loader:
                loss, plain = _step(model, student, batch, pairs)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                done += 1
                bar.update(1)
                bar.set_postfix_str(f"student {loss:.3f}, turns {plain:.3f}", refresh=False)
                if done == steps:
                    break
            data.set_epoch(done // len(loader))
    return student.eval()


def _step(model, student, batch: dict, pairs) -> tuple[float, float]:
    """Gradients of one batch; the nats of the student, and the teacher's of all tokens."""
    batch = {key: value.to(model.device) for key, value in batch.items()}
    with half_precision(model.device.type):
        symbols, chunks, before = read_chunks(model, batch)
        numbers, plain = teacher_numbers(model, symbols, chunks, before)
        loss = student_loss(model, student, symbols, chunks, numbers, before, pairs)
    loss.backward()
    return loss.item(), plain


@torch.no_grad()
def read_chunks(model: TokComModel, batch: dict):
    """The symbols, all chunks `(R, K)` of a batch, and the state before each, `(R, D)`."""
    symbols = model.symbols()
    chunks, real = model.codec.symbols(batch["input_ids"], None)
    nothing = torch.zeros_like(real)
    begins = batch["text_start"].bool()
    states = read_text(model, symbols, chunks, real, nothing, nothing.any(-1).any(-1), begins)
    return symbols, chunks.flatten(0, 1), states[:, :-1].flatten(0, 1)


# ---- sampling ----


class JointSampler(MaskedSampler):
    """Draws the tokens of a chunk in turns, jointly, or jointly and checked (`mode`).

    `evaluations` counts steps, summed over rows; `tried (K,)` and `kept (K,)` the student's tokens
    that were checked, by place.
    """

    student: Student
    mode = "joint"
    tokens_per_step = 2
    tried: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def _denoise(self, x, context, sigma_start, given, sources, on_step_end):
        size = self.model.token_head.num_symbols
        places = torch.arange(size, device=x.device)
        if self.tried is None:
            self.tried, self.kept = torch.zeros(2, size, dtype=torch.long)
        shape = (len(x), 1, size)
        chunks = torch.zeros(shape, dtype=torch.long, device=x.device)
        count = torch.zeros(shape[:2], dtype=torch.long, device=x.device)  # tokens that are known
        if given is not None:
            chunks = given.chunks * given.mask
            count = given.mask.sum(-1)  # a prompt is continued, so they are the first ones
        self.chunks += len(x)
        numbers = uniform_numbers(chunks, sources)  # of all tokens of the chunk
        guessed = count  # up to where the student has drawn
        while (count < size).any():
            self.evaluations += int((count < size).sum())
            count, chunks = self._check(x, context, chunks, count, guessed, numbers)
            guessed = count
            if self.mode == "turns":
                continue
            # what the student says in the same step, of the tokens after the one just decided
            end = size if self.mode == "checked" else (count - 1) // self.tokens_per_step
            if self.mode == "joint":
                end = (end + 1) * self.tokens_per_step
            guesses = self._guesses(x, context, chunks, count - 1, numbers)
            is_new = (places >= count[..., None]) & (places < torch.as_tensor(end)[..., None])
            chunks = torch.where(is_new, guesses, chunks)
            guessed = is_new.sum(-1) + count
            if self.mode == "joint":
                count = guessed
        return (
            self.model.token_head.latents_of(context.symbols, chunks),
            self.model.codec.from_symbols(chunks),
        )

    def _check(self, x, context, chunks, count, guessed, numbers):
        """The teacher's tokens at every place from `count (B, Q)` on, given the guesses before it:
        guesses that agree are kept, and one more token is known."""
        size = chunks.shape[-1]
        places = torch.arange(size, device=x.device)
        drawn = torch.stack(
            [self._turn(x, context, chunks, place, numbers) for place in range(size)], dim=-1
        )  # (B, Q, K)
        open_place = places >= count[..., None]
        is_guess = open_place & (places < guessed[..., None])
        wrong = open_place & ~(is_guess & (drawn == chunks))
        # the first place that was not guessed, or guessed wrong
        first = torch.where(wrong.any(-1), wrong.float().argmax(-1), size)  # (B, Q)
        tried = is_guess & (places <= first[..., None])
        self.tried += tried.sum((0, 1)).cpu()
        self.kept += (tried & (drawn == chunks)).sum((0, 1)).cpu()
        chunks = torch.where(open_place & (places <= first[..., None]), drawn, chunks)
        return (first + 1).clamp_max(size), chunks

    def _turn(self, x, context, chunks, place: int, numbers) -> torch.Tensor:
        """Ids `(B, Q)` that the teacher draws at a place, given all tokens before it."""
        known = (torch.arange(chunks.shape[-1], device=x.device) < place).expand_as(chunks)
        found = self.probabilities(x, context, chunks, known)[..., place, :]
        return draw_ranked(found, numbers[..., place])

    def _guesses(self, x, context, chunks, count, numbers) -> torch.Tensor:
        """Ids `(B, Q, K)` of the student, which knows the first `count (B, Q)` tokens and the
        numbers of those between."""
        own = self.model, context.model, context.entries
        places = torch.arange(chunks.shape[-1], device=x.device)
        found = torch.zeros_like(chunks)
        for start in range(chunks.shape[-1] - 1):
            known = (places < start).expand_as(chunks)
            for place in range(start + 1, chunks.shape[-1]):
                shown = ((places >= start) & (places < place)).expand_as(chunks)
                read = self.student.reader(numbers, shown)
                context.entries = [own[2][0] + read.to(own[2][0].dtype)]
                # the student in the place of the network, with the teacher's head and codec
                transformer = self.model.transformer
                self.model.transformer = self.student.transformer
                p = self.probabilities(x, context, chunks, known)[..., place, :]
                self.model.transformer = transformer
                context.entries = own[2]
                drawn = draw_ranked(p, numbers[..., place])
                here = (places == place) & (count == start)[..., None]
                found = torch.where(here, drawn[..., None], found)
        return found


class JointPipeline(TokComPipeline):
    """A text pipeline that is sampled by `JointSampler`."""

    student: Student
    mode = "joint"
    tokens_per_step = 2

    def _sampler(self, sampling=None) -> JointSampler:
        self.sampler = JointSampler(self.model, self.scheduler, sampling)
        self.sampler.student = self.student
        self.sampler.mode = self.mode
        self.sampler.tokens_per_step = self.tokens_per_step
        return self.sampler


def measure(pipe: JointPipeline, mode: str, windows: np.ndarray, judge: TokenJudge) -> dict:
    """Quality of continuations at temperature 1, and the steps of a chunk."""
    pipe.mode = mode
    prompts = windows[:, :PROMPT]
    sampler = TokComSampler(pipe, temperature=1.0, batch_size=len(prompts))
    samples = sampler.sample(prompts, CONTINUATION, seed=0)
    found = pipe.sampler
    return {
        "mode": mode,
        "steps per chunk": found.evaluations / found.chunks,
        "judge NLL": float(judge.nll(samples, prompts).mean()),
        "entropy": sample_entropy(samples),
        "kept by place": (found.kept[1:] / found.tried[1:].clamp_min(1)).tolist(),
        "samples": samples.tolist(),
    }


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".", help="default: %(default)s")
    parser.add_argument("--train", required=True, help="parquet file with training text")
    parser.add_argument("--validation", required=True, help="parquet file with held-out text")
    parser.add_argument("--judge", required=True, help="autoregressive, with the same tokenizer")
    parser.add_argument("--tokens_per_step", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--output", help="JSON file for the numbers")
    add_device_option(parser)
    args = parser.parse_args(argv)
    pipe = JointPipeline.from_pretrained(args.model).to(args.device)
    pipe.tokens_per_step = args.tokens_per_step
    pairs = later_places(args.tokens_per_step, pipe.chunk_size)
    tokens = read_tokens(args.train, pipe.tokenizer, "train")
    eos = pipe.tokenizer.eos_token_id
    pipe.student = train_student(pipe.model, tokens, eos, args.steps, pairs)
    tokens = read_tokens(args.validation, pipe.tokenizer, "validation")
    windows = held_out_windows(tokens, PROMPT + CONTINUATION, args.prompts)
    judge = TokenJudge(args.judge, args.device)
    rows = [measure(pipe, mode, windows, judge) for mode in MODES]
    columns = ["mode", "steps per chunk", "judge NLL", "entropy", "kept by place"]
    print(table(columns, [[str(row[key]) for key in columns] for row in rows]))
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
