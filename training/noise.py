"""Where a flow stage trains on the scale of noise: at a fixed place, moving over the run, or where CE(t) says most.

The location is the median of the log odds of noise to signal, log((1 - t) / t), of the times that training draws:
`timestep_loc` of a model that regresses latents, log `token_shift` of one that predicts tokens. Both are in the model's
configuration, so a saved model samples on the grid that its training ended with.
"""

import math

import numpy as np
import torch

from modeling_tokcom import TokComModel, TokComOutput

NOISE_LOCATIONS = ("fixed", "annealed", "learned")
EDGES = np.linspace(-7.0, 7.0, 29)  # of the bins of CE(t), in log odds of noise
MEMORY, STEP = 0.9, 0.1  # of the running CE(t), and of the way to where it points, at each update
ENOUGH, RANGE = 30.0, 0.5  # tokens that make a bin count, nats between its ends from which the curve says anything


class NoiseLocation:
    """Moves the noise of a model while it trains.

    Args:
        model (`TokComModel`): with `timestep_sampling="logit_normal"`, or with a token head.
        mode (`str`): `"fixed"`; `"annealed"`, linearly in the updates from `start` to the model's own location; `"learned"`, from
            the model's own towards the place at which the running CE(t) is half way between its ends, as CDCD draws times
            where their cross-entropy changes (Dieleman et al. 2022).
        start (`float`): first location of `"annealed"`.
        max_steps (`int`): updates in the run.

    Raises `ValueError` for a model without a location, or without the cross-entropies to learn one from.
    """

    def __init__(self, model: TokComModel, mode: str, start: float, max_steps: int):
        if mode not in NOISE_LOCATIONS:
            raise ValueError(f"`flow.noise_location` ({mode!r}) must be one of {NOISE_LOCATIONS}.")
        self.model, self.mode, self.start, self.max_steps = model, mode, start, max_steps
        if mode == "fixed":
            return
        config = model.config
        if model.token_head is None and config.timestep_sampling != "logit_normal":
            raise ValueError(
                f"`flow.noise_location={mode}` moves the times of `timestep_sampling='logit_normal'`, and this model's are "
                f"{config.timestep_sampling!r}; use noise_location=fixed."
            )
        partial = config.ce_share < 1 or (model.token_head is None and config.noise_draws > 1)
        if mode == "learned" and (
            config.codec_config.modality == "several" or partial or not config.codec_config.has_tokens
        ):
            raise ValueError(
                "`flow.noise_location=learned` reads the cross-entropy of every token at every time: it needs one codec, of "
                f"tokens, `ce_share=1` (got {config.ce_share}) and, without a token head, `noise_draws=1` (got "
                f"{config.noise_draws}); use annealed or fixed."
            )
        self.end = self.location
        self.sums, self.counts = np.zeros(len(EDGES) - 1), np.zeros(len(EDGES) - 1)

    @property
    def location(self) -> float:
        config = self.model.config
        return config.timestep_loc if self.model.token_head is None else math.log(config.token_shift)

    @location.setter
    def location(self, value: float) -> None:
        if self.model.token_head is None:
            self.model.config.timestep_loc = value
        else:
            self.model.token_head.shift = self.model.config.token_shift = math.exp(value)

    def before_update(self, step: int) -> None:
        """Call with the number of updates done, before each."""
        if self.mode == "annealed":
            done = min(1.0, step / max(1, self.max_steps - 1))
            self.location = self.start + done * (self.end - self.start)

    def after_update(self, outputs: list[TokComOutput], reduce) -> None:
        """Call with what the model gave for the micro-batches of an update; `reduce` sums a tensor over the processes."""
        if self.mode != "learned":
            return
        found = torch.stack([self._curve(output) for output in outputs]).sum(0)
        sums, counts = reduce(found).double().cpu().numpy()
        self.sums, self.counts = MEMORY * self.sums + sums, MEMORY * self.counts + counts
        place = middle(self.sums, self.counts)
        if place is not None:
            self.location += STEP * (place - self.location)

    def _curve(self, output: TokComOutput) -> torch.Tensor:
        """Sums of cross-entropies, and how many, by bin: `(2, bins)`."""
        counted = output.token_times >= 0
        times = output.token_times[counted].float().clamp(1e-6, 1 - 1e-6)
        edges = torch.tensor(EDGES[1:-1], dtype=torch.float32, device=times.device)
        bins = torch.bucketize(torch.log((1 - times) / times), edges)
        losses = output.token_losses.detach()[counted].float()
        both = torch.stack((losses, torch.ones_like(losses)))
        return both.new_zeros(2, len(EDGES) - 1).index_add(1, bins, both)

    def state_dict(self) -> dict:
        if self.mode == "fixed":
            return {}
        return {"location": self.location, "sums": self.sums.tolist(), "counts": self.counts.tolist()}

    def load_state_dict(self, state: dict) -> None:
        if state and self.mode != "fixed":
            self.location = state["location"]
            self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])


def middle(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Log odds of noise at which CE, of `counts` tokens by bin, is half way between its ends; None if it is flat."""
    used = counts >= ENOUGH
    if used.sum() < 2:
        return None
    centers = ((EDGES[1:] + EDGES[:-1]) / 2)[used]
    curve = np.maximum.accumulate(sums[used] / counts[used])
    if curve[-1] - curve[0] < RANGE:
        return None
    return float(np.interp((curve[0] + curve[-1]) / 2, curve, centers))


__all__ = ["NOISE_LOCATIONS", "NoiseLocation", "middle"]
