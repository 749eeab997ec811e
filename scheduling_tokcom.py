"""Times: the grid of sampling, and what training draws (times, orders of generation, gaps).

`x_sigma = (1 - sigma) x1 + sigma * noise_std * noise`, with sigma = 1 - t.

Notable choices:
- `step` takes the velocity dx/dsigma, as every stock flow scheduler does, so FlowMatchEuler,
  FlowMatchHeun, DPM++ and UniPC are drop-in replacements through `from_config`.
- The grid is shifted towards noise as much as training's times are (`shift = exp(timestep_loc)`).
- `eta` re-noises with the model's own noise scale.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .configuration_codec_tokcom import RANGES

# `timestep_sampling` -> what DDIMScheduler calls it
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LONGEST_GAP = 24  # tokens
SHORT_GAP = 3  # tokens; the longest gap of half of the rows that have gaps


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise `ValueError` unless `value` is a number between `low` and `high`; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"`{name}` ({value!r}) must be a number between {low:g} and {high:g}.")


@dataclass
class TokComFlowMatchSchedulerOutput(SchedulerOutput):
    """`prev_sample`: x at the next, smaller sigma. `pred_original_sample`: the estimate of x1."""

    pred_original_sample: torch.Tensor | None = None


class TokComFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Euler (`eta=0`) to ancestral (`eta=1`) sampler for rectified flow (Liu et al. 2022; Lipman et
    al. 2022).

    Args:
        num_train_timesteps (`int`): `timesteps` are `sigma * num_train_timesteps`.
        shift (`float`): warp of the grid, `sigma -> shift sigma / (1 + (shift - 1) sigma)`; above 1
            spends more steps on noise (SD3, Esser et al. 2024).
        noise_std (`float`): standard deviation of x0.
        eta (`float`): in [0, 1]; the share of the noise that is drawn anew at each step.
        stochastic_sampling (`bool`): at each step all noise is drawn anew, as few-step students are
            trained to expect; it is the option of that name of FlowMatchEulerDiscreteScheduler, and
            `eta` has no effect.
        prediction_type, use_flow_sigmas, flow_shift: what stock multistep solvers read from this
            config; `flow_shift` always equals `shift`.
    """

    _compatibles = [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        noise_std: float = 1.0,
        eta: float = 0.0,
        stochastic_sampling: bool = False,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
        flow_shift: float | None = None,
    ):
        check_range("shift", shift, 1e-6, 1e6)
        check_range("eta", eta, 0.0, 1.0)
        check_range("noise_std", noise_std, *RANGES["noise_std"])
        check_range("num_train_timesteps", num_train_timesteps, 1, 1_000_000)
        if not isinstance(num_train_timesteps, int):
            raise ValueError(
                f"`num_train_timesteps` ({num_train_timesteps}) must be a whole number."
            )
        self.register_to_config(flow_shift=shift)
        # stock `from_config` drops every value that equals a default of *this* class when it sees
        # this key
        self._internal_dict = FrozenDict(
            {k: v for k, v in self.config.items() if k != "_use_default_values"}
        )
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.set_timesteps(num_train_timesteps)

    @classmethod
    def from_model_config(cls, config) -> "TokComFlowMatchScheduler | DDIMScheduler":
        """The scheduler whose grid matches how a `TokComConfig` was trained: DDIM of the sample for
        the times of a diffusion."""
        if config.timestep_sampling in BETA_SCHEDULES:
            schedule = BETA_SCHEDULES[config.timestep_sampling]
            options = {
                "prediction_type": "sample",
                "clip_sample": False,
                "timestep_spacing": "trailing",
            }
            return DDIMScheduler(beta_schedule=schedule, **options)
        # the middle of the grid is then the median sigma of training, sigmoid(timestep_loc)
        shift = math.exp(config.timestep_loc) if config.timestep_sampling == "logit_normal" else 1.0
        return cls(shift=shift, noise_std=config.noise_std)

    @property
    def init_noise_sigma(self) -> float:
        return self.config.noise_std

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def restart(self) -> None:
        """Begin the same grid anew, at its first step."""
        self._step_index = self._begin_index = 0

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
    ) -> None:
        """Lay out a decreasing grid from sigma = 1, or from given unshifted `sigmas`, to 0; both
        get shifted.

        Raises `ValueError` for fewer than one step.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(
                    f"`num_inference_steps` ({num_inference_steps}) must be at least 1."
                )
            sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
        # shifts towards noise: the log odds of sigma move by log(shift)
        sigmas = self.config.shift * sigmas / (1 + (self.config.shift - 1) * sigmas)
        self.num_inference_steps = len(sigmas)
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])  # a step ends where the next begins
        self._sigmas = self.sigmas.tolist()  # read once, not at every step
        self._step_index = self._begin_index = None

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process at any continuous timestep, `sigma * num_train_timesteps`.

        Args: `original_samples` x1 and standard normal `noise`, both `(B, ...)`; `timesteps` of
        shape `()` or a leading part of the sample's shape, e.g. `(B,)` or `(B, N)`.
        """
        sigma = torch.as_tensor(timesteps, dtype=torch.float32, device=original_samples.device)
        sigma = (sigma / self.config.num_train_timesteps).to(original_samples.dtype)
        sigma = sigma.reshape(*sigma.shape, *([1] * (original_samples.ndim - sigma.ndim)))
        return (1 - sigma) * original_samples + sigma * self.config.noise_std * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TokComFlowMatchSchedulerOutput | tuple[torch.Tensor]:
        """One step from the current sigma to the next.

        Args:
            model_output (`torch.Tensor`): velocity dx/dsigma = (x - x1) / sigma, same shape as
                `sample`.
            timestep: the element of `timesteps` that belongs to this step.
            generator: source of the fresh noise when there is any.
        """
        if self._step_index is None:
            self._step_index = self._begin_index
        if self._step_index is None:
            # the caller may begin in the middle of the grid; to look for it, the host waits
            given = torch.as_tensor(timestep).to(self.timesteps)
            self._step_index = int((self.timesteps - given).abs().argmin())
        sigma = self._sigmas[self._step_index]
        sigma_next = self._sigmas[self._step_index + 1]
        x = sample.float()  # differences of near values
        velocity = model_output.float()
        # x = x1 + sigma * v, so the estimate of x1 lies sigma back along the velocity
        x1 = x - sigma * velocity
        if self.config.stochastic_sampling:
            noise = (
                randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                * self.config.noise_std
            )
            prev_sample = (1 - sigma_next) * x1 + sigma_next * noise  # x_sigma of this x1
        elif self.config.eta > 0 and sigma_next > 0:
            # of the noise left at sigma_next, `fresh` is new and the rest is the estimate of the
            # old noise x0 = x1 + v
            kept = sigma_next * (1 - sigma) / ((1 - sigma_next) * sigma)
            fresh = self.config.eta * sigma_next * math.sqrt(1 - kept**2)
            noise = (
                randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                * self.config.noise_std
            )
            old = math.sqrt(sigma_next**2 - fresh**2)  # variances add up to sigma_next^2
            prev_sample = (1 - sigma_next) * x1 + old * (x1 + velocity) + fresh * noise
        else:
            # Euler: a straight line along the velocity
            prev_sample = x + (sigma_next - sigma) * velocity
        self._step_index += 1
        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return TokComFlowMatchSchedulerOutput(
            prev_sample=prev_sample, pred_original_sample=x1.to(sample.dtype)
        )

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def signal_time(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The time t of the flow with the signal-to-noise ratio of `signal * x1 + noise * x0`."""
    return signal / (signal + noise)


def diffusion_times(shares: torch.Tensor, schedule: str) -> torch.Tensor:
    """Times of the flow for `shares` in [0, 1] of the way from clean to noise in a
    variance-preserving diffusion.

    `schedule` is `"linear"`, betas from 0.0001 to 0.02 in 1000 steps, or `"cosine"` (Nichol and
    Dhariwal 2021).
    """
    if schedule == "linear":
        # the limit of many small steps: exp(-integral of beta), beta from 0.1 to 20
        remains = torch.exp(-(0.1 * shares + (20 - 0.1) * shares.square() / 2))
    else:
        # the offset keeps betas from vanishing near the data
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2  # so that nothing is lost at share 0
        remains = torch.cos((shares + 0.008) / 1.008 * torch.pi / 2).square() / start
    remains = remains.clamp(0, 1)
    return signal_time(remains.sqrt(), (1 - remains).sqrt())


def generation_order(
    valid: torch.Tensor, block_size: int | None, infill_rate: float, group_size: int = 1
) -> torch.Tensor:
    """Draw the step at which each latent is generated, `(B, N)`, for rows of the shape of
    `valid (B, N)`.

    Blocks of `block_size` follow each other from a random offset, so that a prompt may end
    anywhere. In a share `infill_rate` of the rows one random span comes last, after the text that
    follows it. Offset and span are multiples of `group_size`. With `block_size=None` everything is
    one block.
    """
    batch, length = valid.shape
    index = torch.arange(length, device=valid.device).expand(batch, -1)
    if block_size is None:
        return torch.zeros_like(index)
    draws = torch.rand(4, batch, 1, device=valid.device)
    groups = length // group_size
    # a random offset, so that a prompt may end at any latent when sampling
    offset = (draws[0] * (block_size // group_size)).long() * group_size
    order = (index + offset) // block_size
    # two sorted numbers bound the span that comes last
    start, end = (draws[1:3] * (groups + 1)).long().sort(dim=0).values * group_size  # (B, 1) each
    in_gap = (index >= start) & (index < end) & (draws[3] < infill_rate)
    # behind every other order, and still block after block
    return torch.where(in_gap, length + (index - start) // block_size, order)


def draw_known(valid: torch.Tensor, infill_rate: float, group_size: int = 1) -> torch.Tensor:
    """Draw what a bidirectional model is shown clean, `(B, N)`, of the latents that exist,
    `valid (B, N)`.

    That is a prefix, or in a share `infill_rate` of the rows all but a gap, in whole groups of
    `group_size`. At least one group stays unknown.
    """
    draws = torch.rand(3, len(valid), 1, device=valid.device)
    # counted among the latents that exist, since padding may stand in between
    rank = (valid.cumsum(1) - 1) // group_size  # (B, N)
    count = valid.sum(1, keepdim=True) // group_size  # (B, 1)
    # below `count`, so that at least one group stays unknown
    start, end = (draws[:2] * count).long().sort(dim=0).values
    after_gap = torch.where(draws[2] < infill_rate, rank > end, False)
    return valid & ((rank < start) | after_gap)


def draw_gaps(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Draw where texts of `length` tokens are known: runs of known tokens and gaps in turn,
    `(rows, length)`, true if known.

    Half of the rows have gaps of 1 to `LONGEST_GAP` tokens, half of 1 to `SHORT_GAP`; what stands
    between two gaps is 1 to four times as long. Every row begins with either.
    """
    # both kinds of gap are common: a word that is missing, and a sentence
    is_long = torch.rand(rows, 1, device=device) < 0.5
    longest = torch.where(is_long, LONGEST_GAP, SHORT_GAP)  # (rows, 1)
    draws = torch.rand(2, rows, length, device=device)
    gaps = (draws[0] * longest).long() + 1
    runs = (draws[1] * 4 * longest).long() + 1  # (rows, length), more than enough pairs
    # where every run and gap ends, in tokens
    pairs = torch.stack((runs, gaps), dim=-1).flatten(1)  # run, gap, run, gap, ...
    ends = pairs.cumsum(1)
    # rows begin anywhere in their first pair, so that gaps also stand at the start
    offset = (torch.rand(rows, 1, device=device) * ends[:, 1:2]).long()
    places = torch.arange(length, device=device) + offset
    # even intervals are runs, odd ones gaps
    return torch.searchsorted(ends, places, right=True) % 2 == 0


def sample_times(config, order: torch.Tensor, draws: int) -> torch.Tensor:
    """Draw times `(B, M, N)` for latents of blocks `order (B, N)`: one per block and draw, the
    draws in strata."""
    batch, length = order.shape
    # orders go up to length plus the blocks of a gap, so up to 2 * length
    shares = torch.rand(batch, draws, 2 * length + 1, device=order.device)
    # stratified: draw m falls into the m-th of M equal parts, so the times of a latent differ
    shares = (shares + torch.arange(draws, device=order.device)[:, None]) / draws
    if config.timestep_sampling in ("linear", "cosine"):
        shares = diffusion_times(shares, config.timestep_sampling)
    elif config.timestep_sampling == "logit_normal":
        # the inverse normal distribution keeps the strata
        normal = torch.special.ndtri(shares.clamp(1e-6, 1 - 1e-6))  # finite at both ends
        shares = 1 - torch.sigmoid(normal + config.timestep_loc)
    # latents of one block have the same order, so they get the same time
    return shares.gather(2, order[:, None].expand(-1, draws, -1))


__all__ = [
    "TokComFlowMatchScheduler",
    "TokComFlowMatchSchedulerOutput",
    "diffusion_times",
    "draw_gaps",
    "draw_known",
    "generation_order",
    "sample_times",
    "signal_time",
]
