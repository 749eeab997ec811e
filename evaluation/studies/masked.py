"""Masked diffusion inside chunks: the same network without a flow, as a baseline of `curve`.

Tokens are clean or pure noise, which stands for a mask, and are decided in any order: the objective
of MDLM (Sahoo et al. 2024) for blocks of one chunk (BD3-LM, Arriola et al. 2025). The tokens of a
text model that take turns from left to right are the same model with one order.

Shape legend: B batch, M noise draws, N latents, Q latents of a block, K tokens per chunk, V
vocabulary.
"""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

from tokcom import objective_tokcom
from tokcom.context_tokcom import TokComStep
from tokcom.heads_tokcom import TokComChoice, draw_ids
from tokcom.objective_tokcom import TokComNextChunkObjective
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.sampling_tokcom import TokComBlockSampler
from tokcom.training.precision import half_precision

ORDERS = ("random", "confidence")


def check_head(config) -> None:
    """Raise `ValueError` for a model whose head reads a chunk in one order only."""
    if config.transformer_config.local_head:
        raise ValueError(
            "`local_head` reads the tokens of a chunk in their order, which this study leaves; "
            "give a model without it."
        )


@dataclass
class MaskedObjective(TokComNextChunkObjective):
    """Mean cross-entropy of the masked tokens, of which a chunk has K, K - 1, ..., 1 equally often.

    In eval mode the loss is the exact likelihood in an order that is drawn at random for each
    chunk.
    """

    turn_share: float = 1.0  # the times of masks are those of whole numbers of tokens

    def check(self, config) -> None:
        super().check(config)
        check_head(config)

    def _turns(self, model, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = model.token_head.num_symbols
        known = (times * size).round()[..., None]  # how many tokens of each chunk
        draws = times.shape[1] if model.training else 1  # one order for all turns of a likelihood
        order = torch.rand(len(times), draws, times.shape[2], size, device=times.device)
        # argsort twice: the place of each token in the order
        rank = order.argsort(-1).argsort(-1)  # (B, M, N, K)
        is_masked = rank >= known
        progress = torch.where(is_masked, 0.0, 1.0)
        # In training all masked tokens have a loss. A likelihood takes at each turn the token whose
        # turn it is, so K turns score each token once, given those before it in the order.
        return progress, is_masked if model.training else rank == known


def training_of(objective: type[TokComNextChunkObjective]):
    """A context in which the flow stage of text models trains another objective."""
    of_config = objective_tokcom.objective_class

    def chosen(config, stage: str):
        return objective if stage == "flow" else of_config(config, stage)

    # studies train with the recipe of all models, which knows nothing of their objectives
    return mock.patch.object(objective_tokcom, "objective_class", chosen)


def masked_training():
    """A context in which the flow stage of text models trains `MaskedObjective`."""
    return training_of(MaskedObjective)


@torch.no_grad()
def held_out_objective_nll(model, windows: np.ndarray, skipped: int) -> float:
    """Nats per token of `windows (B, T)`, which begin inside a text, under the objective that the
    model has, without their first `skipped` tokens; of `MaskedObjective` in random orders."""
    torch.manual_seed(0)
    ids = torch.from_numpy(windows.astype(np.int64)).to(model.device)
    inside = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    first = skipped // model.token_head.num_symbols
    with half_precision(ids.device.type):
        losses = [
            model(part, text_start=starts).token_losses[:, first:]
            for part, starts in zip(ids.split(8), inside.split(8))
        ]
    return torch.cat(losses).mean().item()


def uniform_numbers(like: torch.Tensor, sources: list[torch.Generator]) -> torch.Tensor:
    """Numbers in [0, 1) of the shape of `like (B, Q, K)`, each row from its own source."""
    rows = [torch.rand(like.shape[1:], generator=source) for source in sources]
    return torch.stack(rows).to(like.device)


class MaskedSampler(TokComBlockSampler):
    """Decides the tokens of a chunk in `num_inference_steps` steps of equally many, or, with a
    `threshold`, in each step all whose entropy is below it, and at least one.

    `evaluations` and `chunks` count what has been spent, summed over rows.
    """

    order = "random"
    threshold: float | None = None  # nats
    evaluations = 0
    chunks = 0

    def _denoise(self, x, context, sigma_start, given, sources, on_step_end):
        head = self.model.token_head
        size = head.num_symbols
        shape = (*x.shape[:2], size)  # (B, Q, K)
        if given is None:
            known = torch.zeros(shape, dtype=torch.bool, device=x.device)
            chunks = torch.zeros(shape, dtype=torch.long, device=x.device)
        else:
            known = given.mask
            chunks = given.chunks * known
        self.chunks += len(x)
        steps_left = min(self.sampling.num_inference_steps, size)
        while not known.all():
            # a row that is decided would need no evaluation on its own
            self.evaluations += int((~known).any(-1).any(-1).sum())
            drawn, entropy = self._draw(x, context, chunks, known, sources)
            decided = self._choose(entropy, known, steps_left, sources)
            steps_left -= 1
            chunks = torch.where(decided, drawn, chunks)
            known = known | decided
        return head.latents_of(context.symbols, chunks), self.model.codec.from_symbols(chunks)

    def _draw(self, x, context, chunks, known, sources) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(B, Q, K)` drawn for all places, and the entropy of each in nats."""
        probabilities = self.probabilities(x, context, chunks, known)
        # entr is -p log p, and 0 at p = 0
        entropy = torch.special.entr(probabilities).sum(-1)
        uniform = uniform_numbers(known, sources)
        return draw_ids(probabilities, uniform), entropy

    def probabilities(self, x, context, chunks, known) -> torch.Tensor:
        """Those of all tokens at all places, `(B, Q, K, V)`, given the `known (B, Q, K)` ones of
        `chunks`: one evaluation of the head."""
        head = self.model.token_head
        # a known token is at t = 1, and a masked one at t = 0
        times = known.float()
        clean = head.latents_of(context.symbols, chunks)
        channels = x.shape[-1] // head.num_symbols
        # every symbol has `channels` channels of the latent
        x = torch.where(known.repeat_interleave(channels, dim=-1), clean, x)
        now = times.mean(-1)  # (B, Q)
        nothing = TokComChoice.of(torch.zeros_like(known))
        everything = TokComChoice.of(~known)
        modulations = self.model.transformer.modulate(now)
        step = TokComStep(now, times, nothing, everything, modulations, gain=None)
        states = context.predict(x, step, chunks)[0].unflatten(-1, (head.num_symbols, -1))
        logits = head.logits(states) / self.sampling.temperature  # (B, Q, K, V)
        return logits.softmax(-1)

    def _choose(self, entropy, known, steps_left: int, sources) -> torch.Tensor:
        """Which tokens `(B, Q, K)` this step decides."""
        score = entropy  # (B, Q, K)
        if self.order == "random":
            score = uniform_numbers(known, sources)
        # known tokens come last
        rank = score.masked_fill(known, torch.inf).argsort(-1).argsort(-1)
        if self.threshold is not None:
            return ~known & ((rank == 0) | (entropy < self.threshold))
        left = (~known).sum(-1, keepdim=True)  # (B, Q, 1)
        # as many in every step, the rest in the last ones
        return ~known & (rank < (left / max(1, steps_left)).ceil())


class MaskedPipeline(TokComPipeline):
    """A text pipeline whose chunks are decided by `MaskedSampler`."""

    order = "random"
    threshold: float | None = None

    def _sampler(self, sampling=None) -> MaskedSampler:
        self.sampler = MaskedSampler(self.model, self.scheduler, sampling)
        self.sampler.order = self.order
        self.sampler.threshold = self.threshold
        return self.sampler
