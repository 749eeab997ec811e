"""A student that draws several tokens of a chunk in one step, because it reads the numbers that
decide them.

    python -m tokcom.evaluation.studies.joint_steps --model . --train stories.parquet \\
        --validation held_out.parquet --judge judge

Tokens that are drawn together and independently do not fit each other. But a sampled token is a
function of its distribution and a uniform number u, so whoever knows u of the token before knows, in
principle, that token. The student, a copy of the network whose denoising layers are trained, reads
these numbers in the place of tokens that are not decided yet (parallel token prediction, Draxler et
al. 2025). Its teacher takes turns: for a token of real text, u is drawn from the interval that gives
this token under the teacher's distribution. The first token of a step is always the teacher's.
`--no_numbers` hides them, for comparison.

Ways of sampling: *turns*; *joint*, where 2 or 4 tokens are drawn in a step and what the student says
stands; and *checked*, where the teacher goes over it in the next step and the first token that it
would have drawn otherwise, with the same u, is replaced: these are exactly the samples of turns. A
step evaluates a batch of beginnings of the chunk, up to one for every open token.

Shape legend: B batch, N latents, Q = 1 latent of a block, K tokens per chunk, R rows, D width, E
embedding, V vocabulary.
"""

import copy
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokcom.cli.errors import report_errors
from tokcom.evaluation.judges import TokenJudge
from tokcom.evaluation.metrics import sample_entropy
from tokcom.evaluation.protocol import CONTINUATION, PROMPT, held_out_windows
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import TokComSampler
from tokcom.evaluation.studies.masked import check_head, uniform_numbers
from tokcom.evaluation.studies.speculation import SpeculativeSampler, train_on_windows
from tokcom.evaluation.texts import likelihood_windows, model_study_parser, read_tokens
from tokcom.heads_tokcom import draw_ids
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.precision import half_precision
from tokcom.transformer_tokcom import read_text

WAVES = 6  # frequencies with which a uniform number is read
MODES = (("turns", 1), ("joint", 2), ("joint", 4), ("checked", 4))  # and tokens of a step


# ---- tokens as functions of a number ----


def draw_ranked(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Ids `(...)` drawn from `probabilities (..., V)` with `uniform (...)`. Small numbers give the
    likeliest token, whatever its id."""
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, draw_ids(ranked, uniform)[..., None])[..., 0]


def number_of(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Numbers `(...)`, drawn uniformly from the intervals in which `draw_ranked` gives
    `ids (...)`."""
    own = probabilities.gather(-1, ids[..., None])  # (..., 1)
    places = torch.arange(probabilities.shape[-1], device=ids.device)
    # equals stand in the order of their ids
    before = (probabilities > own) | ((probabilities == own) & (places < ids[..., None]))
    below = (probabilities * before).sum(-1)
    return (below + torch.rand_like(below) * own[..., 0]).clamp(0, 1)


class NumberReader(nn.Module):
    """Uniform numbers `(..., K)`, of which `shown (..., K)` are known -> `(..., D)`; gives 0 until
    it is trained."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(count * (2 * WAVES + 3), width)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, numbers: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        angles = torch.pi * numbers[..., None] * 2.0 ** torch.arange(WAVES, device=numbers.device)
        # -log(1 - u) spreads the rare tokens near u = 1
        rare = -(1 - numbers).clamp_min(1e-4).log()[..., None]
        known = torch.ones_like(rare)
        features = torch.cat((angles.sin(), angles.cos(), numbers[..., None], rare, known), dim=-1)
        features = features * shown[..., None]
        return self.linear_2(F.silu(self.linear_1(features.flatten(-2)))) * shown.any(-1)[..., None]


# ---- the student ----


class Student(nn.Module):
    """A copy of the network that also reads numbers; its context layers stay the teacher's.

    With `sees=False` the numbers are hidden.
    """

    def __init__(self, teacher: TokComModel, sees: bool = True):
        super().__init__()
        self.sees = sees
        self.transformer = copy.deepcopy(teacher.transformer).requires_grad_(False)
        config = self.transformer.config
        denoising = self.transformer.layers[config.num_context_layers :]
        for part in (*denoising, self.transformer.norm, self.transformer.proj_out):
            part.requires_grad_()
        self.size = teacher.token_head.num_symbols
        self.reader = NumberReader(self.size, config.hidden_size).to(teacher.device)

    def read(self, numbers: torch.Tensor, start: int, place: int) -> torch.Tensor:
        """What is added to the state before a chunk, `(..., D)`, so that the token at `place` fits
        those from `start` on, of which only the `numbers (..., K)` are known."""
        places = torch.arange(self.size, device=numbers.device)
        shown = (places >= start) & (places < place) & self.sees
        return self.reader(numbers, shown.expand_as(numbers))

    def pairs(self) -> list[tuple[int, int]]:
        """How many tokens may be known, and the places that the student then draws; the first
        unknown place is the teacher's."""
        return [(start, place) for place in range(self.size) for start in range(place)]


def expected(transformer, head, symbols, chunks, count: int, entry) -> torch.Tensor:
    """What a network expects `(1, R, K * E)` of chunks `(R, K)` whose first `count` tokens are
    known, given `entry (R, D)`."""
    times = (torch.arange(head.num_symbols, device=chunks.device) < count).float()
    times = times.expand(1, *chunks.shape)  # (1, R, K)
    now = torch.full((1, len(chunks)), count / head.num_symbols, device=chunks.device)
    features = head.read(symbols, None, times, chunks[None])
    latents = entry.new_zeros(1, len(chunks), transformer.config.latent_channels)
    return transformer(latents, now, features=features, entry=entry[None]).latents


@torch.no_grad()
def teacher_numbers(model, symbols, chunks, before) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers `(R, K)` with which the teacher draws the tokens of `chunks (R, K)` in turn, and its
    mean nats at each place, `(K,)`."""
    head = model.token_head
    numbers = []
    nats = []
    for place in range(head.num_symbols):
        states = expected(model.transformer, head, symbols, chunks, place, before)
        states = states[0].unflatten(-1, (head.num_symbols, -1))[:, place]  # (R, E)
        probabilities = head.logits(states).softmax(-1)  # (R, V)
        numbers.append(number_of(probabilities, chunks[:, place]))
        own = probabilities.gather(-1, chunks[:, place, None])
        nats.append(-own.clamp_min(1e-12).log().mean())
    return torch.stack(numbers, dim=-1), torch.stack(nats)


def student_nats(model, student, symbols, chunks, numbers, before) -> torch.Tensor:
    """Mean nats of each of the student's pairs, `(P,)`."""
    head = model.token_head
    nats = []
    for start, place in student.pairs():
        entry = before + student.read(numbers, start, place).to(before.dtype)
        states = expected(student.transformer, head, symbols, chunks, start, entry)
        chosen = torch.zeros(1, *chunks.shape, dtype=torch.bool, device=chunks.device)
        chosen[..., place] = True
        times = torch.zeros(1, *chunks.shape, device=chunks.device)
        nats.append(head.nll(states, symbols, states, times, chunks[None], chosen)[0])
    return torch.stack(nats)


@torch.no_grad()
def read_chunks(model: TokComModel, batch: dict):
    """The symbols, all chunks `(R, K)` of a batch, and the state before each, `(R, D)`."""
    symbols = model.symbols()
    chunks, real = model.codec.symbols(batch["input_ids"], None)
    nothing = torch.zeros_like(real)
    begins = batch["text_start"].bool()
    states = read_text(model, symbols, chunks, real, nothing, nothing.any(-1).any(-1), begins)
    return symbols, chunks.flatten(0, 1), states[:, :-1].flatten(0, 1)


def train_student(
    model: TokComModel, tokens: np.ndarray, eos: int, steps: int, sees: bool = True
) -> Student:
    """A student of `model`, which stays as it is."""
    check_head(model.config)
    torch.manual_seed(0)
    model.requires_grad_(False)
    student = Student(model, sees).train()

    def loss_of(batch: dict) -> torch.Tensor:
        symbols, chunks, before = read_chunks(model, batch)
        numbers = teacher_numbers(model, symbols, chunks, before)[0]
        return student_nats(model, student, symbols, chunks, numbers, before).mean()

    train_on_windows(student, loss_of, model, tokens, eos, steps)
    return student.eval()


@torch.no_grad()
def held_out_nats(model: TokComModel, student: Student, windows: np.ndarray) -> dict:
    """Nats per token of `windows (B, T)`, which begin inside a text: the teacher's at each place,
    and the student's, by how many tokens are known."""
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.device)
    torch.manual_seed(0)
    found = []
    for part in ids.split(8):
        batch = {"input_ids": part, "text_start": torch.zeros(len(part), device=part.device)}
        with half_precision(model.device.type):
            symbols, chunks, before = read_chunks(model, batch)
            numbers, nats = teacher_numbers(model, symbols, chunks, before)
            own = student_nats(model, student, symbols, chunks, numbers, before)
        found.append(torch.cat((nats, own)))
    mean = torch.stack(found).mean(0).tolist()
    names = [f"turns, place {place + 1}" for place in range(student.size)]
    names += [f"place {place + 1}, {start} known" for start, place in student.pairs()]
    return dict(zip(names, mean, strict=True))


# ---- sampling ----


class JointSampler(SpeculativeSampler):
    """Draws the tokens of a chunk in turns, `tokens_per_step` jointly, or jointly and checked
    (`mode`).

    `evaluations` counts steps, summed over rows; `tried (K,)` and `kept (K,)` count, by place, the
    guesses that were checked and those that agreed.
    """

    student: Student
    mode = "joint"
    tokens_per_step = 2

    def _denoise(self, x, context, sigma_start, given, sources, on_step_end):
        chunks, count = self._begin(x, given)
        size = chunks.shape[-1]
        places = torch.arange(size, device=x.device)
        numbers = uniform_numbers(chunks, sources)  # of all tokens of the chunk
        guessed = count  # up to where the student has drawn
        while (count < size).any():
            self.evaluations += int((count < size).sum())
            count, chunks = self._agree(x, context, chunks, count, guessed, numbers)
            if self.mode == "turns":
                guessed = count
                continue
            # what the student says in the same step of the tokens after the one just decided
            guesses = self._guess(x, context, chunks, count - 1, numbers)
            guessed = torch.full_like(count, size)
            if self.mode == "joint":
                guessed = ((count - 1) // self.tokens_per_step + 1) * self.tokens_per_step
            is_new = (places >= count[..., None]) & (places < guessed[..., None])
            chunks = torch.where(is_new, guesses, chunks)
            if self.mode == "joint":
                count = guessed
        return (
            self.model.token_head.latents_of(context.symbols, chunks),
            self.model.codec.from_symbols(chunks),
        )

    def _agree(self, x, context, chunks, count, guessed, numbers):
        """The teacher's tokens from place `count (B, Q)` on, given the guesses before each: guesses
        that agree are kept, and one more token is known."""
        size = chunks.shape[-1]
        places = torch.arange(size, device=x.device)
        drawn = torch.stack(
            [self._turn(x, context, chunks, place, numbers) for place in range(size)], dim=-1
        )  # (B, Q, K)
        is_open = places >= count[..., None]
        is_guess = is_open & (places < guessed[..., None])
        wrong = is_open & ~(is_guess & (drawn == chunks))
        # the first place that was not guessed, or guessed wrong
        first = torch.where(wrong.any(-1), wrong.float().argmax(-1), size)  # (B, Q)
        tried = is_guess & (places <= first[..., None])
        self.tried += tried.sum((0, 1)).cpu()
        self.kept += (tried & (drawn == chunks)).sum((0, 1)).cpu()
        chunks = torch.where(is_open & (places <= first[..., None]), drawn, chunks)
        return (first + 1).clamp_max(size), chunks

    def _turn(self, x, context, chunks, place: int, numbers) -> torch.Tensor:
        """Ids `(B, Q)` that the teacher draws at a place, given all tokens before it."""
        known = (torch.arange(chunks.shape[-1], device=x.device) < place).expand_as(chunks)
        found = self.probabilities(x, context, chunks, known)[..., place, :]
        return draw_ranked(found, numbers[..., place])

    def _guess(self, x, context, chunks, count, numbers) -> torch.Tensor:
        """Ids `(B, Q, K)` of the student, which knows the first `count (B, Q)` tokens and the
        numbers of those between."""
        entry = context.entries[0]
        places = torch.arange(chunks.shape[-1], device=x.device)
        found = torch.zeros_like(chunks)
        # the student's network in the place of the model's, with the same head and codec
        with mock.patch.object(self.model, "transformer", self.student.transformer):
            for start, place in self.student.pairs():
                context.entries = [entry + self.student.read(numbers, start, place).to(entry.dtype)]
                known = (places < start).expand_as(chunks)
                p = self.probabilities(x, context, chunks, known)[..., place, :]
                here = (places == place) & (count == start)[..., None]
                drawn = draw_ranked(p, numbers[..., place])
                found = torch.where(here, drawn[..., None], found)
        context.entries = [entry]
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


def measure(pipe: JointPipeline, windows: np.ndarray, judge: TokenJudge) -> dict:
    """Quality of continuations at temperature 1, and the steps of a chunk."""
    prompts = windows[:, :PROMPT]
    sampler = TokComSampler(pipe, temperature=1.0, batch_size=len(prompts))
    samples = sampler.sample(prompts, CONTINUATION, seed=0)
    found = pipe.sampler
    kept = None
    if pipe.mode == "checked":  # the first token of a chunk is never guessed
        kept = ", ".join(f"{share:.0%}" for share in (found.kept[1:] / found.tried[1:]).tolist())
    return {
        "mode": pipe.mode,
        "tokens per step": pipe.tokens_per_step,
        "steps per chunk": found.evaluations / found.chunks,
        "judge NLL": float(judge.nll(samples, prompts).mean()),
        "entropy": sample_entropy(samples),
        "kept by place": kept or "-",
    }


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = model_study_parser(__doc__, prompts=128, steps="of training")
    parser.add_argument("--judge", required=True, help="autoregressive, with the same tokenizer")
    parser.add_argument("--no_numbers", action="store_true", help="hide them from the student")
    args = parser.parse_args(argv)
    pipe = JointPipeline.from_pretrained(args.model).to(args.device)
    tokens = read_tokens(args.train, pipe.tokenizer, "train")
    eos = pipe.tokenizer.eos_token_id
    pipe.student = train_student(pipe.model, tokens, eos, args.steps, not args.no_numbers)
    tokens = read_tokens(args.validation, pipe.tokenizer, "validation")
    nats = held_out_nats(pipe.model, pipe.student, likelihood_windows(tokens))
    print(table(["", "held-out nats per token"], [list(item) for item in nats.items()]))
    windows = held_out_windows(tokens, PROMPT + CONTINUATION, args.prompts)
    judge = TokenJudge(args.judge, pipe.tokenizer, args.device)
    rows = []
    for pipe.mode, pipe.tokens_per_step in MODES:
        rows.append(measure(pipe, windows, judge))
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    if args.output:
        facts = {"held-out nats": nats, "samples": rows}
        Path(args.output).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
