"""The sampler: noise and what is already known -> clean latents, block after block.

Notable choices: any flow scheduler fits, since it only sees velocities; a model that predicts token probabilities draws
tokens from them at every step, so that x at the next time is distributed as it should be however few the steps are, as
long as tokens that are decided together do not depend on each other; what is done stays in a key/value cache.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import DynamicCache

try:
    from .codec_chunk_tokcom import TokComCodecOutput
    from .modeling_tokcom import TokComModel
    from .token_head_tokcom import TokComChoice
    from .transformer_tokcom import block_causal_mask
except ImportError:
    if __package__:
        raise
    import codec_chunk_tokcom as _codec_chunk
    import modeling_tokcom as _modeling
    import token_head_tokcom as _token_head
    import transformer_tokcom as _transformer

    TokComCodecOutput = _codec_chunk.TokComCodecOutput
    TokComModel, TokComChoice = _modeling.TokComModel, _token_head.TokComChoice
    block_causal_mask = _transformer.block_causal_mask


def split_blocks(length: int, block_size: int | None, edges: tuple[int, ...] = ()) -> list[slice]:
    """Cut `length` latents into blocks of at most `block_size` that do not cross `edges`; None is one block."""
    if block_size is None:
        return [slice(0, length)]
    bounds = [0, *edges, length]
    starts = [s for low, high in zip(bounds, bounds[1:]) for s in range(low, high, block_size)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length])]


class _Step(NamedTuple):
    """One step of a block, the same for all blocks of its length.

    `time (1, Q)` of the latents, `times (B, Q, K)` of their tokens, which are `uncertain`, which are `chosen` to be drawn,
    all None without a token head; `modulations (1, Q, ...)` of the network's layers, `gain (1, Q, C)` or a number: velocity per
    difference from the estimate.
    """

    time: torch.Tensor
    times: torch.Tensor | None
    uncertain: TokComChoice | None
    chosen: TokComChoice | None
    modulations: list[torch.Tensor]
    gain: torch.Tensor | float


@dataclass
class TokComBlockSampler:
    """Denoises blocks of latents with one model, scheduler and setting.

    Args:
        num_inference_steps (`int`): steps per block.
        guidance_scale (`float`): 1 is off; what the network predicts is moved away from its prediction without context.
        temperature, top_p (`float`): of token probabilities; see `TokComTokenHead.draw`.
        generator: source of what is drawn during sampling, one or one per row.
        interrupt (`bool`): once true, the remaining steps are left out.
    """

    model: TokComModel
    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    generator: torch.Generator | list[torch.Generator] | None = None
    interrupt: bool = False

    def __post_init__(self):
        for setting in ("temperature", "top_p"):
            value = getattr(self, setting)
            if value <= 0 or (value != 1.0 and self.model.token_head is None) or (setting == "top_p" and value > 1):
                raise ValueError(
                    f"`{setting}` ({value}) must be positive, `top_p` at most 1, and both 1 for `prediction_type="
                    f"{self.model.config.prediction_type!r}`: only 'tokens' has probabilities."
                )
        self._plans: dict[int, list[_Step]] = {}
        name, config = type(self.scheduler).__name__, self.scheduler.config
        plain = name in ("TokComFlowMatchScheduler", "FlowMatchEulerDiscreteScheduler")
        noisy = config.get("eta") or config.get("stochastic_sampling")
        if self.model.token_head is not None and (not plain or noisy):
            raise ValueError(
                f"{name} (eta {config.get('eta')}) cannot sample `prediction_type='tokens'`, whose tokens have times of "
                "their own; use TokComFlowMatchScheduler with eta 0 or FlowMatchEulerDiscreteScheduler."
            )

    def set_timesteps(self, sigma_start: float, device: torch.device) -> None:
        """Lay out the scheduler's grid from `sigma_start`; raises `ValueError` if the scheduler cannot start there."""
        scheduler = self.scheduler
        if sigma_start == 1.0:
            scheduler.set_timesteps(self.num_inference_steps, device=device)
            return
        shift = scheduler.config.get("shift", 1.0)  # the scheduler shifts what it is given: undo that first
        start = sigma_start / (shift - (shift - 1) * sigma_start)
        sigmas = torch.linspace(start, 0.0, self.num_inference_steps + 1)[:-1]
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=sigmas.numpy(), device=device)
            if abs(float(scheduler.sigmas[0]) - sigma_start) < 1e-3:
                return
        raise ValueError(
            f"{type(scheduler).__name__} cannot start between noise and text (sigma {sigma_start:.2f}); "
            "use TokComFlowMatchScheduler, FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler."
        )

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, time: float) -> torch.Tensor:
        """Clean `latents (B, n, C)` and `noise` -> x at the `time` in [0, 1] of every block."""
        times = torch.empty(latents.shape[:2], device=latents.device)
        for block in split_blocks(latents.shape[1], self.model.config.transformer_config.block_size):
            places = torch.arange(block.stop - block.start, device=latents.device)
            times[:, block] = self.model.latent_times(time, places, len(places))
        signal = self.model.channel_times(times)
        return (1 - signal) * noise + signal * latents

    def blocks(
        self,
        noise: torch.Tensor,
        context: TokComCodecOutput | None = None,
        position_ids: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        sigma_start: float = 1.0,
        edges: tuple[int, ...] = (),
        on_step_end: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Denoise `noise (B, n, C)` given clean context latents; yields each block when it is clean: latents `(B, Q, C)`
        and ids `(B, Q * K)`, which are None for the last block of a model that draws none.

        `position_ids (B, n, A)` says where the new latents stand, `valid (B, n)` which of them exist. Blocks are
        denoised in the order given and do not cross `edges`, indices where something known lies between neighbours.
        `on_step_end(block, step, timestep, x)` returns x.
        """
        if position_ids is None:
            index = torch.arange(noise.shape[1], device=noise.device)
            position_ids = self.model.codec.positions(index.expand(len(noise), -1))
        if valid is None:
            valid = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
        known = _Known(self.model, context, noise)
        for index, block in enumerate(split_blocks(noise.shape[1], known.block_size, edges)):
            after = None if on_step_end is None else partial(on_step_end, index)
            x, ids = self._denoise(noise[:, block], known, position_ids[:, block], valid[:, block], sigma_start, after)
            last = block.stop == noise.shape[1]
            if ids is None and not last:
                ids = self.model.to_ids(x)
            yield x, ids
            if not last:
                known.append(ids, position_ids[:, block], valid[:, block])

    def _plan(self, x: torch.Tensor, sigma_start: float) -> list[_Step]:
        """Lay out the scheduler's grid for a block `x (B, Q, C)`, and what is the same at each step of all blocks."""
        length, device = x.shape[1], x.device
        self.set_timesteps(sigma_start, device)
        if length in self._plans:
            return self._plans[length]
        model, places, plan = self.model, torch.arange(length, device=device), []
        sigmas = self.scheduler.sigmas.tolist()
        for sigma, next_sigma in zip(sigmas, sigmas[1:]):
            now, then = (model.latent_times(1 - s, places, length)[None] for s in (sigma, next_sigma))
            times, uncertain, chosen, gain = None, None, None, 1 / sigma
            if model.token_head is not None:
                times = model.token_head.place_times(now).expand(len(x), -1, -1)
                due = times < 1
                if not model.config.transformer_config.self_conditioning:
                    due = due & (model.token_head.progress(then) > 0)  # the turn of the others comes later
                chosen, uncertain = TokComChoice.of(due), TokComChoice.of((times > 0) & (times < 1))
                # the mean velocity until `next_sigma`: Euler's step is exact for every token
                now_, then_ = model.channel_times(now), model.channel_times(then)
                gain = (then_ - now_) / (1 - now_).clamp_min(1e-6) / (sigma - next_sigma)
            modulations = model.transformer.modulate(now.clamp(0, 1))
            plan.append(_Step(now, times, uncertain, chosen, modulations, gain))
        self._plans[length] = plan
        return plan

    def _denoise(self, x, known: "_Known", position_ids, valid, sigma_start, on_step_end):
        """One block `(B, Q, C)` from noise, or from `sigma_start`, to clean latents and, if tokens were drawn, their ids."""
        scheduler, head, estimate, chunks = self.scheduler, self.model.token_head, None, None
        plan, keys = self._plan(x, sigma_start), known.keys(valid)
        extra = {"generator": self.generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        if head is not None:
            chunks = torch.zeros_like(plan[0].times, dtype=torch.long)
            chunks = chunks if sigma_start == 1 else head.recognise(known.symbols, x, plan[0].times)
        for i, (timestep, step) in enumerate(zip(scheduler.timesteps, plan)):
            if self.interrupt:
                return x, None
            estimate, chunks = self._estimate(x, step, known, position_ids, valid, keys, estimate, chunks)
            velocity = (x - estimate) * step.gain
            moved = scheduler.step(velocity, timestep, x, **extra, return_dict=False)[0]
            x = moved if on_step_end is None else on_step_end(i, timestep, moved)
            if chunks is not None and x is not moved:  # a callback has changed it
                then = plan[i + 1].times if i + 1 < len(plan) else torch.ones_like(step.times)
                chunks = head.recognise(known.symbols, x, then)
        return x, None if chunks is None else self.model.codec.from_symbols(chunks)

    def _estimate(self, x, step: _Step, known: "_Known", position_ids, valid, keys, previous, chunks):
        """x1 `(B, Q, C)` in float32 for the noisy block `x`, and the ids `(B, Q, K)` of its tokens if they are drawn."""
        states = known.predict(x, step, position_ids, keys, previous, chunks)
        if self.guidance_scale != 1.0 and known.mask.shape[1]:
            own = None if bool(valid.all()) else valid
            free = self.model.predict(x, step.time, position_ids, own, previous, **known.reading(step, chunks))
            states = free.latents + self.guidance_scale * (states - free.latents)
        head = self.model.token_head
        if head is None:
            return states.float(), None
        uniform = torch.special.ndtr(randn_tensor(step.times.shape, generator=self.generator, device=x.device))
        settings = step.chosen, uniform, self.temperature, self.top_p
        drawn = head.draw(states, known.symbols, x, step.times, *settings)
        chunks = torch.where(step.times == 1, chunks, drawn)
        return head.latents_of(known.symbols, chunks), chunks


class _Known:
    """What is already known while blocks are denoised: a key/value cache, or for bidirectional models the latents."""

    def __init__(self, model: TokComModel, context: TokComCodecOutput | None, like: torch.Tensor):
        config = model.config.transformer_config
        self.model, self.block_size, self.window = model, config.block_size, config.max_position_embeddings
        self.context, self.symbols = context, model.symbols()
        self.mask = torch.ones(like.shape[0], 0, dtype=torch.bool, device=like.device)  # (B, keys known so far)
        self.cache = None if self.block_size is None else DynamicCache()
        if context is None:
            return
        self.mask = context.mask
        if self.cache is not None:
            length = context.latents.shape[1]
            order = (torch.arange(length, device=like.device) + -length % self.block_size) // self.block_size
            sees = block_causal_mask(order[None].expand(len(like), -1), context.mask)[:, :length, :length]
            self._remember(context.latents, context.position_ids, sees)
            self._trim()

    def reading(self, step: _Step, chunks) -> dict:
        """What spares `TokComModel.predict` work; `chunks (B, Q, K)` are the ids of the block's tokens that are clean."""
        tokens = {"symbols": self.symbols, "times": step.times, "chunks": chunks, "uncertain": step.uncertain}
        return tokens | {"modulations": step.modulations}

    def predict(self, x, step: _Step, position_ids, keys, previous, chunks) -> torch.Tensor:
        """What the network predicts, given what is known, for the noisy block `x (B, Q, C)`, which sees `keys`."""
        if self.cache is None and self.context is not None:
            known, time = self.context, step.time.expand(x.shape[:2])
            known_time = torch.ones_like(time[:, :1])
            if not self.model.config.transformer_config.per_latent_timestep:
                known_time = time[:, :1]
            previous = None if previous is None else torch.cat((torch.zeros_like(known.latents), previous), dim=1)
            return self.model.predict(
                torch.cat((known.latents.to(x.dtype), x), dim=1),
                torch.cat((known_time.expand(known.mask.shape), time), dim=1),
                torch.cat((known.position_ids, position_ids), dim=1),
                keys,
                previous,
                symbols=self.symbols,
            ).latents[:, -x.shape[1] :]
        reading = self.reading(step, chunks)
        states = self.model.predict(x, step.time, position_ids, keys, previous, self.cache, **reading).latents
        if self.cache is not None:
            self._keep(slice(0, self.mask.shape[1]))
        return states

    def append(self, ids, position_ids, valid) -> None:
        """Remember a finished block by the ids `(B, Q * K)` it decodes to, whose clean latents are what training shows."""
        chunks = None if self.symbols is None else self.model.codec.symbols(ids, None)[0]
        self._remember(self.model.encode(ids).latents, position_ids, self.keys(valid), chunks)
        self.mask = torch.cat((self.mask, valid), dim=1)
        self._trim()

    def _remember(self, clean, position_ids, sees, chunks=None) -> None:
        """Run clean latents through the model for what they leave in the cache."""
        known = {"num_context": clean.shape[1], "symbols": self.symbols, "chunks": chunks}
        self.model.predict(clean, 1.0, position_ids, sees, past_key_values=self.cache, **known)

    def _trim(self) -> None:
        """Forget the oldest latents, so that the next block still fits into the model's window."""
        excess = self.mask.shape[1] + self.block_size - self.window
        if excess > 0:
            self.mask = self.mask[:, excess:]
            self._keep(slice(excess, None))

    def _keep(self, keys: slice) -> None:
        for layer in self.cache.layers:
            if layer.is_initialized:  # context layers are not, while nothing is known
                layer.keys, layer.values = layer.keys[:, :, keys], layer.values[:, :, keys]

    def keys(self, valid: torch.Tensor) -> torch.Tensor | None:
        """Which latents exist of those known and the block `valid (B, Q)`; None if all do."""
        keys = torch.cat((self.mask, valid), dim=1)
        return None if bool(keys.all()) else keys


__all__ = ["TokComBlockSampler", "split_blocks"]
