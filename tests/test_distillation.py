"""The laws of distribution matching: where its gradient vanishes, where it points, how large it is, and what it leaves alone."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from training.distillation import (
    Distiller,
    add_noise,
    denoising_loss,
    draw_times,
    generate,
    integrate,
    matching_gradient,
    matching_loss,
)


def gaussian(mean: float, std: float = 1.0):
    """The exact denoiser of N(mean, std^2)."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, *[1] * (x.ndim - 1))
        gain = t * std**2 / ((1 - t) ** 2 + t**2 * std**2)
        return mean + gain * (x - t * mean)

    return denoise


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + t[:, None]


def drawn(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 4), draw_times(count), torch.randn(count, 4)


def test_there_is_no_gradient_where_both_models_agree():
    samples, t, noise = drawn()
    assert not matching_gradient(samples, t, noise, gaussian(1.0), gaussian(1.0)).any()


def test_samples_move_from_the_fake_mean_to_the_real_one():
    samples, t, noise = drawn()
    gradient = matching_gradient(samples, t, noise, gaussian(2.0), gaussian(0.0))
    assert (gradient < 0).all()  # a step against it goes up, to 2
    assert (matching_gradient(samples, t, noise, gaussian(-2.0), gaussian(0.0)) > 0).all()


def test_the_gradient_is_normalised_for_each_sample_by_its_distance_from_the_real_estimate():
    samples, t, noise = drawn()
    real, fake = gaussian(2.0), gaussian(0.0)
    noisy = add_noise(samples, t, noise)
    difference = fake(noisy, t) - real(noisy, t)
    scale = (samples - real(noisy, t)).abs().mean(1, keepdim=True) + 1e-3
    torch.testing.assert_close(matching_gradient(samples, t, noise, real, fake), difference / scale)


def test_the_loss_has_that_gradient():
    samples = torch.randn(8, 3, requires_grad=True)
    gradient = torch.randn(8, 3)
    matching_loss(samples, gradient).backward()
    torch.testing.assert_close(samples.grad, gradient / 8)


def test_the_best_denoiser_has_the_least_loss():
    torch.manual_seed(0)
    x1, t, noise = 1.5 + 0.5 * torch.randn(4096, 1), draw_times(4096), torch.randn(4096, 1)
    best = denoising_loss(gaussian(1.5, 0.5), x1, t, noise)
    assert best < min(denoising_loss(gaussian(m, s), x1, t, noise) for m, s in ((1.3, 0.5), (1.5, 0.8), (1.5, 0.3)))


def test_euler_recovers_the_gaussian_of_the_teacher():
    torch.manual_seed(0)
    samples = integrate(gaussian(1.5, 0.5), torch.randn(20000, 1), 100)
    assert abs(samples.mean() - 1.5) < 0.02 and abs(samples.std() - 0.5) < 0.02


def test_only_the_last_call_of_a_simulated_student_has_a_gradient():
    student, calls = Linear(), []
    student.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    generate(student, torch.randn(2, 3), (0.0, 0.25, 0.5, 0.75), stop=2)
    assert calls == [False, False, True]


def test_five_updates_of_the_fake_for_one_of_the_student_and_none_of_the_teacher():
    torch.manual_seed(0)
    teacher = Linear()
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    before = copy.deepcopy(teacher.state_dict())
    optimizers = torch.optim.SGD(student.parameters(), 0.1), torch.optim.SGD(fake.parameters(), 0.1)
    distiller = Distiller(teacher, fake, student, *optimizers, times=(0.0, 0.5))
    for _ in range(3):
        distiller.step((16, 3))
    assert distiller.updates == {"fake": 15, "student": 3}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(student.layer.weight, before["layer.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(times=(0.25, 0.5)), "rise from 0"),
        (dict(times=(0.0, 0.5, 0.5)), "rise from 0"),
        (dict(times=(0.0, 1.0)), "below 1"),
        (dict(regression_weight=0.25), "needs `pairs`"),
    ],
)
def test_settings_that_cannot_work_are_named(options, message):
    model = Linear()
    optimizers = (torch.optim.SGD(model.parameters(), 0.1),) * 2
    with pytest.raises(ValueError, match=message):
        Distiller(model, model, model, *optimizers, **options)


def toy():
    spec = importlib.util.spec_from_file_location("distill_2d", ROOT / "examples" / "distill_2d.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_one_step_reaches_all_eight_modes_of_the_plane(seed):
    results = toy().main(["--seed", str(seed)])
    near, modes = results["matching + regression, 1 step"]
    assert results["teacher, 1 step"][0] == 0
    assert near >= 0.6 and modes == 8
