"""Few-step students of a flow model: regression on the teacher's trajectories, and distribution matching distillation.

After DMD (Yin et al. 2024) and DMD2 (Yin et al. 2024), in this repository's notation: `x_t = (1 - t) x0 + t x1`, t = 1 is clean, a
denoiser maps `(x_t, t)` to its estimate of x1. The score of either distribution is a function of that estimate, so the student's
gradient needs two estimates and no score. The teacher must estimate E[x1 | x_t], which training by squared error gives, and
cross-entropy alone does not.

Shape legend: B samples, `...` any shape of one sample; times are `(B,)`.
"""

from collections.abc import Callable, Sequence

import torch

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TIMES = (0.02, 0.98)  # beyond them one of the two estimates says nothing
EPSILON = 1e-3


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
    """Where `samples (B, ...)` should *not* go: the difference of the two estimates of their noisy selves, `fake - real`, over
    the mean distance of each sample from the real estimate, in float32. 0 where both models agree."""
    noisy = add_noise(samples, t, noise)
    wanted, found = real(noisy, t).float(), fake(noisy, t).float()
    scale = (samples.float() - wanted).abs().flatten(1).mean(1) + EPSILON
    return (found - wanted) / spread(scale, samples)


def matching_loss(samples: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient with respect to `samples (B, ...)` is `gradient / B`."""
    target = (samples - gradient).detach()
    return 0.5 * (samples - target).square().flatten(1).sum(1).mean()


def denoising_loss(denoise: Denoiser, x1: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Squared error of the estimate of `x1 (B, ...)`. The flow-matching loss weights it by 1 / (1 - t)^2; the best estimate is
    the same at every t, and without the weight times near 1 do not drown the others."""
    return (denoise(add_noise(x1, t, noise), t).float() - x1.float()).square().mean()


@torch.no_grad()
def integrate(denoise: Denoiser, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Euler's end point of the denoiser's flow from `noise (B, ...)`."""
    x = noise
    for i in range(steps):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = x + (denoise(x, t) - x) / (steps - i)
    return x


def generate(denoise: Denoiser, noise: torch.Tensor, times: Sequence[float], stop: int | None = None) -> torch.Tensor:
    """The sample of a few-step student: estimate, noise again to the next of `times` (the first is 0), estimate, ...

    With `stop`, only the first `stop + 1` estimates are made, and only the last has a gradient (backward simulation).
    """
    last = len(times) - 1 if stop is None else stop
    x = noise
    for i in range(last + 1):
        t = torch.full((len(x),), float(times[i]), device=x.device)
        if i:
            x = add_noise(x, t, torch.randn_like(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
            x = denoise(x, t)
    return x


class Distiller:
    """A student that is drawn to the teacher's distribution, with a model of its own samples that follows it.

    Args:
        real, fake, student: denoisers; `real` is frozen and may hold guidance, `fake` starts as a copy of it.
        student_optimizer, fake_optimizer: of their parameters.
        times: when the student estimates; one time, 0, is a one-step student.
        fake_updates (`int`): updates of `fake` for each of the student.
        regression_weight (`float`): of the squared distance to the ends of the teacher's trajectories `pairs`.
        pairs (`tuple`): noise and the teacher's samples for it, `(M, ...)` each.
    """

    def __init__(
        self,
        real: Denoiser,
        fake: Denoiser,
        student: Denoiser,
        student_optimizer: torch.optim.Optimizer,
        fake_optimizer: torch.optim.Optimizer,
        times: Sequence[float] = (0.0,),
        fake_updates: int = 5,
        regression_weight: float = 0.0,
        pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        if not times or times[0] != 0 or any(a >= b for a, b in zip(times, times[1:])) or times[-1] >= 1:
            raise ValueError(f"`times` ({tuple(times)}) must rise from 0 and stay below 1.")
        if regression_weight and pairs is None:
            raise ValueError(f"`regression_weight` ({regression_weight}) needs `pairs` of noise and teacher samples.")
        self.real, self.fake, self.student = real, fake, student
        self.student_optimizer, self.fake_optimizer = student_optimizer, fake_optimizer
        self.times, self.fake_updates = tuple(times), fake_updates
        self.regression_weight, self.pairs, self.updates = regression_weight, pairs, {"fake": 0, "student": 0}

    def step(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> dict[str, float]:
        """`fake_updates` updates of the fake model and one of the student, on new samples of `shape (B, ...)` each."""
        for _ in range(self.fake_updates):
            with torch.no_grad():
                samples = self._sample(shape, device)
            loss = denoising_loss(self.fake, samples, draw_times(shape[0], device), torch.randn(shape, device=device))
            self._update("fake", self.fake_optimizer, loss)
        samples = self._sample(shape, device)
        noise = torch.randn(shape, device=device)
        gradient = matching_gradient(samples, draw_times(shape[0], device), noise, self.real, self.fake)
        matching = total = matching_loss(samples, gradient)
        if self.regression_weight:
            chosen = torch.randint(len(self.pairs[0]), (shape[0],), device=device)
            start, end = (part[chosen] for part in self.pairs)
            distance = (generate(self.student, start, self.times[:1]) - end).square().flatten(1).sum(1).mean()
            total = total + self.regression_weight * distance
        self._update("student", self.student_optimizer, total)
        return {"fake_loss": float(loss.detach()), "matching_loss": float(matching.detach())}

    def _sample(self, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
        stop = int(torch.randint(len(self.times), ()))
        return generate(self.student, torch.randn(shape, device=device), self.times, stop)

    def _update(self, name: str, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.updates[name] += 1
