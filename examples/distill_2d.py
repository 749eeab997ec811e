"""Distill a flow model of eight modes in the plane to one step, in three ways.

    python examples/distill_2d.py --picture docs/distill_2d.png

A student of one step is trained by regression, by distribution matching, and by both. For each the
share of samples within 0.4 of a mode is printed, and how many modes are met. Takes about two
minutes on one CPU core.
"""

import argparse
import copy
import math

import matplotlib
import torch
from torch import nn
from tqdm.auto import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tokcom.cli.errors import report_errors
from tokcom.training.student_losses import Distiller, denoising_loss, generate, integrate

RADIUS = 2.0  # of the circle of modes
SPREAD = 0.1  # standard deviation of a mode
NEAR = 0.4  # samples nearer to a mode than this belong to it
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = RADIUS * torch.stack((ANGLES.cos(), ANGLES.sin()), dim=-1)  # (8, 2)


class Denoiser(nn.Module):
    """A small network `(x_t (B, 2), t (B,)) -> x1 (B, 2)`."""

    def __init__(self, width: int = 128, frequencies: int = 8):
        super().__init__()
        # the slowest makes a quarter of a turn while t goes from 0 to 1, each other one twice as
        # many
        self.frequencies = nn.Buffer(2.0 ** torch.arange(frequencies) * math.pi / 2)
        sizes = [2 + 2 * frequencies, width, width, width]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.network = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        phase = t[:, None] * self.frequencies  # (B, frequencies)
        return self.network(torch.cat((x, phase.sin(), phase.cos()), dim=-1))


def draw_data(count: int) -> torch.Tensor:
    return MODES[torch.randint(8, (count,))] + SPREAD * torch.randn(count, 2)


def quality(samples: torch.Tensor) -> tuple[float, int]:
    """Share of `samples (B, 2)` that are near a mode, and modes with at least 1 % of them."""
    distances = torch.cdist(samples, MODES)  # (B, 8)
    near = distances.min(1).values < NEAR
    # points between modes belong to none
    counts = torch.bincount(distances.argmin(1)[near], minlength=8)
    return near.float().mean().item(), int((counts >= len(samples) / 100).sum())


def train_teacher(steps: int, batch: int) -> Denoiser:
    """A flow model by regression of x1, whose estimate is E[x1 | x_t]."""
    teacher = Denoiser()
    optimizer = torch.optim.AdamW(teacher.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="teacher"):
        loss = denoising_loss(teacher, draw_data(batch), torch.rand(batch), torch.randn(batch, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.requires_grad_(False)


def train_regression(teacher: Denoiser, pairs: tuple, steps: int, batch: int) -> Denoiser:
    """A one-step student of the ends of the teacher's trajectories."""
    # begins as the teacher, whose first estimate is the mean of all modes
    student = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for _ in tqdm(range(steps), desc="regression"):
        chosen = torch.randint(len(pairs[0]), (batch,))
        loss = (student(pairs[0][chosen], torch.zeros(batch)) - pairs[1][chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def train_student(
    teacher: Denoiser, pairs: tuple, steps: int, batch: int, weight: float
) -> Denoiser:
    """A one-step student by distribution matching, with regression of some `weight` beside it."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    optimizers = (
        # no momentum, as in training/distill.py
        torch.optim.AdamW(student.parameters(), 5e-4, (0.0, 0.99)),
        torch.optim.AdamW(fake.parameters(), 1e-3),
    )
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, n)
        for o, n in zip(optimizers, (steps, 5 * steps))
    ]
    distiller = Distiller(
        teacher, fake, student, *optimizers, regression_weight=weight, pairs=pairs
    )
    for _ in tqdm(range(steps), desc=f"matching, regression {weight}"):
        distiller.step((batch, 2))
        # the fake model makes several updates for each of the student
        schedules[0].step()
        for _ in range(distiller.fake_updates):
            schedules[1].step()
    return student


@torch.no_grad()
def run(seed: int, teacher_steps: int, student_steps: int, batch: int) -> dict[str, torch.Tensor]:
    """Samples `(4096, 2)` of every system."""
    torch.manual_seed(seed)
    with torch.enable_grad():
        teacher = train_teacher(teacher_steps, batch)
    start = torch.randn(16384, 2)
    pairs = start, integrate(teacher, start, 100)
    # the same noise for all systems
    noise = torch.randn(4096, 2)
    found = {
        f"teacher, {steps} step{'s' * (steps > 1)}": integrate(teacher, noise, steps)
        for steps in (100, 4, 1)
    }
    with torch.enable_grad():
        students = {
            "regression, 1 step": train_regression(teacher, pairs, student_steps, batch),
            "matching, 1 step": train_student(teacher, pairs, student_steps, batch, 0.0),
            "matching + regression, 1 step": train_student(
                teacher, pairs, student_steps, batch, 0.25
            ),
        }
    return found | {name: generate(student, noise, (0.0,)) for name, student in students.items()}


@report_errors()
def main(argv: list[str] | None = None) -> dict[str, tuple[float, int]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything (default: 0)")
    add("--teacher_steps", type=int, default=4000, help="training steps (default: 4000)")
    add("--student_steps", type=int, default=2000, help="training steps of each (default: 2000)")
    add("--batch_size", type=int, default=256, help="points in each step (default: 256)")
    add("--picture", help="PNG file of all samples (default: none)")
    args = parser.parse_args(argv)
    samples = run(args.seed, args.teacher_steps, args.student_steps, args.batch_size)
    results = {name: quality(points) for name, points in samples.items()}
    for name, (near, modes) in results.items():
        print(f"{name:30} {near:.2f} near a mode, {modes} of 8 modes")
    if args.picture:
        figure, axes = plt.subplots(
            1, len(samples), figsize=(3 * len(samples), 3.3), sharex=True, sharey=True
        )
        for panel, (name, points) in zip(axes, samples.items()):
            panel.scatter(*points.T, s=1, alpha=0.3)
            panel.scatter(*MODES.T, s=20, marker="x", color="black")
            panel.set_title(
                f"{name}\n{results[name][0]:.2f} near, {results[name][1]}/8 modes", fontsize=9
            )
            panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        figure.tight_layout()
        figure.savefig(args.picture, dpi=90)
    return results


if __name__ == "__main__":
    main()
