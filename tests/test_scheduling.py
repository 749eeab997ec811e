import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from helpers import STOCK_SCHEDULERS

from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.presets import preset_config


def posterior_mean(x, sigma, mean, std, noise_std=1.0):
    """E[x1 | x_sigma] for x1 ~ N(mean, std^2), in closed form."""
    a, b = 1 - sigma, sigma * noise_std
    return mean + a * std**2 / (a**2 * std**2 + b**2) * (x - a * mean)


def run(scheduler, x, steps, mean, std, noise_std=1.0, generator=None):
    scheduler.set_timesteps(steps)
    extra = {"generator": generator} if generator is not None else {}
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        velocity = (x - posterior_mean(x, sigma, mean, std, noise_std)) / sigma
        x = scheduler.step(velocity, t, x, return_dict=False, **extra)[0]
    return x


def test_fifty_euler_steps_recover_a_gaussian():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    result = run(TokComFlowMatchScheduler(), x, 50, 1.5, 0.5)
    assert abs(result.mean().item() - 1.5) < 0.02 and abs(result.std().item() - 0.5) < 0.03


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("noise_std", [1.0, 2.0])
def test_stochastic_sampling_keeps_the_distribution(eta, noise_std):
    generator = torch.Generator().manual_seed(0)
    x = noise_std * torch.randn(100_000, generator=generator)
    scheduler = TokComFlowMatchScheduler(eta=eta, noise_std=noise_std)
    result = run(scheduler, x, 200, 1.5, 0.5, noise_std, generator)
    assert abs(result.mean().item() - 1.5) < 0.02 and abs(result.std().item() - 0.5) < 0.03


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_oracle_denoiser_recovers_its_x1_exactly(steps, shift):
    x1, x = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scheduler = TokComFlowMatchScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        output = scheduler.step((x - x1) / scheduler.sigmas[i], t, x)
        x = output.prev_sample
        torch.testing.assert_close(output.pred_original_sample, x1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, x1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stock", STOCK_SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_stock_schedulers_are_drop_in(stock, shift):
    x = 2.0 * torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(0))
    scheduler = stock.from_config(TokComFlowMatchScheduler(shift=shift, noise_std=2.0).config)
    result = run(scheduler, x, 64, 1.5, 0.3, noise_std=2.0)
    exact = 1.5 + 0.3 * x / 2.0  # the flow map between two Gaussians
    assert (result - exact).abs().mean() < 0.03


def test_stock_schedulers_inherit_the_shift():
    scheduler = DPMSolverMultistepScheduler.from_config(TokComFlowMatchScheduler(shift=2.5).config)
    assert scheduler.config.flow_shift == 2.5 and scheduler.config.use_flow_sigmas


def test_add_noise_takes_continuous_times_per_latent():
    scheduler = TokComFlowMatchScheduler(noise_std=2.0)
    x1, noise = torch.ones(2, 3, 4), torch.full((2, 3, 4), 0.5)
    timesteps = torch.tensor([[0.0, 250.0, 1000.0]]).expand(2, -1)
    noisy = scheduler.add_noise(x1, noise, timesteps)
    assert torch.equal(noisy[0, :, 0], torch.tensor([1.0, 0.75 + 0.25, 1.0]))
    torch.testing.assert_close(
        scheduler.add_noise(x1, noise, torch.tensor(500.0)), 0.5 * x1 + 0.5 * 2.0 * noise
    )


def test_grid_is_shifted_as_training_times_are():
    config = preset_config("debug")
    scheduler = TokComFlowMatchScheduler.from_model_config(config)
    scheduler.set_timesteps(2)
    # training's median sigma is sigmoid(loc); so is the middle of the grid
    assert scheduler.sigmas[1].item() == pytest.approx(
        torch.sigmoid(torch.tensor(config.timestep_loc)).item()
    )
    uniform = TokComFlowMatchScheduler.from_model_config(preset_config("v5.2"))
    assert uniform.config.shift == 1.0 and uniform.config.noise_std == 0.05


def test_config_round_trips(tmp_path):
    TokComFlowMatchScheduler(shift=1.7, noise_std=0.05, eta=0.3).save_pretrained(tmp_path)
    loaded = TokComFlowMatchScheduler.from_pretrained(tmp_path)
    assert (loaded.config.shift, loaded.config.noise_std, loaded.config.eta) == (1.7, 0.05, 0.3)


@pytest.mark.parametrize("arguments", [{"eta": 2.0}, {"shift": 0.0}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=str(list(arguments.values())[0])):
        TokComFlowMatchScheduler(**arguments)
    with pytest.raises(ValueError, match=r"\(0\)"):
        TokComFlowMatchScheduler().set_timesteps(0)
