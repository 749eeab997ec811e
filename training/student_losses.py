"""Losses of few-step students of a flow model: regression on the teacher's trajectories, and
distribution matching. `distill.py` is the stage that trains with them.

After DMD (Yin et al. 2024) and DMD2 (Yin et al. 2024), in this repository's notation: `x_t = (1 -
t) x0 + t x1`, t = 1 is clean, a denoiser maps `(x_t, t)` to its estimate of x1. The score of either
distribution is a function of that estimate, so the student's gradient needs two estimates and no
score. The teacher must estimate E[x1 | x_t], which training by squared error gives, and
cross-entropy alone does not.

Shape legend: B samples, `...` any shape of one sample; times are `(B,)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TIMES = (0.02, 0.98)  # beyond them one of the two estimates says nothing
EPSILON = 1e-3  # least distance that the matching gradient is divided by


def spread(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B,)` -> `(B, 1, ...)` for samples such as `like (B, ...)`."""
    return t.view(-1, *[1] * (like.ndim - 1))


def add_noise(x1: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t of samples `x1 (B, ...)` at times `t (B,)`."""
    return (1 - spread(t, x1)) * noise + spread(t, x1) * x1


def draw_times(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform times `(count,)` within `TIMES`."""
    return TIMES[0] + (TIMES[1] - TIMES[0]) * torch.rand(count, device=device)


@torch.no_grad()
def matching_gradient(
    samples: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, real: Denoiser, fake: Denoiser
) -> torch.Tensor:
    """Where `samples (B, ...)` should *not* go: the difference of the two estimates of their noisy
    selves, `fake - real`, over the mean distance of each sample from the real estimate, in float32.
    0 where both models agree."""
    noisy = add_noise(samples, t, noise)
    wanted = real(noisy, t).float()
    found = fake(noisy, t).float()
    # Near t = 0 the estimates are far from the sample and their difference is large. Divided by
    # that distance, all times pull about equally, as in DMD.
    scale = (samples.float() - wanted).abs().flatten(1).mean(1) + EPSILON
    return (found - wanted) / spread(scale, samples)


def matching_loss(samples: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient with respect to `samples (B, ...)` is `gradient / B`."""
    # The derivative of 0.5 (s - target)^2 is s - target, which is `gradient`: it reaches the
    # student although no network is differentiated with respect to the sample.
    target = (samples - gradient).detach()
    return 0.5 * (samples - target).square().flatten(1).sum(1).mean()


def denoising_loss(
    denoise: Denoiser, x1: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Squared error of the estimate of `x1 (B, ...)`. The flow-matching loss weights it by 1 / (1 -
    t)^2; the best estimate is the same at every t, and without the weight times near 1 do not drown
    the others."""
    return (denoise(add_noise(x1, t, noise), t).float() - x1.float()).square().mean()


@torch.no_grad()
def integrate(denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Euler's end point of the denoiser's flow from `noise (B, ...)`."""
    x = noise
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        # dx/dt = (x1 - x) / (1 - t) over a step of 1 / steps, where 1 - t = (steps - i) / steps.
        # The last step therefore ends exactly at the last estimate.
        x = x + (denoise(x, t) - x) / (steps - i)
    return x


def generate(
    denoise: Denoiser, noise: torch.Tensor, times: Sequence[float], stop: int | None = None
) -> torch.Tensor:
    """The sample of a few-step student: estimate, noise again to the next of `times` (the first is
    0), estimate, ...

    With `stop`, only the first `stop + 1` estimates are made, and only the last has a gradient
    (backward simulation).
    """
    last = len(times) - 1 if stop is None else stop
    x = noise
    for i in range(last + 1):
        t = torch.full((len(x),), float(times[i]), device=x.device)
        if i:
            x = add_noise(x, t, torch.randn_like(x))
            torch.clear_autocast_cache()  # before torch 2.13 it holds casts without a gradient
        # a gradient through all estimates would need their activations at once
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
            x = denoise(x, t)
    return x


class Distiller:
    """A student that is drawn to the teacher's distribution, with a model of its own samples that
    follows it.

    Args:
        real, fake, student: denoisers; `real` is frozen and may hold guidance, `fake` starts as a
            copy of it. With a context, such as a prompt, they take it as a third argument.
        student_optimizer, fake_optimizer: of their parameters; `step` needs them, the losses do
            not.
        times: when the student estimates; one time, 0, is a one-step student.
        fake_updates (`int`): updates of `fake` for each of the student.
        matching_weight (`float`): of the matching loss; 0 is regression alone, for which `fake` may
            be None.
        regression_weight (`float`): of the squared distance to the ends of the teacher's
            trajectories `pairs`.
        pairs (`tuple`): noise and the teacher's samples for it, `(M, ...)` each.
    """

    def __init__(
        self,
        real: Denoiser,
        fake: Denoiser | None,
        student: Denoiser,
        student_optimizer: torch.optim.Optimizer | None = None,
        fake_optimizer: torch.optim.Optimizer | None = None,
        times: Sequence[float] = (0.0,),
        fake_updates: int = 5,
        matching_weight: float = 1.0,
        regression_weight: float = 0.0,
        pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        if (
            not times
            or times[0] != 0
            or any(a >= b for a, b in zip(times, times[1:]))
            or times[-1] >= 1
        ):
            raise ValueError(f"`times` ({tuple(times)}) must rise from 0 and stay below 1.")
        if min(matching_weight, regression_weight) < 0 or matching_weight + regression_weight == 0:
            raise ValueError(
                f"`matching_weight` ({matching_weight}) and `regression_weight` "
                f"({regression_weight}) must not be negative, and "
                "one of them must be positive."
            )
        if regression_weight and pairs is None:
            raise ValueError(
                f"`regression_weight` ({regression_weight}) needs `pairs` of noise and teacher "
                "samples."
            )
        self.real = real
        self.fake = fake
        self.student = student
        self.student_optimizer = student_optimizer
        self.fake_optimizer = fake_optimizer
        self.times = tuple(times)
        # regression alone asks no fake model
        self.fake_updates = fake_updates if matching_weight else 0
        self.matching_weight = matching_weight
        self.regression_weight = regression_weight
        self.pairs = pairs
        self.updates = {"fake": 0, "student": 0}

    def schedule(self) -> list[str]:
        """Which model each update of one round is of."""
        return ["fake"] * self.fake_updates + ["student"]

    def step(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> dict[str, float]:
        """One round: `fake_updates` updates of the fake model and one of the student, on new
        samples of `shape (B, ...)`."""
        found = {}
        for name in self.schedule():
            loss = (self.fake_loss if name == "fake" else self.student_loss)(shape, device)
            optimizer = self.fake_optimizer if name == "fake" else self.student_optimizer
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.updates[name] += 1
            found[f"{name}_loss"] = float(loss.detach())
        return found

    def fake_loss(
        self, shape: tuple[int, ...], device: torch.device | str = "cpu", context: Any = None
    ) -> torch.Tensor:
        """How well the fake model denoises new samples of the student, `shape (B, ...)`."""
        # the fake model learns what the student makes, and must not change it
        with torch.no_grad():
            samples = self._sample(shape, device, context)
        noise = torch.randn(shape, device=device)
        return denoising_loss(
            _given(self.fake, context), samples, draw_times(shape[0], device), noise
        )

    def student_loss(
        self,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        context: Any = None,
        pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
        pairs_context: Any = None,
    ) -> torch.Tensor:
        """Matching loss of new samples of `shape (B, ...)` plus the weighted regression on `pairs`,
        by default some drawn from all."""
        total = torch.zeros((), device=device)
        if self.matching_weight:
            samples = self._sample(shape, device, context)
            noise = torch.randn(shape, device=device)
            real = _given(self.real, context)
            fake = _given(self.fake, context)
            gradient = matching_gradient(samples, draw_times(shape[0], device), noise, real, fake)
            total = total + self.matching_weight * matching_loss(samples, gradient)
        if self.regression_weight:
            if pairs is None:
                chosen = torch.randint(len(self.pairs[0]), (shape[0],), device=device)
                pairs = tuple(part[chosen] for part in self.pairs)
            total = total + self.regression_weight * self._regression(*pairs, pairs_context)
        return total

    def _regression(self, start: torch.Tensor, end: torch.Tensor, context: Any) -> torch.Tensor:
        """Squared distance from the teacher's `end` of what the student makes of its `start`, or
        later of noisy ends."""
        # drawn on the host: which time it is decides what is computed
        index = int(torch.randint(len(self.times), ())) if len(self.times) > 1 else 0
        t = torch.full((len(start),), self.times[index], device=start.device)
        # At t = 0 there is one right answer for each noise. Later times see a noisy version of the
        # end, as in sampling, where the noise is drawn anew.
        x = add_noise(end, t, torch.randn_like(end)) if index else start
        return (_given(self.student, context)(x, t) - end).square().flatten(1).sum(1).mean()

    def _sample(
        self, shape: tuple[int, ...], device: torch.device | str, context: Any
    ) -> torch.Tensor:
        # each estimate of the chain is trained equally often, on inputs that the student makes
        # itself
        stop = int(torch.randint(len(self.times), ()))
        return generate(
            _given(self.student, context), torch.randn(shape, device=device), self.times, stop
        )


def _given(denoise: Callable, context: Any) -> Denoiser:
    return denoise if context is None else lambda x, t: denoise(x, t, context)
