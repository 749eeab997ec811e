"""What is known while blocks are denoised, and what the network reads of it at each step.

`CachedContext` is that of block-causal models, which read it once into a key/value cache, and
`VisibleContext` that of bidirectional ones, which read it at every step.

Notable choices:
- The cache doubles until it holds the window of the model, so text may have any length, and a
  short one does not pay for the window. That of a compiled model has its full size from the
  beginning, so one graph serves all blocks.
- What stands right before a gap is read last, when it can see what follows the gap.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .heads_tokcom import TokComChoice
from .tasks_tokcom import TokComCodecOutput, TokComTask
from .transformer_tokcom import INSIDE_TEXT, START_OF_TEXT, block_causal_mask, moment_size

# ---- what the network reads at one step ----


class TokComStep(NamedTuple):
    """One step of a block; it is the same for all blocks of one length."""

    time: torch.Tensor  # (1, Q), of the latents
    # (B, Q, K), of their tokens; like the next two None without a token head
    times: torch.Tensor | None
    uncertain: TokComChoice | None  # tokens that are partly noise
    chosen: TokComChoice | None  # tokens to draw in this step
    modulations: list[torch.Tensor] | None  # (1, Q, ...) of each layer
    # velocity per x - estimate; None if the scheduler takes the estimate itself
    gain: torch.Tensor | float | None
    scale: float = 1.0  # from the scheduler's x to that of the flow
    beside: "TokComStep | None" = None  # the same for `[context | x]`, which `lay_out` adds
    # how many tokens of a chunk are decided before this step, and after it
    decided: tuple[int, int] | None = None
    given: torch.Tensor | None = None  # (B, Q, K), of blocks with tokens that the caller has given

    def with_given(self, known: torch.Tensor) -> "TokComStep":
        """The step of a block in which the `known (B, Q, K)` tokens are clean from the
        beginning."""
        # no sampler step may move a token that the caller has given
        times = torch.where(known, 1.0, self.times)
        chosen = TokComChoice.of(self.chosen.mask & ~known, self.chosen.blank)
        uncertain = TokComChoice.of((times > 0) & (times < 1))
        return self._replace(times=times, chosen=chosen, uncertain=uncertain, given=known)


# ---- the cache ----

SMALLEST_WINDOW = 32  # latents of a cache that has not grown yet


class _WindowLayer:
    """Keys and values `(B, H, W, head_dim)` of one layer for W latents.

    The last places are those of the current block, which every pass overwrites until `keep` gives
    it a place of its own.
    """

    def __init__(self, window: int):
        self.window = window
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def grow(self, window: int, length: int) -> None:
        """Make room for `window` latents, of which the first `length` are kept."""
        self.window = window
        if self.keys is None:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], window, old.shape[3])
            new[:, :, :length] = old[:, :, :length]
            setattr(self, name, new)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the block's keys and values, and return all; if they are the `first`, of any
        number, return them alone."""
        if self.keys is None:
            # allocated at the first pass, which tells heads, head size, dtype and device
            self.keys = keys.new_zeros(*keys.shape[:2], self.window, keys.shape[3])
            self.values = values.new_zeros(*values.shape[:2], self.window, values.shape[3])
        if first:
            # a context longer than the window keeps its end
            count = min(self.window, keys.shape[2])
            self.keys[:, :, -count:] = keys[:, :, -count:]
            self.values[:, :, -count:] = values[:, :, -count:]
            return keys, values
        self.keys[:, :, -keys.shape[2] :] = keys
        self.values[:, :, -keys.shape[2] :] = values
        return self.keys, self.values

    def keep(self, places: list[slice], first: int | None = None) -> None:
        """Copy the current block's last entries, or those from the place `first` on, to `places`,
        slices that follow each other."""
        if self.keys is None:
            return
        for tensor in (self.keys, self.values):
            start = first
            if start is None:
                start = self.window - sum(place.stop - place.start for place in places)
            for place in places:
                count = place.stop - place.start
                # a context may be so long that it is copied onto itself
                tensor[:, :, place] = tensor[:, :, start : start + count].clone()
                start += count


class TokComWindowCache:
    """A key/value cache for text of any length: once it is full, new latents take the places of the
    oldest.

    Its tensors keep their shapes and addresses until it grows.
    """

    def __init__(self, num_layers: int, window: int):
        self.layers = [_WindowLayer(window) for _ in range(num_layers)]
        self.first = False  # set while the context is read, which may be longer than a block

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer_idx].update(keys, values, self.first)

    def grow(self, window: int, length: int) -> None:
        """Make room for `window` latents, of which the first `length` are kept."""
        for layer in self.layers:
            layer.grow(window, length)

    def keep(self, places: list[slice], first: int | None = None) -> None:
        """Copy the current block's last entries, or those from the place `first` on, to `places`."""
        for layer in self.layers:
            layer.keep(places, first)


class TokComChunkCache:
    """Keys and values `(R, H, K, head_dim)` of the places of a chunk, for the layers of a local
    head.

    A place that has read its token stays as it is, so every step passes only the places it needs.
    """

    def __init__(self, num_places: int):
        self.num_places = num_places
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the chunk."""
        self.done = 0  # leading places that will not change
        self.places = slice(0, self.num_places)  # that the next pass computes

    def open(self, before: int, after: int) -> None:
        """Turn to a step before which `before` tokens are decided, and `after` when it is over."""
        self.places = slice(min(self.done, before), after)
        # a place reads the token before it, so those up to the first open one have read what stays
        self.done = min(before + 1, after)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of the places at hand; returns those of all K, computed or not."""
        found = []
        for store, new in ((self.keys, keys), (self.values, values)):
            buffer = store.get(layer_idx)
            if buffer is None or len(buffer) != len(new):
                shape = *new.shape[:2], self.num_places, new.shape[3]
                buffer = store[layer_idx] = new.new_zeros(shape)
            buffer[:, :, self.places] = new
            found.append(buffer)
        return found[0], found[1]


# ---- what is known ----


class Context:
    """What is known while blocks are denoised: the part that both kinds of model share."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        # once for all blocks: the token table does not change while sampling
        self.symbols = model.symbols()
        self.guided = False
        self.group_size: int | None = None  # latents of a moment
        self.chunk_cache: TokComChunkCache | None = None  # of a local head
        transformer = model.config.transformer_config
        if transformer.local_head:
            self.chunk_cache = TokComChunkCache(transformer.num_places)

    def forget_chunk(self) -> None:
        """Tokens of the block at hand have changed, so what was computed of them is void."""
        if self.chunk_cache is not None:
            self.chunk_cache.clear()

    def lay_out(self, plan: list[TokComStep]) -> list[TokComStep]:
        """The steps of the block at hand with what they need to know of the context."""
        return plan

    def _predict(
        self,
        x: torch.Tensor,
        step: TokComStep,
        chunks: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: TokComWindowCache | None = None,
        prefix: tuple[torch.Tensor, ...] | None = None,
        entry: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if position_ids is None:
            position_ids = self.position_ids
        local = {}
        if self.chunk_cache is not None:
            local["given"] = step.given
            if step.decided is not None:
                self.chunk_cache.open(*step.decided)
                local["chunk_cache"] = self.chunk_cache
        return self.model.predict(
            x,
            step.time,
            position_ids,
            attention_mask,
            past_key_values=past_key_values,
            prefix=prefix,
            symbols=self.symbols,
            times=step.times,
            chunks=chunks,
            uncertain=step.uncertain,
            entry=entry,
            modulations=step.modulations,
            group_size=self.group_size,
            **local,
        ).latents


class VisibleContext(Context):
    """The context of a bidirectional model, which stands beside the noise at every step, and the
    captions before it."""

    def __init__(self, model: PreTrainedModel, task: TokComTask, omitted: list[torch.Tensor]):
        super().__init__(model)
        self.context = task.context
        self.prefix = task.prefix
        self.omitted = omitted  # parts of the context without which guidance also predicts
        self.chunks: torch.Tensor | None = None  # (B, S, K), the ids of the context
        if self.context is not None and self.symbols is not None:
            clean = torch.ones(*self.context.mask.shape, model.token_head.num_symbols)
            clean = clean.to(self.context.mask.device)
            self.chunks = model.token_head.recognise(self.symbols, self.context.latents, clean)

    def begin(self, position_ids: torch.Tensor, exists: torch.Tensor | None, guided: bool) -> None:
        """Turn to the latents at `position_ids (B, Q, A)`, of which `exists (B, Q)` are no
        padding; None if none is."""
        self.position_ids = position_ids.clone(memory_format=torch.contiguous_format)
        if self.model.config.transformer_config.attention_type == "factorized":
            self.group_size = moment_size(position_ids)  # once, since the host waits for it
        has_context = self.context is not None and self.context.mask.shape[1] > 0
        self.guided = guided and (has_context or self.prefix is not None)
        # a mask costs a faster kernel, so there is none where nothing is hidden
        self.own_keys = exists
        self.keys = exists
        self.omitted_keys: list[torch.Tensor] = []
        if self.context is None:
            return
        mask = self.context.mask
        if exists is None:
            exists = torch.ones(position_ids.shape[:2], dtype=torch.bool, device=mask.device)
        keys = torch.cat((mask, exists), dim=1)  # (B, S + Q)
        self.keys = None if bool(keys.all()) else keys
        self.omitted_keys = [torch.cat((mask & ~part, exists), dim=1) for part in self.omitted]
        self.all_positions = torch.cat((self.context.position_ids, self.position_ids), dim=1)

    def lay_out(self, plan: list[TokComStep]) -> list[TokComStep]:
        """The steps with those of `[context | x]`, whose context is clean."""
        if self.context is None:
            return plan
        return [step._replace(beside=self._beside(step)) for step in plan]

    def _beside(self, step: TokComStep) -> TokComStep:
        shape = self.context.mask.shape  # (B, S)
        time = step.time.expand(self.position_ids.shape[:2])
        if self.model.config.transformer_config.per_latent_timestep:
            context_time = torch.ones_like(time[:, :1])  # clean
        else:
            context_time = time[:, :1]  # such models are told one time for everything
        time = torch.cat((context_time.expand(shape), time), dim=1)  # (B, S + Q)
        modulations = None  # `forward` makes those of these times
        if not self.model.config.transformer_config.per_latent_timestep:
            modulations = [m[:, :1].expand(-1, time.shape[1], -1) for m in step.modulations]
        step = step._replace(time=time, modulations=modulations)
        if step.times is None:
            return step
        places = step.times.shape[2]
        times = torch.cat((step.times.new_ones(*shape, places), step.times), dim=1)  # (B, S + Q, K)
        nothing = torch.zeros(*shape, places, dtype=torch.bool, device=times.device)
        uncertain = TokComChoice.of(torch.cat((nothing, step.uncertain.mask), dim=1))
        return step._replace(times=times, uncertain=uncertain)

    def predict(
        self, x: torch.Tensor, step: TokComStep, chunks: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """What the network predicts of `x (B, Q, C)`: first with all that is known, then what
        guidance compares it with.

        `chunks (B, Q, K)` are the ids of the tokens that are decided.
        """
        if self.context is None:
            # without context the guided pass only drops the caption
            states = [self._predict(x, step, chunks, self.keys, prefix=self.prefix)]
            if self.guided:
                states.append(self._predict(x, step, chunks, self.keys))
            return states
        states = [
            self._predict_beside_context(x, step, chunks, keys)
            for keys in (self.keys, *self.omitted_keys)
        ]
        if self.guided:
            states.append(self._predict(x, step, chunks, self.own_keys))
        return states

    def _predict_beside_context(
        self,
        x: torch.Tensor,
        step: TokComStep,
        chunks: torch.Tensor | None,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """The prediction for `[context | x]`, of which only that of x is kept."""
        return self.model.predict(
            torch.cat((self.context.latents.to(x.dtype), x), dim=1),
            step.beside.time,
            self.all_positions,
            keys,
            symbols=self.symbols,
            times=step.beside.times,
            chunks=None if chunks is None else torch.cat((self.chunks, chunks), dim=1),
            uncertain=step.beside.uncertain,
            modulations=step.beside.modulations,
            prefix=self.prefix,
            group_size=self.group_size,
        ).latents[:, -x.shape[1] :]

    def append(self, x: torch.Tensor, ids: torch.Tensor | None) -> None:
        raise AssertionError("a bidirectional model has one block only")


class CachedContext(Context):
    """The context of a block-causal model: keys and values of what was read and of what was
    generated, in a window."""

    def __init__(self, model: PreTrainedModel, task: TokComTask):
        super().__init__(model)
        config = model.config.transformer_config
        self.block_size = config.block_size
        self.num_starts = int(config.start_latents)  # the learned latent of where a text starts
        self.longest = config.max_position_embeddings + self.num_starts
        self.length = 0  # latents in the window
        self.window = self._fitting(0 if task.context is None else task.context.mask.shape[1])
        # one more layer for the states of the context
        num_layers = config.num_hidden_layers + (config.num_context_layers > 0)
        self.cache = TokComWindowCache(num_layers, self.window)
        noise = task.noise
        # which places of the window a row may see: shorter rows and padding leave holes
        self.filled = torch.zeros(len(noise), self.window, dtype=torch.bool, device=noise.device)
        self.gaps = task.gaps
        self.context = task.context
        self.times = None  # of the context's tokens; 0 is unknown
        # of a finished block: its latents are clean, and none of its tokens is uncertain
        self.clean = torch.ones(len(noise), self.block_size, device=noise.device)
        self.clean_times = self.certain = None
        if self.symbols is not None:
            self.clean_times = self.clean[..., None].repeat(1, 1, model.token_head.num_symbols)
            self.certain = TokComChoice.of(torch.zeros_like(self.clean_times, dtype=torch.bool))
        if self.num_starts:
            self.context = self._with_start(task.context, noise, task.inside)
        if self.context is not None:
            self._read_context(self.context)

    def _fitting(self, length: int) -> int:
        """The size of a window for `length` latents, the next block, and the place of the block at
        hand."""
        # private, but the only sign that `Module.compile` leaves
        if self.model.transformer._compiled_call_impl is not None:
            return self.longest
        size = SMALLEST_WINDOW
        while size < length + 2 * self.block_size:
            size *= 2
        return min(size + self.num_starts, self.longest)

    def _with_start(
        self, context: TokComCodecOutput | None, noise: torch.Tensor, inside: list[bool] | None
    ) -> TokComCodecOutput:
        """The context with a learned latent in front of it: that of the start of a text, or of rows
        that begin inside one."""
        batch = len(noise)
        device = noise.device
        latents = noise.new_zeros(batch, 1, noise.shape[-1])  # replaced by the learned one
        position_ids = torch.full((batch, 1, 1), START_OF_TEXT, device=device)  # (B, 1, A), A = 1
        if inside is not None:
            position_ids[torch.tensor(inside, device=device)] = INSIDE_TEXT
        mask = torch.ones(batch, 1, dtype=torch.bool, device=device)
        if context is not None:
            latents = torch.cat((latents, context.latents.to(noise.dtype)), dim=1)
            position_ids = torch.cat((position_ids, context.position_ids), dim=1)
            mask = torch.cat((mask, context.mask), dim=1)
        return TokComCodecOutput(latents, position_ids, mask)

    def _read_context(self, context: TokComCodecOutput) -> None:
        """Run the context through the model, except what stands right before a gap: that is read
        when its turn comes."""
        batch, length = context.mask.shape
        device = context.mask.device
        # blocks are counted from the end, so that the last one is whole
        order = (torch.arange(length, device=device) + -length % self.block_size) // self.block_size
        is_read = torch.ones(length, dtype=torch.bool, device=device)
        if self.gaps is not None:
            for anchor in self.gaps.anchors:
                # place 0 is the start, so a latent of the context stands one further
                place = 0 if anchor is None else anchor + 1
                is_read[place] = False
            # all of the start is known
            partial_tokens = torch.nn.functional.pad(self.gaps.partial, (0, 0, 1, 0))
            self.times = torch.where(partial_tokens, 0.0, 1.0).expand(batch, -1, -1)
        where = is_read.nonzero()[:, 0]
        if not len(where):
            return
        # clean latents only: the first quarter of the mask of training
        sees = block_causal_mask(order[None].expand(batch, -1), context.mask)[:, :length, :length]
        self.cache.first = True
        self._remember(
            context.latents[:, where],
            context.position_ids[:, where],
            sees[:, where][:, :, where],
            times=None if self.times is None else self.times[:, where],
        )
        self.cache.first = False
        self._keep(context.mask[:, where], len(where))

    def read_anchor(self, anchor: int | None) -> None:
        """Read the context latent before a gap, which sees everything that is known by now."""
        where = slice(0, 1) if anchor is None else slice(anchor + 1, anchor + 2)
        context = self.context
        # the anchor is read into the last place, like a block
        sees = self.filled.clone()
        sees[:, -1:] = context.mask[:, where]
        times = None if self.times is None else self.times[:, where]
        self._remember(context.latents[:, where], context.position_ids[:, where], sees, times=times)
        self._keep(context.mask[:, where], 1)

    @cached_property
    def _without_context(self) -> torch.Tensor:
        """What the head is told `(1, 1, D)` where nothing is known, not even that a text starts."""
        transformer = self.model.transformer
        device = self.filled.device
        features = torch.zeros(
            1, 1, transformer.config.feature_size, device=device, dtype=self.model.dtype
        )
        position_ids = torch.full((1, 1, 1), INSIDE_TEXT, device=device)
        return transformer.read_context(
            features, position_ids, torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        )

    def begin(self, position_ids: torch.Tensor, exists: torch.Tensor | None, guided: bool) -> None:
        """Turn to the block at `position_ids (B, Q, A)`, of which `exists (B, Q)` are no
        padding; None if none is."""
        self.position_ids = position_ids.clone(memory_format=torch.contiguous_format)
        self.forget_chunk()
        self.own_keys = exists
        # without any context there is nothing to compare with
        self.guided = guided and self.length > self.num_starts
        self.keys = self.filled.clone()
        # the last places of the window are those of the current block
        own = self.keys[:, -position_ids.shape[1] :]
        own.fill_(True) if exists is None else own.copy_(exists)
        # what the context layers say of the block: with context and, if guided, without
        self.entries = []
        if self.model.config.transformer_config.num_context_layers:
            enter = self.model.transformer.entry
            # where nothing is known, layers are told what an empty context gives
            if self.length:
                self.entries.append(enter(self.position_ids, self.filled, self.cache))
            else:
                self.entries.append(enter(self.position_ids))
            if self.guided and self.num_starts:
                # a row that knows nothing yet is not guided, whatever the others know
                knows = self.filled[:, self.num_starts :].any(-1)[:, None, None]
                without = self._without_context.expand_as(self.entries[0])
                self.entries.append(torch.where(knows, without, self.entries[0]))
            elif self.guided:
                self.entries.append(enter(self.position_ids))

    def predict(
        self, x: torch.Tensor, step: TokComStep, chunks: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """What the network predicts of `x (B, Q, C)` with its context and, if guided, without.

        `chunks (B, Q, K)` are the ids of the tokens that are decided.
        """
        if self.entries and not self.model.config.transformer_config.head_attention:
            # only the entry tells with context from without, so both fit in one batch
            count = len(self.entries)
            position_ids = torch.cat([self.position_ids] * count)
            states = self._predict(
                x, step, chunks, position_ids=position_ids, entry=torch.cat(self.entries)
            )
            return list(states.chunk(count))  # (B, Q, K * E) each
        entry = self.entries[:1] or [None]
        free_entry = self.entries[1:] or [None]
        states = [
            self._predict(x, step, chunks, self.keys, past_key_values=self.cache, entry=entry[0])
        ]
        if self.guided:
            # a cached key cannot exist for half of a batch only, so this is a pass of its own
            states.append(self._predict(x, step, chunks, self.own_keys, entry=free_entry[0]))
        return states

    def append(self, x: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Remember the finished block `x (B, Q, C)`; that of a text as the clean latents of its ids
        `(B, Q * K)`.

        Training shows such latents, and what the decoder forgives in x does not reach the next
        block.
        """
        chunks = None
        length = x.shape[1]  # the last block may be shorter
        if self.symbols is not None:
            # the network reads the tokens alone
            chunks = self.model.codec.symbols(ids, None)[0]
        elif ids is not None:
            # a text is remembered as its tokens, not as the sampler left x
            x = self.model.codec.encode(ids).latents
        times = None if self.clean_times is None else self.clean_times[:, :length]
        time = self.clean[:, :length]
        self._remember(x, self.position_ids, self.keys, chunks, times, time, self.certain)
        self._keep(self.own_keys, length)

    def _remember(
        self,
        clean: torch.Tensor,
        position_ids: torch.Tensor,
        sees: torch.Tensor,
        chunks: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        time: torch.Tensor | float = 1.0,
        uncertain: TokComChoice | None = None,
    ) -> None:
        """Run clean latents through the model for what they leave in the cache; tokens at time 0
        are not known."""
        self.model.predict(
            clean,
            time,
            position_ids,
            sees,
            past_key_values=self.cache,
            num_context=clean.shape[1],
            symbols=self.symbols,
            chunks=chunks,
            times=times,
            uncertain=uncertain,
        )

    def _places(self, count: int) -> list[slice]:
        """Where the next `count` latents go: behind the others, or in the places of the oldest."""
        # the last places of the window belong to the current block
        capacity = self.window - self.block_size
        places = []
        first = self.length
        while count > 0:
            if first >= capacity:
                # the learned start stays; the others take turns in the places behind it
                first = self.num_starts + (first - self.num_starts) % (capacity - self.num_starts)
            last = min(first + count, capacity)
            places.append(slice(first, last))
            count -= last - first
            first = last
        return places

    def _keep(self, exists: torch.Tensor | None, length: int) -> None:
        """Give the `length` latents just remembered places in the window; `exists (B, length)` are
        those that are no padding, None all of them."""
        capacity = self.window - self.block_size
        if not self.length and length > capacity:
            # the learned start stays in its place, and of the others the last ones
            self.cache.keep([slice(0, self.num_starts)], self.window - length)
            self.filled[:, : self.num_starts] = True
            self.length = self.num_starts
            capacity -= self.num_starts
        count = min(length, capacity)
        if count < 1:
            return
        places = self._places(count)
        self.cache.keep(places)
        done = 0
        for place in places:
            size = place.stop - place.start
            start = length - count + done
            own = self.filled[:, place]
            own.fill_(True) if exists is None else own.copy_(exists[:, start : start + size])
            done += size
        self.length += count
        window = self._fitting(self.length - self.num_starts)
        if window > self.window:
            self.cache.grow(window, self.length)
            self.filled = torch.nn.functional.pad(self.filled, (0, window - self.window))
            self.window = window


__all__ = ["CachedContext", "Context", "TokComStep", "TokComWindowCache", "VisibleContext"]
