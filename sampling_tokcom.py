"""The sampler: noise, and what is already known, become clean latents, block after block.

Read it in this order: `TokComTask` (tasks_tokcom.py) says what to generate and what is known,
`TokComSampling` how; `TokComBlockSampler.blocks` is the loop over blocks, `_denoise` the loop over
the steps of one block, `_estimate` one evaluation of the network; `TokComStepPlanner` lays out the
steps.

Notable choices:
- Any flow scheduler fits, since it only sees velocities. Diffusion schedulers that take an estimate
  of the sample fit too: their x is that of the flow times a number.
- A model that predicts token probabilities draws tokens at every step and moves towards the draw,
  not towards the mean. x at the next time then has the right distribution however few the steps
  are, except that tokens drawn in the same step are drawn independently. So its steps are laid on
  the turns of the tokens, whatever the scheduler's grid.
- Every row has random numbers of its own: neither the other rows nor its own length change how a
  row begins.
"""

import copy
import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from diffusers import SchedulerMixin
from transformers import PreTrainedModel

from .context_tokcom import CachedContext, Context, TokComStep, VisibleContext
from .heads_tokcom import TokComChoice
from .scheduling_tokcom import signal_time
from .tasks_tokcom import TokComGiven, TokComTask

# latents (B, Q, C) and ids (B, Q * K) of each block
Blocks = Iterator[tuple[torch.Tensor, torch.Tensor | None]]


# ---- random numbers ----


def spawn_generators(
    generator: torch.Generator | list[torch.Generator] | None, rows: int
) -> list[torch.Generator]:
    """A generator for each of `rows`, seeded by one draw from `generator`, or from each of a list.

    The numbers of a row depend on that draw and on the row's index alone, not on how many rows
    there are.
    """

    def seed(source: torch.Generator | None) -> int:
        if not isinstance(source, (torch.Generator, type(None))):
            raise ValueError(
                f"`generator` ({source!r}) must be a torch.Generator; a number becomes one by "
                "torch.Generator().manual_seed(number)."
            )
        device = "cpu" if source is None else source.device
        # one draw, however many rows there are, so the caller's generator moves on alike
        return int(torch.randint(2**62, (), generator=source, device=device))

    if isinstance(generator, list):
        bases = [(seed(source), 0) for source in generator]  # each as if it were alone
    else:
        base = seed(generator)
        bases = [(base, row) for row in range(rows)]
    # hashed, since neighbouring seeds of torch's generators give related numbers
    seeds = [random.Random(f"{base}/{row}").getrandbits(63) for base, row in bases]
    return [torch.Generator().manual_seed(value) for value in seeds]


def row_noise(generators: list[torch.Generator], num_latents: int, channels: int) -> torch.Tensor:
    """Standard normal noise `(B, n, C)` on the CPU; that of a latent does not depend on how many
    follow it."""
    rows = []
    for source in generators:
        # drawn latent by latent: a longer text begins with the same noise
        latents = [torch.randn(channels, generator=source) for _ in range(num_latents)]
        rows.append(torch.stack(latents))  # (n, C)
    return torch.stack(rows)  # (B, n, C)


def kept_tokens(count: int, share: float, source: torch.Generator) -> list[bool]:
    """Which of `count` tokens are kept if each is with probability `share`.

    For the same random numbers, what is kept at one share is also kept at every larger one.
    """
    # one number per token, whatever the share, so that shares nest
    return (torch.rand(count, generator=source) < share).tolist()


# ---- how to generate ----

COLDEST = 1e-4  # below it logits that are divided by a temperature overflow


@dataclass
class TokComSampling:
    """How latents are generated; what is None is the default of the model's configuration.

    Args:
        num_inference_steps (`int`, *optional*): steps per block.
        guidance_scale (`float`, *optional*): 1 is off; above 1 the prediction moves away from the
            one without context.
        omissions (`list[tuple[torch.BoolTensor, float]]`): the same for parts of the context of a
            bidirectional model: which of the S context latents, `(S,)`, and the guidance scale for
            them. They replace `guidance_scale`.
        temperature, top_p (`float`, *optional*): of token probabilities; see
            `TokComTokenHead.draw`.
        generator: source of what is drawn during sampling, one or one per row.
        excluded (`tuple[int, ...]`): symbols that are never drawn, such as EOS inside a gap.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    omissions: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    excluded: tuple[int, ...] = ()

    def resolve(self, config) -> "TokComSampling":
        """The same with every value set, from a `TokComConfig` where it was None.

        Raises `ValueError` for values out of range, and for a temperature of a model without
        probabilities.
        """
        has_probabilities = config.prediction_type == "tokens"
        found = replace(self)
        if found.guidance_scale is None:
            found.guidance_scale = config.sampling_guidance_scale
        if isinstance(found.guidance_scale, bool) or not isinstance(
            found.guidance_scale, (int, float)
        ):
            raise ValueError(
                f"`guidance_scale` ({found.guidance_scale!r}) must be one number for this model; "
                "give a number."
            )
        if not 0 <= found.guidance_scale < math.inf:
            raise ValueError(
                f"`guidance_scale` ({found.guidance_scale}) must be finite and not negative."
            )
        if found.num_inference_steps is None:
            found.num_inference_steps = config.num_inference_steps
        if found.temperature is None:
            found.temperature = config.sampling_temperature if has_probabilities else 1.0
        if found.top_p is None:
            found.top_p = config.sampling_top_p if has_probabilities else 1.0
        for name, least, most in (("temperature", COLDEST, math.inf), ("top_p", 0.0, 1.0)):
            value = getattr(found, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"`{name}` ({value!r}) must be a number.")
            if not has_probabilities and value != 1.0:
                raise ValueError(
                    f"`{name}` ({value}) has no meaning for a model of `prediction_type="
                    f"{config.prediction_type!r}`, which has no probabilities; leave it at 1."
                )
            if not least < value <= most or value == math.inf:
                limit = "finite" if most == math.inf else "at most 1"
                raise ValueError(f"`{name}` ({value}) must be above {least:g} and {limit}.")
        return found


def split_blocks(length: int, block_size: int | None, edges: tuple[int, ...] = ()) -> list[slice]:
    """Cut `length` latents into blocks of at most `block_size` that do not cross `edges`; None is
    one block."""
    if block_size is None:
        return [slice(0, length)]
    bounds = [0, *edges, length]
    # a block ends at an edge even if it is not full
    starts: list[int] = []
    for low, high in zip(bounds, bounds[1:]):
        starts += range(low, high, block_size)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length])]


# ---- what is made of the blocks ----


def join_blocks(blocks: Blocks, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents `(B, n, C)` and ids `(B, n * K)` of all blocks; the ids are None if those of a block
    are.

    Without any block n is 0, and the other sizes are those of `like (B, ..., C)`.
    """
    found = list(blocks)
    if not found:
        return like[:, :0], torch.zeros(len(like), 0, dtype=torch.long, device=like.device)
    latents, ids = zip(*found)
    has_ids = all(x is not None for x in ids)
    return torch.cat(latents, dim=1), torch.cat(ids, dim=1) if has_ids else None


def until_all_ended(blocks: Blocks, eos_token_id: int | None, skip: list[int]) -> Blocks:
    """The blocks up to the one in which the last row ends; the first `skip` tokens of each row do
    not count."""
    position = 0
    ended: torch.Tensor | None = None
    for latents, ids in blocks:
        yield latents, ids
        if eos_token_id is None:
            continue
        ends = ids == eos_token_id  # (B, Q * K)
        if position < max(skip):  # only there is anything of a prompt
            where = torch.arange(position, position + ids.shape[1], device=ids.device)
            ends = ends & (where >= torch.tensor(skip, device=ids.device)[:, None])
        ends_here = ends.any(-1)
        ended = ends_here if ended is None else ended | ends_here
        position += ids.shape[1]
        if bool(ended.all()):
            break
    blocks.close()  # of the progress bar


# ---- the sampler ----


class TokComStepPlanner:
    """Lays out the steps that a model takes with a scheduler, and what each needs that is the same
    for all blocks.

    Raises `ValueError` if scheduler and model do not fit.
    """

    def __init__(self, model: PreTrainedModel, scheduler: SchedulerMixin, num_inference_steps: int):
        self.model = model
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self._plans: dict[int, list[TokComStep]] = {}  # by the length of a block
        self._turns: list[float] | None = None
        # what the scheduler is told of each step, once they are laid out
        self.timesteps: list[torch.Tensor] | list[int] | None = None
        self._check_scheduler()

    def _check_scheduler(self) -> None:
        name = type(self.scheduler).__name__
        config = self.scheduler.config
        is_euler = name in ("TokComFlowMatchScheduler", "FlowMatchEulerDiscreteScheduler")
        adds_noise = config.get("eta") or config.get("stochastic_sampling")
        if self.model.token_head is not None and (not is_euler or adds_noise):
            raise ValueError(
                f"{name} (eta {config.get('eta')}) cannot sample `prediction_type='tokens'`, whose "
                "tokens have times of their own; use TokComFlowMatchScheduler with eta 0 or "
                "FlowMatchEulerDiscreteScheduler."
            )
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name} has `use_dynamic_shifting`, a shift that depends on the size of a picture; "
                "set it to False, or use TokComFlowMatchScheduler."
            )
        if self.is_diffusion and (
            config.prediction_type != "sample" or self.model.config.noise_std != 1
        ):
            raise ValueError(
                f"{name} has `prediction_type={config.prediction_type!r}`, but the model estimates "
                f"the sample, with noise of standard deviation {self.model.config.noise_std}; use "
                "'sample' and a model of `noise_std` 1."
            )

    @property
    def is_diffusion(self) -> bool:
        """Whether the scheduler is that of a variance-preserving diffusion, not of a flow."""
        return hasattr(self.scheduler, "alphas_cumprod") and not self.scheduler.config.get(
            "use_flow_sigmas"
        )

    @property
    def takes_turns(self) -> bool:
        """Whether the tokens of a chunk are decided one after the other."""
        head = self.model.token_head
        return head is not None and head.stagger == 1 and head.num_symbols > 1

    def _turn_grid(self) -> list[float]:
        """Times of a latent, 0 to 1, between which the steps of a model whose tokens take turns
        lie.

        All turns get the same number of steps, or one more, so that no step decides tokens of two
        turns. With fewer steps than turns some steps must, and a warning says so.
        """
        steps = self.num_inference_steps
        turns = self.model.token_head.num_symbols
        if steps < turns:
            warnings.warn(
                f"{steps} steps for the {turns} tokens of a chunk: tokens that are decided in the "
                "same step are drawn independently of each other, which costs quality; use "
                f"`num_inference_steps={turns}`.",
                stacklevel=2,
            )
            # the grid still lies on turns, each step taking several of them
            return [round(step * turns / steps) / turns for step in range(steps)] + [1.0]
        # what does not divide goes to the first turns
        counts = [steps // turns + (turn < steps % turns) for turn in range(turns)]
        grid: list[float] = []
        for turn, count in enumerate(counts):
            grid += [(turn + i / count) / turns for i in range(count)]  # turn k begins at k / K
        return [*grid, 1.0]

    def set_timesteps(
        self, sigma_start: float, device: torch.device, turns: list[float] | None = None
    ) -> None:
        """Lay out the scheduler's grid from `sigma_start`, or on the times `turns` of a latent,
        whatever its shift.

        Raises `ValueError` if the scheduler cannot do that.
        """
        scheduler = self.scheduler
        steps = self.num_inference_steps
        if sigma_start == 1.0 and turns is None:
            scheduler.set_timesteps(steps, device=device)
            return
        # the scheduler shifts the sigmas that it is given, so they are shifted back first
        shift = scheduler.config.get("shift", 1.0)
        if turns is None:
            # the inverse of the shift, sigma -> s sigma / (1 + (s - 1) sigma)
            start = sigma_start / (shift - (shift - 1) * sigma_start)
            sigmas = torch.linspace(start, 0.0, steps + 1)[:-1]
        else:
            wanted = 1 - torch.tensor(turns[:-1], dtype=torch.float64)
            sigmas = wanted / (shift - (shift - 1) * wanted)  # the same inverse
        # a scheduler may take sigmas and still place its own, so what it made is compared
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=sigmas.float().numpy(), device=device)
            found = scheduler.sigmas[:-1].double().cpu()
            if turns is None and abs(float(found[0]) - sigma_start) < 1e-3:
                return
            if (
                turns is not None
                and len(found) == len(sigmas)
                and float((found - wanted).abs().max()) < 1e-3
            ):
                return
        if turns is not None:
            raise ValueError(
                f"{type(scheduler).__name__} does not put its steps where the tokens of this model "
                "have their turns; use TokComFlowMatchScheduler."
            )
        raise ValueError(
            f"{type(scheduler).__name__} cannot start between noise and text (sigma "
            f"{sigma_start:.2f}); use TokComFlowMatchScheduler, FlowMatchEulerDiscreteScheduler or "
            "UniPCMultistepScheduler."
        )

    def plan(self, x: torch.Tensor, sigma_start: float) -> list[TokComStep]:
        """Lay out the scheduler's grid for a block `x (B, Q, C)`, and what each step needs that no
        block changes."""
        length = x.shape[1]
        if self.timesteps is not None and hasattr(self.scheduler, "restart"):
            self.scheduler.restart()
        else:
            if self.timesteps is None and self.takes_turns and sigma_start == 1:
                self._turns = self._turn_grid()
            # stock schedulers also forget here what the last block was
            self.set_timesteps(sigma_start, x.device, self._turns)
            if hasattr(self.scheduler, "set_begin_index"):  # or it is looked for on the device
                self.scheduler.set_begin_index(0)
        if self.timesteps is None:
            found = self.scheduler.timesteps
            # a diffusion's scheduler looks its timesteps up, for which the host would wait
            self.timesteps = found.tolist() if self.is_diffusion else list(found)
        # blocks of one length take the same steps
        if length not in self._plans:
            self._plans[length] = (
                self._diffusion_plan(x) if self.is_diffusion else self._flow_plan(x)
            )
        return self._plans[length]

    def _flow_plan(self, x: torch.Tensor) -> list[TokComStep]:
        plan = []
        head = self.model.token_head
        sigmas = self.scheduler.sigmas.tolist()
        grid = self._turns or [1 - sigma for sigma in sigmas]
        for i in range(len(sigmas) - 1):
            # times, and all that is made of them, are the same for all rows
            now = torch.full((1, x.shape[1]), grid[i], device=x.device)  # (1, Q)
            modulations = self.model.transformer.modulate(now)
            if head is None:
                # dx / dsigma = (x - x1) / sigma
                plan.append(TokComStep(now, None, None, None, modulations, gain=1 / sigmas[i]))
                continue
            following = torch.full((1, x.shape[1]), grid[i + 1], device=x.device)
            times = head.place_times(now).expand(len(x), -1, -1)  # (B, Q, K)
            # tokens are drawn from the step in which their turn begins
            drawn = (times < 1) & (head.progress(following) > 0)
            chosen = TokComChoice.of(drawn, blank=not bool((drawn & (times > 0)).any()))
            uncertain = TokComChoice.of((times > 0) & (times < 1))
            # each token has a time of its own, so the gain is its mean velocity until the next
            # sigma: with it the scheduler's Euler step is exact for every token
            signal = self.model.channel_times(now)
            next_signal = self.model.channel_times(following)
            gain = (next_signal - signal) / (1 - signal).clamp_min(1e-6)
            gain = gain / (sigmas[i] - sigmas[i + 1])  # (1, Q, C or 1)
            # of the tokens of a chunk, which are decided in their order
            decided = int((head.progress(now)[0, 0] >= 1).sum())
            last = max((place for place, count in enumerate(chosen.counts) if count), default=0)
            step = TokComStep(now, times, uncertain, chosen, modulations, gain)
            plan.append(step._replace(decided=(decided, last + 1)))
        return plan

    def _diffusion_plan(self, x: torch.Tensor) -> list[TokComStep]:
        """The steps of a diffusion's scheduler, each of whose timesteps stands for a time of the
        flow."""
        remains = self.scheduler.alphas_cumprod[self.timesteps].double()  # signal^2, (steps,)
        signal = remains.sqrt()
        noise = (1 - remains).sqrt()
        plan = []
        # signal * x1 + noise * x0 is (signal + noise) times the flow's x at that time
        for time, scale in zip(
            signal_time(signal, noise).tolist(), (1 / (signal + noise)).tolist()
        ):
            now = torch.full((1, x.shape[1]), time, device=x.device)
            modulations = self.model.transformer.modulate(now)
            plan.append(TokComStep(now, None, None, None, modulations, gain=None, scale=scale))
        return plan


class TokComBlockSampler:
    """Denoises blocks of latents with one model, one scheduler and one `TokComSampling`.

    Set `interrupt` to leave out the remaining steps and blocks, and the unfinished block of a
    block-causal text.
    Raises `ValueError` if scheduler and model do not fit.
    """

    def __init__(self, model: PreTrainedModel, scheduler: SchedulerMixin, sampling: TokComSampling):
        self.model = model
        # its own, since two texts may be written in turn
        self.scheduler = copy.copy(scheduler)
        self.sampling = sampling.resolve(model.config)
        self.planner = TokComStepPlanner(model, self.scheduler, self.sampling.num_inference_steps)
        self.interrupt = False
        self._unfinished = False  # whether the current block was interrupted
        # sum of the block's predictions: not finite if one of them was not
        self._total: torch.Tensor | float = 0.0

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, time: float) -> torch.Tensor:
        """Clean `latents (B, n, C)` and `noise` -> x at the `time` in [0, 1]."""
        signal = self.model.channel_times(
            torch.full(latents.shape[:2], time, device=latents.device)
        )
        return (1 - signal) * noise + signal * latents

    def blocks(
        self,
        task: TokComTask,
        on_step_end: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> Blocks:
        """Denoise the noise of a task and yield every block when it is clean: latents `(B, Q, C)`
        and ids `(B, Q * K)`.

        The ids of the last block are None for a model that does not draw tokens.
        `on_step_end(block, step, timestep, x)` returns x.
        """
        noise = task.noise
        model_has_tokens = self.model.config.codec_config.has_tokens
        position_ids = task.position_ids
        exists = task.exists
        if position_ids is None:
            index = torch.arange(noise.shape[1], device=noise.device)
            position_ids = self.model.codec.positions(index.expand(len(noise), -1))
        if exists is not None and bool(exists.all()):
            exists = None
        block_size = self.model.config.transformer_config.block_size
        if block_size is None:
            omitted = [part for part, _ in self.sampling.omissions]
            context = VisibleContext(self.model, task, omitted)
        else:
            context = CachedContext(self.model, task)
        # a source for each row: a row must not depend on its company in the batch
        sources = spawn_generators(self.sampling.generator, len(noise))
        first_blocks: dict[int, int | None] = {}  # of gaps, with their anchors
        last_blocks: set[int] = set()
        if task.gaps is not None:
            first_blocks, last_blocks = task.gaps.bounds(block_size)
        slices = split_blocks(noise.shape[1], block_size, task.edges)
        givens = [None] * len(slices) if task.given is None else task.given.parts(slices)
        for index, block in enumerate(slices):
            # the state before a gap is read as late as possible, to see what is known by then
            if index in first_blocks:
                context.read_anchor(first_blocks[index])
            own = None if exists is None else exists[:, block]
            context.begin(position_ids[:, block], own, self.sampling.guidance_scale != 1.0)
            # compiled code depends on strides
            x = noise[:, block].clone(memory_format=torch.contiguous_format)
            after_step = None if on_step_end is None else partial(on_step_end, index)
            x, ids = self._denoise(x, context, task.sigma_start, givens[index], sources, after_step)
            if self._unfinished and block_size is not None and (index or model_has_tokens):
                return  # the block is still noise
            is_last = block.stop == noise.shape[1]
            if ids is None and not is_last:
                # the next block of a text reads this one as tokens, not as the sampler left it
                ids = self.model.to_ids(x)
            yield x, ids
            # the chunk in which a gap ends is in the context already
            if not is_last and index not in last_blocks:
                context.append(x, ids)

    def _denoise(
        self,
        x: torch.Tensor,
        context: Context,
        sigma_start: float,
        given: TokComGiven | None,
        sources: list[torch.Generator],
        on_step_end: Callable | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One block `x (B, Q, C)`, at `sigma_start`, becomes clean latents; and ids if the model
        draws tokens."""
        scheduler = self.scheduler
        head = self.model.token_head
        plan = self.planner.plan(x, sigma_start)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": sources} if takes_generator else {}
        chunks = None  # (B, Q, K), the ids of the tokens that are decided
        # (B, Q, K) random numbers for every step
        uniform: list[torch.Tensor | None] = [None] * len(plan)
        if head is not None:
            chunks, uniform = self._first_tokens(x, plan, context, sigma_start, sources)
            if given is not None:
                plan = [step.with_given(given.mask) for step in plan]
                chunks = torch.where(given.mask, given.chunks, chunks)
                # given tokens are clean in x as well, as their time 1 says
                clean = head.latents_of(context.symbols, given.chunks).to(x.dtype)
                channels_per_token = x.shape[-1] // given.mask.shape[-1]
                x = torch.where(given.mask.repeat_interleave(channels_per_token, dim=-1), clean, x)
        plan = context.lay_out(plan)
        self._total = 0.0
        for i, (timestep, step) in enumerate(zip(scheduler.timesteps, plan)):
            self._unfinished = self.interrupt
            if self._unfinished:
                return x, None
            estimate, chunks = self._estimate(x, step, context, chunks, uniform[i])
            # flow schedulers take a velocity, those of a diffusion the estimate itself
            output = estimate if step.gain is None else (x - estimate) * step.gain
            told = self.planner.timesteps[i]
            moved = scheduler.step(output, told, x, **extra, return_dict=False)[0]
            x = moved if on_step_end is None else on_step_end(i, timestep, moved)
            # a callback has changed x, so the ids are those of its x
            if chunks is not None and x is not moved:
                following = plan[i + 1].times if i + 1 < len(plan) else torch.ones_like(step.times)
                chunks = head.recognise(context.symbols, x, following)
                context.forget_chunk()
        # read once per block: every read makes the host wait for the device
        if not math.isfinite(self._total):
            raise ValueError(
                "the model's predictions became NaN or infinite, so there is nothing to draw from; "
                f"{self.model.dtype} may be too small for it (load it with dtype=torch.float32), "
                f"or a setting such as guidance_scale ({self.sampling.guidance_scale:g}) too large."
            )
        if chunks is None:
            return self.model.refine(x), None
        return x, self.model.codec.from_symbols(chunks)

    def _first_tokens(
        self,
        x: torch.Tensor,
        plan: list[TokComStep],
        context: Context,
        sigma_start: float,
        sources: list[torch.Generator],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(B, Q, K)` of what is decided before the first step, and uniform numbers
        `(steps, B, Q, K)` to draw the rest with."""
        times = plan[0].times
        # undecided tokens have any id: nobody reads it before their time is 1
        chunks = torch.zeros_like(times, dtype=torch.long)
        if sigma_start != 1:
            # a start between noise and text has clean tokens already
            chunks = self.model.token_head.recognise(context.symbols, x, times)
        # a source for each row, so what a row draws does not depend on the others
        rows = [torch.rand(len(plan), *chunks.shape[1:], generator=source) for source in sources]
        return chunks, torch.stack(rows, dim=1).to(x.device)

    def _estimate(
        self,
        x: torch.Tensor,
        step: TokComStep,
        context: Context,
        chunks: torch.Tensor | None,
        uniform: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Clean latents `(B, Q, C)` in float32 as the block `x` suggests them, and ids `(B, Q, K)`
        if tokens are drawn."""
        sampling = self.sampling
        flow_x = x if step.scale == 1 else x * step.scale
        full, *others = context.predict(flow_x, step, chunks)  # (B, Q, C) or (B, Q, K * E) each
        scales = [scale for _, scale in sampling.omissions] or [sampling.guidance_scale]
        states = full
        for other, scale in zip(others, scales):
            # classifier-free guidance: away from the prediction that knows less
            states = states + (scale - 1) * (full - other)
        # added up on the device; asking here would wait for it in every step
        self._total = self._total + states.sum(dtype=torch.float32)
        head = self.model.token_head
        if head is None:
            return self.model.quantize(states.float()), None
        drawn = head.draw(
            states,
            context.symbols,
            x,
            step.times,
            step.chosen,
            uniform,
            sampling.temperature,
            sampling.top_p,
            sampling.excluded,
        )
        # tokens that are clean already stay what they are
        chunks = torch.where(step.times == 1, chunks, drawn)
        return head.latents_of(context.symbols, chunks), chunks


__all__ = [
    "TokComBlockSampler",
    "TokComSampling",
    "TokComStepPlanner",
    "join_blocks",
    "kept_tokens",
    "row_noise",
    "spawn_generators",
    "split_blocks",
    "until_all_ended",
]
