"""The sampler: noise and what is already known -> clean latents, block after block.

Notable choices: any flow scheduler fits, since it only sees velocities, and diffusion schedulers that take estimates of the
sample do, since their x is that of the flow but for its size; a model that predicts token probabilities draws
tokens from them at every step, so that x at the next time is distributed as it should be however few the steps are, as
long as tokens that are decided together do not depend on each other; their steps are laid on the tokens' turns, whatever
the scheduler's grid; what is done stays in a key/value cache; every row has random numbers of its own, so that neither its
company nor its length changes how it begins.
"""

import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from .codec_chunk_tokcom import TokComCodecOutput
from .heads_tokcom import TokComChoice
from .modeling_tokcom import TokComModel
from .scheduling_tokcom import signal_time
from .transformer_tokcom import INSIDE_TEXT, START_OF_TEXT, block_causal_mask


def split_blocks(length: int, block_size: int | None, edges: tuple[int, ...] = ()) -> list[slice]:
    """Cut `length` latents into blocks of at most `block_size` that do not cross `edges`; None is one block."""
    if block_size is None:
        return [slice(0, length)]
    bounds = [0, *edges, length]
    starts = [s for low, high in zip(bounds, bounds[1:]) for s in range(low, high, block_size)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length])]


def spawn_generators(generator: torch.Generator | list[torch.Generator] | None, rows: int) -> list[torch.Generator]:
    """A generator for each of `rows`, seeded by one draw from `generator`, or from each of a list.

    The numbers of a row depend on that draw and on the row's index alone, not on how many rows there are.
    """

    def seed(source: torch.Generator | None) -> int:
        device = "cpu" if source is None else source.device
        return int(torch.randint(2**62, (), generator=source, device=device))

    if isinstance(generator, list):
        bases = [(seed(source), 0) for source in generator]  # each as if it were alone
    else:
        base = seed(generator)
        bases = [(base, row) for row in range(rows)]
    seeds = [random.Random(f"{base}/{row}").getrandbits(63) for base, row in bases]
    return [torch.Generator().manual_seed(value) for value in seeds]


def row_noise(generators: list[torch.Generator], num_latents: int, channels: int) -> torch.Tensor:
    """Standard normal noise `(B, n, C)` on the CPU; that of a latent does not depend on how many follow it."""
    rows = [[torch.randn(channels, generator=source) for _ in range(num_latents)] for source in generators]
    return torch.stack([torch.stack(row) for row in rows])


@dataclass
class TokComGiven:
    """Tokens that are known, whatever their turn, in latents that are generated: the end of a prompt, the edges of a gap.

    Args:
        chunks (`torch.LongTensor` of shape `(B, n, K)`): ids, as the token head counts them. mask: where they are known.
    """

    chunks: torch.Tensor
    mask: torch.Tensor

    def part(self, block: slice) -> "TokComGiven | None":
        """The same of some latents; None if nothing is known of them."""
        mask = self.mask[:, block]
        return TokComGiven(self.chunks[:, block], mask) if bool(mask.any()) else None


@dataclass
class TokComGaps:
    """Gaps in a text that a model with `start_latents` fills, and how its context is read.

    Args:
        lengths (`list[int]`): latents of each gap, in their order.
        anchors (`list[int | None]`): index of the context latent before each gap, which is read last; None is the start.
        ends_known (`list[bool]`): whether a gap ends inside a chunk. That chunk is in the context already, and in part.
        partial (`torch.BoolTensor` of shape `(B, S, K)`): tokens of the context that are not known yet.
    """

    lengths: list[int]
    anchors: list[int | None]
    ends_known: list[bool]
    partial: torch.Tensor


class _Step(NamedTuple):
    """One step of a block, the same for all blocks of its length.

    `time (1, Q)` of the latents, `times (B, Q, K)` of their tokens, which are `uncertain`, which are `chosen` to be drawn,
    all None without a token head; `modulations (1, Q, ...)` of the network's layers, `gain (1, Q, C)` or a number: velocity per
    difference from the estimate, None for a scheduler that wants the estimate itself; `scale`: from its x to that of the flow.
    """

    time: torch.Tensor
    times: torch.Tensor | None
    uncertain: TokComChoice | None
    chosen: TokComChoice | None
    modulations: list[torch.Tensor]
    gain: torch.Tensor | float | None
    scale: float = 1.0


@dataclass
class TokComBlockSampler:
    """Denoises blocks of latents with one model, scheduler and setting.

    Args:
        num_inference_steps (`int`): steps per block.
        guidance_scale (`float`): 1 is off; what the network predicts is moved away from its prediction without context.
        omissions (`list[tuple[torch.BoolTensor, float]]`): instead, of a bidirectional model, parts `(n,)` of the n context latents, and
            by how much the prediction is moved away from the one without each of them.
        temperature, top_p (`float`): of token probabilities; see `TokComTokenHead.draw`.
        generator: source of what is drawn during sampling, one or one per row.
        interrupt (`bool`): once true, the remaining steps and blocks are left out, and of a block-causal text the unfinished one.
    """

    model: TokComModel
    scheduler: SchedulerMixin
    num_inference_steps: int
    guidance_scale: float = 1.0
    omissions: list[tuple[torch.Tensor, float]] = field(default_factory=list)
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
        self._cut = False  # whether the block at hand was left unfinished
        name, config = type(self.scheduler).__name__, self.scheduler.config
        plain = name in ("TokComFlowMatchScheduler", "FlowMatchEulerDiscreteScheduler")
        noisy = config.get("eta") or config.get("stochastic_sampling")
        if self.model.token_head is not None and (not plain or noisy):
            raise ValueError(
                f"{name} (eta {config.get('eta')}) cannot sample `prediction_type='tokens'`, whose tokens have times of "
                "their own; use TokComFlowMatchScheduler with eta 0 or FlowMatchEulerDiscreteScheduler."
            )

        if self.is_diffusion and (config.prediction_type != "sample" or self.model.config.noise_std != 1):
            raise ValueError(
                f"{name} has `prediction_type={config.prediction_type!r}`, but the model estimates the sample, with noise of "
                f"standard deviation {self.model.config.noise_std}; use 'sample' and a model of `noise_std` 1."
            )

    @property
    def is_diffusion(self) -> bool:
        """Whether the scheduler is of a variance-preserving diffusion and no flow."""
        return hasattr(self.scheduler, "alphas_cumprod") and not self.scheduler.config.get("use_flow_sigmas")

    @property
    def takes_turns(self) -> bool:
        """Whether the tokens of a chunk are decided one after the other."""
        head = self.model.token_head
        return head is not None and head.stagger == 1 and head.num_symbols > 1

    def _turn_grid(self) -> list[float]:
        """Times of a latent, 0 to 1, at which the steps of a model whose tokens take turns begin and end.

        Every turn gets as many steps as the next, or one more, so that no step decides tokens of two turns; fewer steps
        than turns must, and a warning says so.
        """
        steps, turns = self.num_inference_steps, self.model.token_head.num_symbols
        if steps < turns:
            warnings.warn(
                f"{steps} steps for the {turns} tokens of a chunk: tokens that are decided in the same step are drawn "
                f"independently of each other, which costs quality; use `num_inference_steps={turns}`.",
                stacklevel=2,
            )
            return [round(step * turns / steps) / turns for step in range(steps)] + [1.0]
        counts = [steps // turns + (turn < steps % turns) for turn in range(turns)]
        return [(turn + i / count) / turns for turn, count in enumerate(counts) for i in range(count)] + [1.0]

    def set_timesteps(self, sigma_start: float, device: torch.device, turns: list[float] | None = None) -> None:
        """Lay out the scheduler's grid from `sigma_start`, or on the times `turns` of a latent, whatever its shift.

        Raises `ValueError` if the scheduler cannot do that.
        """
        scheduler = self.scheduler
        if sigma_start == 1.0 and turns is None:
            scheduler.set_timesteps(self.num_inference_steps, device=device)
            return
        shift = scheduler.config.get("shift", 1.0)  # the scheduler shifts what it is given: undo that first
        if turns is None:
            start = sigma_start / (shift - (shift - 1) * sigma_start)
            sigmas = torch.linspace(start, 0.0, self.num_inference_steps + 1)[:-1]
        else:
            wanted = 1 - torch.tensor(turns[:-1], dtype=torch.float64)
            sigmas = wanted / (shift - (shift - 1) * wanted)
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=sigmas.float().numpy(), device=device)
            found = scheduler.sigmas[:-1].double().cpu()
            if turns is None and abs(float(found[0]) - sigma_start) < 1e-3:
                return
            if turns is not None and len(found) == len(sigmas) and float((found - wanted).abs().max()) < 1e-3:
                return
        if turns is not None:
            raise ValueError(
                f"{type(scheduler).__name__} does not put its steps where the tokens of this model have their turns; use "
                "TokComFlowMatchScheduler."
            )
        raise ValueError(
            f"{type(scheduler).__name__} cannot start between noise and text (sigma {sigma_start:.2f}); "
            "use TokComFlowMatchScheduler, FlowMatchEulerDiscreteScheduler or UniPCMultistepScheduler."
        )

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, time: float) -> torch.Tensor:
        """Clean `latents (B, n, C)` and `noise` -> x at the `time` in [0, 1]."""
        signal = self.model.channel_times(torch.full(latents.shape[:2], time, device=latents.device))
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
        prefix: tuple[torch.Tensor, ...] | None = None,
        given: TokComGiven | None = None,
        gaps: TokComGaps | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Denoise `noise (B, n, C)` given clean context latents; yields each block when it is clean: latents `(B, Q, C)`
        and ids `(B, Q * K)`, which are None for the last block of a model that draws none.

        `position_ids (B, n, A)` says where the new latents stand, `valid (B, n)` which of them exist. Blocks are
        denoised in the order given and do not cross `edges`, indices where something known lies between neighbours.
        `on_step_end(block, step, timestep, x)` returns x. `prefix` is what `TokComModel.condition` gives, `given` tokens that
        are known already, `gaps` how a context with gaps is read.
        """
        if position_ids is None:
            index = torch.arange(noise.shape[1], device=noise.device)
            position_ids = self.model.codec.positions(index.expand(len(noise), -1))
        if valid is None:
            valid = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
        omitted = [part for part, _ in self.omissions]
        known = _Known(self.model, context, noise, prefix, omitted, gaps)
        sources = spawn_generators(self.generator, len(noise))
        blocks = split_blocks(noise.shape[1], known.block_size, edges)
        begins, ends = known.gap_bounds(blocks)
        for index, block in enumerate(blocks):
            after = None if on_step_end is None else partial(on_step_end, index)
            if index in begins:
                known.read_anchor(begins[index])
            known.begin(position_ids[:, block], valid[:, block], guided=self.guidance_scale != 1.0)
            start = noise[:, block].clone(memory_format=torch.contiguous_format)  # compiled code minds strides
            here = None if given is None else given.part(block)
            x, ids = self._denoise(start, known, sigma_start, after, sources, here)
            if self._cut and (index or self.model.config.codec_config.has_tokens) and known.cache is not None:
                return  # what is not finished is noise
            last = block.stop == noise.shape[1]
            if ids is None and not last and self.model.config.codec_config.has_tokens:
                ids = self.model.to_ids(x)
            yield x, ids
            if not last and index not in ends:  # the chunk in which a gap ends is in the context already
                known.append(x, ids)

    def _plan(self, x: torch.Tensor, sigma_start: float) -> list[_Step]:
        """Lay out the scheduler's grid for a block `x (B, Q, C)`, and what is the same at each step of all blocks."""
        length, device = x.shape[1], x.device
        model, plan = self.model, []
        turns = self._turn_grid() if self.takes_turns and sigma_start == 1 else None
        self.set_timesteps(sigma_start, device, turns)
        if length in self._plans:
            return self._plans[length]
        if self.is_diffusion:
            self._plans[length] = self._diffusion_plan(length, device)
            return self._plans[length]
        sigmas = self.scheduler.sigmas.tolist()
        grid = [1 - sigma for sigma in sigmas] if turns is None else turns
        for (sigma, next_sigma), (start, stop) in zip(zip(sigmas, sigmas[1:]), zip(grid, grid[1:])):
            now, then = (torch.full((1, length), t, device=device) for t in (start, stop))
            times, uncertain, chosen, gain = None, None, None, 1 / sigma
            if model.token_head is not None:
                times = model.token_head.place_times(now).expand(len(x), -1, -1)
                due = (times < 1) & (model.token_head.progress(then) > 0)  # the turn of the others comes later
                chosen, uncertain = TokComChoice.of(due), TokComChoice.of((times > 0) & (times < 1))
                # the mean velocity until `next_sigma`: Euler's step is exact for every token
                now_, then_ = model.channel_times(now), model.channel_times(then)
                gain = (then_ - now_) / (1 - now_).clamp_min(1e-6) / (sigma - next_sigma)
            modulations = model.transformer.modulate(now)
            plan.append(_Step(now, times, uncertain, chosen, modulations, gain))
        self._plans[length] = plan
        return plan

    def _diffusion_plan(self, length: int, device: torch.device) -> list[_Step]:
        """The same for a scheduler of a diffusion, of which every timestep stands for a time of the flow."""
        plan = []
        for timestep in self.scheduler.timesteps.tolist():
            remains = self.scheduler.alphas_cumprod[int(timestep)].double()
            signal, noise = remains.sqrt(), (1 - remains).sqrt()
            time = float(signal_time(signal, noise))
            now = torch.full((1, length), time, device=device)
            plan.append(
                _Step(now, None, None, None, self.model.transformer.modulate(now), None, float(1 / (signal + noise)))
            )
        return plan

    def _denoise(self, x, known: "_Known", sigma_start, on_step_end, sources, given: TokComGiven | None):
        """One block `(B, Q, C)` from noise, or from `sigma_start`, to clean latents and, if tokens were drawn, their ids."""
        scheduler, head, chunks = self.scheduler, self.model.token_head, None
        plan = self._plan(x, sigma_start)
        extra = {"generator": sources} if "generator" in inspect.signature(scheduler.step).parameters else {}
        uniform = [None] * len(plan)
        if head is not None:
            chunks = torch.zeros_like(plan[0].times, dtype=torch.long)
            chunks = chunks if sigma_start == 1 else head.recognise(known.symbols, x, plan[0].times)
            shape = len(plan), *chunks.shape[1:]
            uniform = torch.stack([torch.rand(shape, generator=source) for source in sources], dim=1).to(x.device)
            if given is not None:
                plan = [_with_given(step, given.mask) for step in plan]
                chunks = torch.where(given.mask, given.chunks, chunks)
                clean = head.latents_of(known.symbols, given.chunks).to(x.dtype)
                channels = given.mask.repeat_interleave(x.shape[-1] // given.mask.shape[-1], dim=-1)
                x = torch.where(channels, clean, x)
        for i, (timestep, step) in enumerate(zip(scheduler.timesteps, plan)):
            self._cut = self.interrupt
            if self._cut:
                return x, None
            estimate, chunks = self._estimate(x, step, known, chunks, uniform[i])
            output = estimate if step.gain is None else (x - estimate) * step.gain
            moved = scheduler.step(output, timestep, x, **extra, return_dict=False)[0]
            x = moved if on_step_end is None else on_step_end(i, timestep, moved)
            if chunks is not None and x is not moved:  # a callback has changed it
                then = plan[i + 1].times if i + 1 < len(plan) else torch.ones_like(step.times)
                chunks = head.recognise(known.symbols, x, then)
        if chunks is None:
            return self.model.refine(x), None
        return x, self.model.codec.from_symbols(chunks)

    def _estimate(self, x, step: _Step, known: "_Known", chunks, uniform):
        """x1 `(B, Q, C)` in float32 for the noisy block `x`, and the ids `(B, Q, K)` of its tokens if they are drawn."""
        states = known.predict(x if step.scale == 1 else x * step.scale, step, chunks)
        full, *others = states
        states, scales = full, [scale for _, scale in self.omissions] or [self.guidance_scale]
        for other, scale in zip(others, scales):
            states = states + (scale - 1) * (full - other)
        head = self.model.token_head
        if head is None:
            return self.model.quantize(states.float()), None
        settings = step.chosen, uniform, self.temperature, self.top_p
        drawn = head.draw(states, known.symbols, x, step.times, *settings)
        chunks = torch.where(step.times == 1, chunks, drawn)
        return head.latents_of(known.symbols, chunks), chunks


def _with_given(step: _Step, known: torch.Tensor) -> _Step:
    """The step of a block whose `known (B, Q, K)` tokens are clean from the beginning."""
    times = torch.where(known, 1.0, step.times)
    chosen = TokComChoice.of(step.chosen.mask & ~known)
    return step._replace(times=times, chosen=chosen, uncertain=TokComChoice.of((times > 0) & (times < 1)))


class _WindowLayer:
    """Keys and values `(B, H, W, head_dim)` of one layer for the W latents of a window, in tensors that never move.

    The last places are those of the block at hand, which every pass overwrites until `keep` gives it a place of its own.
    """

    def __init__(self, window: int):
        self.window, self.keys, self.values = window, None, None

    def update(self, keys: torch.Tensor, values: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the block's keys and values, and return all; if they are the `first`, of any number, return them alone."""
        if self.keys is None:
            self.keys = keys.new_zeros(*keys.shape[:2], self.window, keys.shape[3])
            self.values = values.new_zeros(*values.shape[:2], self.window, values.shape[3])
        if first:
            count = min(self.window, keys.shape[2])
            self.keys[:, :, -count:], self.values[:, :, -count:] = keys[:, :, -count:], values[:, :, -count:]
            return keys, values
        self.keys[:, :, -keys.shape[2] :], self.values[:, :, -keys.shape[2] :] = keys, values
        return self.keys, self.values

    def keep(self, places: torch.Tensor) -> None:
        for tensor in () if self.keys is None else (self.keys, self.values):
            tensor.index_copy_(2, places, tensor[:, :, -len(places) :].clone())


class TokComWindowCache:
    """A key/value cache of constant size for text of any length: what is new takes the place of what is oldest.

    Its tensors keep their shapes and addresses, so compiled graphs serve every block.
    """

    def __init__(self, num_layers: int, window: int):
        self.layers, self.first = [_WindowLayer(window) for _ in range(num_layers)], False

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer_idx].update(keys, values, self.first)

    def keep(self, places: torch.Tensor) -> None:
        """Copy the block at hand to `places (Q,)`."""
        for layer in self.layers:
            layer.keep(places)


class _Known:
    """What is already known while blocks are denoised: a key/value cache, or for bidirectional models the latents."""

    def __init__(
        self,
        model: TokComModel,
        context: TokComCodecOutput | None,
        like: torch.Tensor,
        prefix=None,
        omitted=(),
        gaps: TokComGaps | None = None,
    ):
        config, self.prefix, self.omitted = model.config.transformer_config, prefix, omitted
        self.model, self.block_size = model, config.block_size
        self.window = config.max_position_embeddings + config.start_latents
        self.context, self.symbols, self.length, self.cache = context, model.symbols(), 0, None
        self.starts, self.gaps = int(config.start_latents), gaps
        if self.block_size is None:
            return
        self.cache = TokComWindowCache(config.num_hidden_layers + (config.num_context_layers > 0), self.window)
        self.mask = torch.zeros(len(like), self.window, dtype=torch.bool, device=like.device)  # what exists, by place
        if self.starts:
            self.context = context = self._with_start(context, like)
        if context is not None:
            self._read_context(context)

    def _with_start(self, context: TokComCodecOutput | None, like: torch.Tensor) -> TokComCodecOutput:
        """The context behind the learned latent of where a text starts."""
        batch, device = len(like), like.device
        start = TokComCodecOutput(
            like.new_zeros(batch, 1, like.shape[-1]),
            torch.full((batch, 1, 1), START_OF_TEXT, device=device),
            torch.ones(batch, 1, dtype=torch.bool, device=device),
        )
        if context is None:
            return start
        pairs = zip(start.to_tuple(), (context.latents.to(like.dtype), context.position_ids, context.mask))
        return TokComCodecOutput(*(torch.cat(pair, dim=1) for pair in pairs))

    def _read_context(self, context: TokComCodecOutput) -> None:
        """Run the context through the model, but for what stands before a gap: that is read when its turn has come."""
        batch, length = context.mask.shape
        device = context.mask.device
        order = (torch.arange(length, device=device) + -length % self.block_size) // self.block_size
        early = torch.ones(length, dtype=torch.bool, device=device)
        times = None
        if self.gaps is not None:
            for anchor in self.gaps.anchors:
                early[0 if anchor is None else anchor + 1] = False
            partial = torch.nn.functional.pad(self.gaps.partial, (0, 0, 1, 0))
            times = torch.where(partial, 0.0, 1.0)
        self.times = times
        where = early.nonzero()[:, 0]
        if not len(where):
            return
        sees = block_causal_mask(order[None].expand(batch, -1), context.mask)[:, :length, :length]
        self.cache.first = True
        self._remember(
            context.latents[:, where],
            context.position_ids[:, where],
            sees[:, where][:, :, where],
            times=None if times is None else times[:, where],
        )
        self.cache.first = False
        self._keep(context.mask[:, where])

    def gap_bounds(self, blocks: list[slice]) -> tuple[dict[int, int | None], set[int]]:
        """The block with which each gap begins and its anchor, and the last blocks of gaps that end inside a chunk."""
        if self.gaps is None:
            return {}, set()
        begins, ends, index = {}, set(), 0
        for length, anchor, known in zip(self.gaps.lengths, self.gaps.anchors, self.gaps.ends_known):
            count = -(-length // self.block_size)
            begins[index] = anchor
            index += count
            if known:
                ends.add(index - 1)
        return begins, ends

    def read_anchor(self, anchor: int | None) -> None:
        """Read the context latent before a gap, which sees everything that is known by now."""
        place = slice(0, 1) if anchor is None else slice(anchor + 1, anchor + 2)
        context = self.context
        sees = self.mask.clone()
        sees[:, -1:] = context.mask[:, place]
        times = None if self.times is None else self.times[:, place]
        self._remember(context.latents[:, place], context.position_ids[:, place], sees, times=times)
        self._keep(context.mask[:, place])

    @cached_property
    def alone(self) -> torch.Tensor:
        """What the head is told `(1, 1, D)` where nothing is known, not even that a text starts."""
        transformer, device = self.model.transformer, self.mask.device
        features = torch.zeros(1, 1, transformer.config.feature_size, device=device, dtype=self.model.dtype)
        position_ids = torch.full((1, 1, 1), INSIDE_TEXT, device=device)
        return transformer.read_context(features, position_ids, torch.ones(1, 1, 1, dtype=torch.bool, device=device))

    def begin(self, position_ids: torch.Tensor, valid: torch.Tensor, guided: bool) -> None:
        """Turn to the block at `position_ids (B, Q, A)` of which `valid (B, Q)` exist; `guided` asks `predict` for two."""
        self.position_ids = position_ids.clone(memory_format=torch.contiguous_format)
        self.valid, self.free_keys, self.entries = valid, None if bool(valid.all()) else valid, []
        known = (self.length if self.context is None or self.cache else self.context.mask.shape[1]) > 0
        self.guided = guided and (self.length > self.starts if self.starts else known or self.prefix is not None)
        if self.cache is None:
            exists = valid if self.context is None else torch.cat((self.context.mask, valid), dim=1)
            self.keys = None if bool(exists.all()) else exists
            return
        self.keys = self.mask.clone()
        self.keys[:, -valid.shape[1] :] = valid
        if self.model.config.transformer_config.num_context_layers:
            enter = self.model.transformer.entry  # what the context layers say of the block, with and without context
            self.entries = [enter(self.position_ids, self.mask, self.cache) if known else enter(self.position_ids)]
            if self.guided and self.starts:
                self.entries.append(self.alone.expand_as(self.entries[0]))
            elif self.guided:
                self.entries.append(enter(self.position_ids))

    def predict(self, x, step: _Step, chunks) -> list[torch.Tensor]:
        """What the network predicts for the noisy block `x (B, Q, C)` given what is known and, if guided, given nothing.

        `chunks (B, Q, K)` are the ids of the block's tokens that are clean.
        """
        if self.cache is None and self.context is not None:
            states = [self._predict_beside_context(x, step, self.prefix)]
            for part in self.omitted:
                seen = torch.cat((self.context.mask & ~part, self.valid), dim=1)
                states.append(self._predict_beside_context(x, step, self.prefix, seen))
            return states + self._predict(x, step, chunks, self.free_keys) if self.guided else states
        if self.prefix is not None:
            states = self._predict(x, step, chunks, self.keys, prefix=self.prefix)
            return states + self._predict(x, step, chunks, self.keys) if self.guided else states
        alone = self.entries and not self.model.config.transformer_config.head_attention
        if alone:  # nothing else tells with context from without
            states = self._predict(x, step, chunks, entry=torch.cat(self.entries))[0]
            return list(states.chunk(len(self.entries)))
        entries = [{"entry": entry} for entry in self.entries] or [{}, {}]
        states = self._predict(x, step, chunks, self.keys, past_key_values=self.cache, **entries[0])
        if self.guided:  # a cached key cannot exist for one half of a batch only, so this is a pass of its own
            states += self._predict(x, step, chunks, self.free_keys, **entries[1])
        return states

    def _predict(self, x, step: _Step, chunks, keys=None, **inputs) -> list[torch.Tensor]:
        inputs |= {"symbols": self.symbols, "times": step.times, "chunks": chunks, "uncertain": step.uncertain}
        inputs |= {"modulations": step.modulations}
        return [self.model.predict(x, step.time, self.position_ids, keys, **inputs).latents]

    def _predict_beside_context(self, x, step: _Step, prefix=None, keys=None) -> torch.Tensor:
        """The prediction of a bidirectional model, which reads the context again at every step; `keys (B, S)` may hide some of it."""
        known, time = self.context, step.time.expand(x.shape[:2])
        known_time = torch.ones_like(time[:, :1])
        if not self.model.config.transformer_config.per_latent_timestep:
            known_time = time[:, :1]
        return self.model.predict(
            torch.cat((known.latents.to(x.dtype), x), dim=1),
            torch.cat((known_time.expand(known.mask.shape), time), dim=1),
            torch.cat((known.position_ids, self.position_ids), dim=1),
            self.keys if keys is None else keys,
            symbols=self.symbols,
            prefix=prefix,
        ).latents[:, -x.shape[1] :]

    def append(self, x: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Remember the finished block `x (B, Q, C)`, of a text by the ids `(B, Q * K)` it decodes to, whose clean latents are what
        training shows."""
        chunks = None if self.symbols is None else self.model.codec.symbols(ids, None)[0]
        clean = x if ids is None else self.model.encode(ids).latents
        self._remember(clean, self.position_ids, self.keys, chunks)
        self._keep(self.valid)

    def _remember(self, clean, position_ids, sees, chunks=None, times=None) -> None:
        """Run clean latents through the model for what they leave in the cache; tokens at time 0 are not known."""
        known = {"num_context": clean.shape[1], "symbols": self.symbols, "chunks": chunks, "times": times}
        self.model.predict(clean, 1.0, position_ids, sees, past_key_values=self.cache, **known)

    def _keep(self, valid: torch.Tensor) -> None:
        """Give the latents just remembered, `valid (B, Q)`, places in the window, the oldest ones' if it is full."""
        capacity = self.window - self.block_size
        count = min(valid.shape[1], capacity)
        if count < 1:
            return
        places = torch.arange(self.length, self.length + count, device=valid.device)
        # the learned start stays; the others take turns in the places behind it
        places = torch.where(
            places < capacity, places, self.starts + (places - self.starts) % (capacity - self.starts)
        )
        self.cache.keep(places)
        self.mask[:, places] = valid[:, -count:]
        self.length += count


__all__ = ["TokComBlockSampler", "TokComWindowCache", "split_blocks"]
