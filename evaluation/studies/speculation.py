"""How many evaluations of the head a chunk costs if its tokens are guessed and then checked.

    python -m tokcom.evaluation.studies.speculation --model . --train stories.parquet \
        --validation held_out.parquet

The first token of a chunk is drawn, and those after it are guessed in the same pass by a copy of the
denoising layers that has learnt to name later tokens without those between. The next pass evaluates
a batch of beginnings of the chunk, which gives the distribution that each turn would have had. A
guess is kept with probability min(1, p / q), and the first that is not is drawn anew from what p has
more than q, so that samples have exactly the distribution of turns (speculative sampling, Leviathan
et al. 2023). `--steps` trains the copy; the model itself and its context layers stay as they are.

Shape legend: B batch, Q = 1 latent of a block, K tokens per chunk, V vocabulary.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.evaluation.protocol import CONTINUATION, PROMPT, held_out_windows
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import TokComSampler
from tokcom.evaluation.studies.masked import (
    MaskedObjective,
    MaskedSampler,
    check_head,
    uniform_numbers,
)
from tokcom.evaluation.texts import model_study_parser, read_tokens
from tokcom.heads_tokcom import draw_ids
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.data import PackedDataset, WindowShape
from tokcom.training.optimizer import build_optimizer, build_schedule
from tokcom.training.precision import half_precision

TEMPERATURES = (1.0, 0.7)


# ---- the network that guesses ----


@dataclass
class GuessingObjective(MaskedObjective):
    """Mean cross-entropy of all tokens of a chunk that follow its known beginning."""

    infill_rate: float = 0.0
    context_dropout: float = 0.0

    def _turns(self, model, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = model.token_head.num_symbols
        known = (times * size).round()[..., None]  # how many tokens of each chunk
        unknown = torch.arange(size, device=times.device) >= known
        return torch.where(unknown, 0.0, 1.0), unknown


def train_guesses(model: TokComModel, tokens: np.ndarray, eos: int, steps: int) -> TokComModel:
    """A copy of `model` whose denoising layers have learnt to guess; the rest is as it was, so that
    both read the same context."""
    guesser = copy.deepcopy(model).train()
    guesser.objective = GuessingObjective()
    check_head(model.config)
    guesser.requires_grad_(False)
    transformer = guesser.transformer
    denoising = transformer.layers[transformer.config.num_context_layers :]
    for part in (*denoising, transformer.norm, transformer.proj_out):
        part.requires_grad_()
    train_on_windows(guesser, lambda batch: guesser(**batch).loss, model, tokens, eos, steps)
    return guesser.eval()


def train_on_windows(
    trained: nn.Module,
    loss_of: Callable[[dict], torch.Tensor],
    model: TokComModel,
    tokens: np.ndarray,
    eos: int,
    steps: int,
) -> None:
    """Train what has gradients in `trained` on windows of `tokens (T,)`, cut as `model` reads
    them."""
    shape = WindowShape(512, model.token_head.num_symbols, marks_starts=True)
    data = PackedDataset(tokens, shape, eos, 0, training=True)
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
    optimizer = build_optimizer(trained, 1e-3, 4e-3, weight_decay=0.01)
    schedule = build_schedule(optimizer, steps, steps // 10, cooldown_share=0.0)
    done = 0
    torch.manual_seed(0)
    with tqdm(total=steps, desc="training") as bar:
        while done < steps:
            for batch in loader:
                batch = {key: value.to(model.device) for key, value in batch.items()}
                with half_precision(model.device.type):
                    loss = loss_of(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                done += 1
                bar.update(1)
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                if done == steps:
                    break
            data.set_epoch(done // len(loader))


# ---- sampling ----


def check_guess(
    guess: torch.Tensor, q: torch.Tensor, p: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether ids `guess (...)`, drawn from `q (..., V)`, are kept, and the ids with the
    distribution `p (..., V)` that stand there then. `uniform (2, ...)` decides."""
    ratio = (p / q).gather(-1, guess[..., None])[..., 0]
    kept = uniform[0] < ratio
    # what p has more than q; p itself where rounding leaves nothing
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    return kept, torch.where(kept, guess, draw_ids(rest, uniform[1]))


class SpeculativeSampler(MaskedSampler):
    """Guesses the tokens of a chunk, and checks them.

    `evaluations` counts passes of the head that wait for each other, summed over rows; `beginnings`
    the beginnings of chunks that were evaluated in them. `tried (K,)` and `kept (K,)` count guesses
    by their place.
    """

    guesser: TokComModel | None = None  # the model itself
    beginnings = 0
    tried: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def _denoise(self, x, context, sigma_start, given, sources, on_step_end):
        chunks, count = self._begin(x, given)
        size = chunks.shape[-1]
        places = torch.arange(size, device=x.device)
        known = places < count[..., None]
        open_rows = ~known.all(-1)[:, 0]
        self._count(open_rows, open_rows)
        p = self.probabilities(x, context, chunks, known)
        q = self._guesses(x, context, chunks, known)
        at_turn = places == count[..., None]
        drawn = draw_ids(torch.where(at_turn[..., None], p, q), uniform_numbers(known, sources))
        chunks = torch.where(known, chunks, drawn)
        count = (count + 1).clamp_max(size)  # the first is no guess
        while (count < size).any():
            count, chunks, q = self._check(x, context, chunks, count, q, sources)
        return (
            self.model.token_head.latents_of(context.symbols, chunks),
            self.model.codec.from_symbols(chunks),
        )

    def _begin(self, x, given) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(B, Q, K)` of a block that is not decided, and how many are known, `(B, Q)`."""
        size = self.model.token_head.num_symbols
        if self.tried is None:
            self.tried, self.kept = torch.zeros(2, size, dtype=torch.long)
        self.chunks += len(x)
        if given is None:
            chunks = torch.zeros(len(x), 1, size, dtype=torch.long, device=x.device)
            return chunks, chunks[..., 0]
        # a prompt is continued, so the known tokens are the first ones
        return given.chunks * given.mask, given.mask.sum(-1)

    def _check(self, x, context, chunks, count, q, sources):
        """One pass: `count (B, Q)` grows by the guesses that are kept, and one more."""
        size = chunks.shape[-1]
        places = torch.arange(size, device=x.device)
        left = size - count[:, 0]
        self._count(left > 0, left)
        beginnings = [(places < j).expand_as(chunks) for j in range(size)]
        evaluated = [self.probabilities(x, context, chunks, known) for known in beginnings]
        p = torch.stack([evaluated[j][..., j, :] for j in range(size)], dim=-2)  # (B, Q, K, V)
        uniform = torch.stack([uniform_numbers(chunks, sources) for _ in range(2)])
        kept, checked = check_guess(chunks, q, p, uniform)
        is_guess = places >= count[..., None]
        # the first guess that is not kept ends the pass
        failed = is_guess & ~kept
        first = torch.where(failed.any(-1), failed.float().argmax(-1), size)  # (B, Q)
        tried = is_guess & (places <= first[..., None])
        self.tried += tried.sum((0, 1)).cpu()
        self.kept += (tried & kept).sum((0, 1)).cpu()
        now = (first + 1).clamp_max(size)
        chunks = torch.where(is_guess & (places <= first[..., None]), checked, chunks)
        # tokens after it are guessed anew, from what is known before it
        every = torch.stack([self._guesses(x, context, chunks, known) for known in beginnings])
        at = first.clamp_max(size - 1)[None, ..., None, None]
        newest = every.gather(0, at.expand(1, *every.shape[1:]))[0]  # (B, Q, K, V)
        later = places >= now[..., None]
        guesses = draw_ids(newest, uniform_numbers(chunks, sources))
        chunks = torch.where(later, guesses, chunks)
        return now, chunks, torch.where(later[..., None], newest, q)

    def _guesses(self, x, context, chunks, known) -> torch.Tensor:
        """Probabilities `(B, Q, K, V)` of the network that guesses, in the same pass."""
        own = context.model, self.model
        context.model = self.model = self.guesser or self.model
        found = self.probabilities(x, context, chunks, known)
        context.model, self.model = own
        return found

    def _count(self, rows: torch.Tensor, beginnings: torch.Tensor) -> None:
        self.evaluations += int(rows.sum())
        self.beginnings += int(beginnings.sum())


class SpeculativePipeline(TokComPipeline):
    """A text pipeline whose chunks are guessed, by `guesser` if there is one, and checked."""

    guesser: TokComModel | None = None

    def _sampler(self, sampling=None) -> SpeculativeSampler:
        self.sampler = SpeculativeSampler(self.model, self.scheduler, sampling)
        self.sampler.guesser = self.guesser
        return self.sampler


def measure(pipe: SpeculativePipeline, prompts: np.ndarray, temperature: float) -> dict:
    """Evaluations per chunk, and the share of guesses that are kept at each place."""
    sampler = TokComSampler(pipe, temperature=temperature, batch_size=len(prompts))
    sampler.sample(prompts, CONTINUATION, seed=0)
    found = pipe.sampler
    return {
        "temperature": temperature,
        "chunks": found.chunks,
        "evaluations per chunk": found.evaluations / found.chunks,
        "beginnings per chunk": found.beginnings / found.chunks,
        # the first token of a chunk is never guessed
        "kept by place": (found.kept[1:] / found.tried[1:]).tolist(),
    }


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = model_study_parser(__doc__, prompts=64, steps="0: the model guesses")
    args = parser.parse_args(argv)
    pipe = SpeculativePipeline.from_pretrained(args.model).to(args.device)
    if args.steps:
        tokens = read_tokens(args.train, pipe.tokenizer, "train")
        pipe.guesser = train_guesses(pipe.model, tokens, pipe.tokenizer.eos_token_id, args.steps)
    tokens = read_tokens(args.validation, pipe.tokenizer, "validation")
    prompts = held_out_windows(tokens, PROMPT + CONTINUATION, args.prompts)[:, :PROMPT]
    rows = [measure(pipe, prompts, temperature) for temperature in TEMPERATURES]
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
