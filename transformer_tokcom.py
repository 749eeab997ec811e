"""The x1 network: noisy latents, one time and one position per latent -> the clean latents.

Notable choices: the timestep is per latent, so clean prompts, infilling and block-wise generation
are data, not modes; positions have any number of axes; which latent may see which is one boolean
mask, and `block_causal_mask` builds the one that trains block-wise generation (BD3-LM, Arriola et
al. 2025) from the order in which latents are generated.

Shape legend: B batch, N latents, S sequence positions, C latent channels, D width, A position axes.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .configuration_tokcom import TokComTransformerConfig
from .layers_tokcom import (
    ContextPlan,
    TokComAttention,
    TokComBlock,
    TokComPreTrainedModel,
    TokComProjection,
    TokComRMSNorm,
    TokComTimestepEmbedding,
    expand_attention_mask,
    rotary_embedding,
)

# positions of the learned latent before the first one
START_OF_TEXT = -1  # the place before latent 0
INSIDE_TEXT = -2  # only tells the two apart: `_rotary` puts both at -1


@dataclass
class TokComOutput(ModelOutput):
    """What `TokComModel.forward` returns.

    Args:
        loss (`torch.FloatTensor`): scalar loss of the stage; the only field with a gradient.
        ce_loss (`torch.FloatTensor`): cross-entropy, nats per real token; None for images.
        mse_loss (`torch.FloatTensor`): squared error of x1 per channel; in stage codec, of pixels.
        kl_loss (`torch.FloatTensor`): in stage codec, KL divergence, nats per latent.
        token_losses (`torch.FloatTensor` of shape `(B, N, K)`): in stage flow, the cross-entropy of
            each token, 0 where nothing is predicted; None in training with `ce_share` below 1.
        weight (`torch.FloatTensor`): how many tokens or latents `loss` is a mean of, by which means
            over several batches weigh them.
    """

    loss: torch.FloatTensor | None = None
    ce_loss: torch.FloatTensor | None = None
    mse_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    token_losses: torch.FloatTensor | None = None
    weight: torch.FloatTensor | None = None


@dataclass
class TokComTransformerOutput(ModelOutput):
    """What the x1 network returns.

    Args:
        latents (`torch.FloatTensor` of shape `(B, S, C)`): the estimate of the clean latents x1.
        hidden_states, attentions (`tuple`, *optional*): per layer, on request (`attentions` with
            eager attention).
    """

    latents: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def block_causal_mask(
    order: torch.Tensor,
    valid: torch.Tensor,
    sees_context: torch.Tensor | None = None,
    draws: int = 1,
) -> torch.Tensor:
    """Mask of the training sequence `[clean | noisy]`, or with M `draws`
    `[clean | noisy | noisy ...]`.

    A clean latent sees clean latents generated no later than itself; a noisy one sees clean latents
    generated earlier and the noisy ones of its own block and draw. Every position sees itself, so
    that no softmax row is empty.

    Args:
        order (`torch.LongTensor` of shape `(B, N)`): the step at which each latent's block is
            generated. It need not follow the positions: a gap generated after what follows it
            trains infilling.
        valid (`torch.BoolTensor` of shape `(B, N)`): latents that are not padding.
        sees_context (`torch.BoolTensor` of shape `(B,)`, *optional*): rows whose noisy half sees
        the clean half.

    Returns: `torch.BoolTensor` of shape `(B, (1 + M) N, (1 + M) N)`.
    """
    length = order.shape[1]
    query = order[:, :, None]  # (B, N, 1)
    key = order[:, None, :]  # (B, 1, N)
    same = key == query  # (B, N, N)
    earlier = key < query
    visible = earlier if sees_context is None else earlier & sees_context[:, None, None]
    # axes: copy and latent of the query, copy and latent of the key; copy 0 is the clean one
    mask = same.new_zeros(len(order), 1 + draws, length, 1 + draws, length)
    mask[:, 0, :, 0] = earlier | same  # clean latents read clean ones only, never noise
    # a noisy latent reads what is finished: clean latents of earlier blocks, never its own
    mask[:, 1:, :, 0] = visible[:, None]
    for draw in range(1, 1 + draws):
        # draws are independent samples, so they must not see each other
        mask[:, draw, :, draw] = same
    mask = (mask & valid[:, None, None, None]).view(len(order), (1 + draws) * length, -1)
    # a row without any key would be 0 / 0 in the softmax
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def read_text(model, symbols, chunks, real, given, has_gaps, begins) -> torch.Tensor:
    """States `(B, 1 + N, D)` of the context network after `[start, chunk 0, chunk 1, ...]`.

    The state at each place is all that the head learns of what stands before the next chunk. In
    rows with gaps the state before a gap is computed last, so it has seen what follows. The chunk
    in which a gap ends is read with its unknown tokens blank.
    """
    batch, length, _ = chunks.shape
    plan = ContextPlan.of(given, has_gaps, real)
    blank = (plan.partial[..., None] & ~given) | ~real
    # known tokens are read at time 1, blank ones at time 0
    times = torch.where(blank, 0.0, 1.0)
    features = model.token_head.read(symbols, None, times, chunks)  # (B, N, K * E)
    # the learned start is put in place of this row of zeros
    features = F.pad(features, (0, 0, 1, 0))
    positions = torch.arange(-1, length, device=chunks.device).repeat(batch, 1)
    # the first place tells a text that begins from a window inside one
    positions[:, 0] = torch.where(begins, START_OF_TEXT, INSIDE_TEXT)
    return model.transformer.read_context(features, positions[..., None], plan.mask(real.any(-1)))


def moment_size(position_ids: torch.Tensor) -> int:
    """How many latents at `position_ids (B, N, A)` stand at the first moment; the host waits."""
    moments = position_ids[0, :, 0]  # axis 0 of a clip is time
    return int((moments == moments[0]).sum())


class _Factorized:
    """Folds sequences of G moments of P latents, moment after moment, so that layers attend within
    a moment, `(B G, P, ...)`, or along time, `(B P, G, ...)`."""

    def __init__(self, length: int, places: int):
        self.places = places
        if length % places:
            raise ValueError(
                f"`attention_type='factorized'` needs whole moments of {places} latents, not "
                f"{length} latents."
            )

    def fold(self, x: torch.Tensor, along_time: bool, batch: int) -> torch.Tensor:
        x = x.expand(batch, *x.shape[1:]).unflatten(1, (-1, self.places))  # (B, G, P, ...)
        return (x.transpose(1, 2) if along_time else x).flatten(0, 1)

    def unfold(self, x: torch.Tensor, along_time: bool, batch: int) -> torch.Tensor:
        x = x.unflatten(0, (batch, -1))  # (B, G, P, ...) or (B, P, G, ...)
        return (x.transpose(1, 2) if along_time else x).flatten(1, 2)


class TokComTransformer(TokComPreTrainedModel):
    """Transformer with per-latent adaLN conditioning that predicts clean latents.

    After DiT (Peebles and Xie 2023) with rotary positions, QK-norm, SwiGLU and grouped-query
    attention.
    """

    config: TokComTransformerConfig
    main_input_name = "latents"
    _can_record_outputs = {"hidden_states": TokComBlock, "attentions": TokComAttention}

    def __init__(self, config: TokComTransformerConfig):
        super().__init__(config)
        channels = config.feature_size or config.latent_channels  # K * E or C, in and out
        linear = TokComProjection if config.feature_size else nn.Linear
        self.proj_in = nn.Identity()
        if config.input_projection:
            self.proj_in = linear(channels, config.hidden_size)
        self.time_embedding = None
        if not config.local_head:
            self.time_embedding = TokComTimestepEmbedding(
                config.conditioning_size, config.timestep_scale
            )
        attends = config.head_attention or config.local_head
        self.layers = nn.ModuleList(
            TokComBlock(
                config,
                i,
                # context is clean, so it has no time, and so are the tokens before a place
                modulated=i >= config.num_context_layers and not config.local_head,
                attention=i < config.num_context_layers or attends,
            )
            for i in range(config.num_hidden_layers)
        )
        self.context_norm = self.context_proj = None
        if config.num_context_layers:
            self.context_norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.context_proj = TokComProjection(config.hidden_size, config.hidden_size)
        self.start_embedding = nn.Embedding(2, config.hidden_size) if config.start_latents else None
        self.stream_embedding = None
        if config.stream_channels is not None:
            self.stream_embedding = nn.Embedding(len(config.stream_channels), config.hidden_size)
        self.norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.token_in = self.place_embedding = None
        self.behind_in = self.distance_embedding = None
        if config.local_head:
            channels = config.feature_size // config.num_places  # E, of one token
            self.token_in = TokComProjection(channels, config.hidden_size, bias=False)
            self.place_embedding = nn.Embedding(config.num_places, config.hidden_size)
            self.behind_in = TokComProjection(channels, config.hidden_size, bias=False)
            self.distance_embedding = nn.Embedding(config.num_places, config.hidden_size)
        self.proj_out = linear(config.hidden_size, channels)
        self.gradient_checkpointing = False
        self.post_init()

    def _own_channels(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Which channels the latents at `position_ids (B, S, A)`, whose first axis is the stream,
        use: `(B, S, C)`."""
        counts = self.config.stream_channels
        channels = torch.arange(sum(counts), device=position_ids.device)
        # channel c belongs to the stream into whose slice of the C channels it falls
        owner = torch.zeros_like(channels)
        for end in itertools.accumulate(counts[:-1]):
            owner += channels >= end
        return position_ids[..., :1].long() == owner

    def _place_starts(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Put the learned latents where `position_ids (B, S, 1)` are negative: `START_OF_TEXT` or
        `INSIDE_TEXT`."""
        if self.start_embedding is None:
            return hidden_states
        # row 0 of the table is the start of a text, row 1 that of a window inside one
        kind = (position_ids[..., 0] == INSIDE_TEXT).long()
        # in the dtype of its neighbours, whatever autocast made of them
        starts = self.start_embedding(kind).to(hidden_states.dtype)
        return torch.where(position_ids[..., :1] < 0, starts, hidden_states)

    def read_context(
        self,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """What the context layers tell the later layers about each clean latent, `(B, S, D)`.

        Args:
            features (`torch.FloatTensor` of shape `(B, S, feature_size)`): what the clean latents
                hold.
            position_ids (`torch.LongTensor` of shape `(B, S, 1)`): negative where a learned latent
                stands.
            attention_mask (`torch.BoolTensor` of shape `(B, S, S_kv)`): which key each query sees.
            past_key_values: keys and values of latents that were read before; those of this call
                are added.
        """
        hidden_states = self._place_starts(self.proj_in(features), position_ids)  # (B, S, D)
        tables = self._rotary(position_ids)
        mask = self._expand(attention_mask, hidden_states)
        for layer in self.layers[: self.config.num_context_layers]:
            hidden_states = layer(hidden_states, None, tables, mask, past_key_values)
        return self.context_proj(self.context_norm(hidden_states))  # as `_nearest` does

    def modulate(self, timestep: torch.Tensor) -> list[torch.Tensor] | None:
        """t `(B, S)` -> the scales, shifts and gates `(B, S, ...)` of every layer after the context
        layers; None with a local head, which has no time."""
        if self.time_embedding is None:
            return None
        conditioning = F.silu(self.time_embedding(timestep))  # (B, S, conditioning_size)
        return [
            layer.modulation(conditioning)
            for layer in self.layers[self.config.num_context_layers :]
        ]

    def entry(
        self,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """What the denoising layers are told about the context, `(B, S, D)`; it does not depend on
        the time.

        The arguments are those of `forward`, of the latents to denoise; the context is what
        `past_key_values` holds. A model with `head_attention` also attends to the context.
        """
        where = position_ids[..., 0].float()  # as the cache holds positions
        # the layer of the cache behind the last one of the network holds states and positions
        layers = [] if past_key_values is None else past_key_values.layers
        if len(layers) > len(self.layers):
            known = layers[-1].keys[:, 0]  # (B, W, D)
            known_where = layers[-1].values[:, 0, :, 0]  # (B, W)
        else:
            shape = len(where), 0, self.config.hidden_size
            known = torch.zeros(shape, dtype=self.dtype, device=where.device)
            known_where = where[:, :0]  # (B, 0)
        return self._nearest(known, known_where, where, attention_mask)

    @capture_outputs
    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        num_context: int = 0,
        features: torch.Tensor | None = None,
        modulations: list[torch.Tensor] | None = None,
        entry: torch.Tensor | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        group_size: int | None = None,
        given: torch.Tensor | None = None,
        chunk_cache: Cache | None = None,
        **kwargs,
    ) -> TokComTransformerOutput:
        """Noisy latents -> the estimate of the clean ones.

        Args:
            latents (`(B, S, C)`): noisy latents, clean where `timestep` is 1.
            timestep (`(B, S)`): t in [0, 1]; 0 is noise, 1 is clean.
            position_ids (`(B, S, A)`): by default 0..S-1 on one axis.
            attention_mask (bool): `(B, S_kv)` keys that exist, or `(B, S, S_kv)` keys that each
                query sees; S_kv includes the `past_key_values`, to which this call's are appended.
            num_context: the first latents, which are clean and pass the context layers; all others
                enter after them. Without `head_attention` the output has no place for them.
            features (`(B, S, feature_size)`, *optional*): read instead of the latents.
            modulations, entry (`(B, S, D)`) (*optional*): what the methods `modulate` and `entry`
                give; with an entry there are no context latents in this call.
            prefix (*optional*): of bidirectional models, states `(B, L, D)` at time 1 before all
                latents, which of them exist, `(B, L)`, and their positions `(L,)`.
            group_size: latents of a moment, for factorised attention; else read from the positions.
            given (`(B, S, K)`): with a local head, the tokens that are known from the beginning.
            chunk_cache: with a local head, keys of places that earlier calls have computed, and
                which this one computes; the output is 0 at the others.
        """
        # what is not context is read token by token by a local head, behind the context layers
        count = num_context if self.config.local_head else latents.shape[1]
        inputs = (None if x is None else x[:, :count] for x in (latents, features, position_ids))
        hidden_states, own = self._read(*inputs)  # (B, S, D)
        hidden_states = F.pad(hidden_states, (0, 0, 0, latents.shape[1] - count))
        if position_ids is None:
            position_ids = torch.arange(latents.shape[1], device=latents.device)[None, :, None]
        if prefix is not None:
            modulations = None  # they are those of the latents alone
            hidden_states, timestep, position_ids, attention_mask = self._prepend(
                prefix, hidden_states, timestep, position_ids, attention_mask
            )
        reads = bool(self.config.num_context_layers) and entry is None
        tables = self._rotary(position_ids) if self.config.head_attention or reads else None
        where = position_ids, attention_mask, tables, past_key_values
        if reads:
            hidden_states = self._enter(hidden_states, num_context, *where, **kwargs)
        elif entry is not None:
            hidden_states = hidden_states + entry  # one per latent, the same at every time
        if num_context and not self.config.head_attention:  # the others carry its states
            hidden_states = hidden_states[:, num_context:]
            timestep = timestep[:, num_context:]
            if not hidden_states.shape[1]:  # all is context, which the cache holds by now
                return TokComTransformerOutput(latents=latents[:, :0])
        if self.config.local_head:
            features = features[:, num_context:]
            states = self._denoise_locally(features, hidden_states, given, chunk_cache)
            return TokComTransformerOutput(latents=states)
        states = self._denoise(hidden_states, timestep, modulations, group_size, *where, **kwargs)
        if prefix is not None:
            states = states[:, prefix[0].shape[1] :]  # captions are not predicted
        latents = self.proj_out(self.norm(states))  # (B, S, C) or (B, S, K * E)
        if own is not None:
            latents = torch.where(own, latents, 0)
        return TokComTransformerOutput(latents=latents)

    def _denoise_locally(
        self,
        features: torch.Tensor,
        entry: torch.Tensor,
        given: torch.Tensor | None,
        chunk_cache: Cache | None,
    ) -> torch.Tensor:
        """What is expected of every token given those before it in its chunk, `(B, S, K * E)`.

        `features (B, S, K * E)` hold the tokens, of which a place reads those before its own and,
        in a gap, the first one behind it that is `given (B, S, K)`. `entry (B, S, D)` is what the
        context says.
        """
        count = self.config.num_places
        own = slice(0, count) if chunk_cache is None else chunk_cache.places
        tokens = features.unflatten(-1, (count, -1)).flatten(0, 1)  # (B * S, K, E)
        before = F.pad(tokens, (0, 0, 1, -1))[:, own]  # (B * S, k, E), of the places at hand
        states = self.token_in(before) + self.place_embedding.weight[own]  # (B * S, k, D)
        if given is not None:
            states = states + self._read_behind(tokens, given.flatten(0, 1))[:, own]
        states = states + entry.flatten(0, 1)[:, None]
        places = torch.arange(count, device=features.device)
        head_size = self.config.hidden_size // self.config.num_attention_heads
        tables = rotary_embedding(places[None, own, None], head_size, self.config.rope_theta)
        mask = self._expand((places <= places[own, None])[None], states)  # causal, (1, 1, k, K)
        for layer in self.layers[self.config.num_context_layers :]:
            states = layer(states, None, tables, mask, chunk_cache)
        states = F.pad(self.proj_out(self.norm(states)), (0, 0, own.start, count - own.stop))
        return states.flatten(1).view(*entry.shape[:2], -1)

    def _read_behind(self, tokens: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What a place inside a gap is told of the first known token behind it in its chunk, and
        how far away that is, `(R, K, D)`; 0 where none is, and outside gaps.

        `tokens (R, K, E)`, of which those that are `given (R, K)` are known from the beginning.
        """
        count = tokens.shape[1]
        places = torch.arange(count, device=tokens.device)
        # the first known place from each one on, `count` if there is none
        found = torch.where(given, places, count).flip(1).cummin(1).values.flip(1)  # (R, K)
        is_told = ~given & (found < count)
        found = found.clamp(max=count - 1)
        known = tokens.gather(1, found[..., None].expand_as(tokens))
        told = self.behind_in(known) + self.distance_embedding((found - places).clamp(min=0))
        return torch.where(is_told[..., None], told, 0)

    def _denoise(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        modulations: list[torch.Tensor] | None,
        group_size: int | None,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> torch.Tensor:
        """The layers after the context layers, `(B, S, D)` in and out.

        They read `timestep (B, S)`, or the `modulations` that were made of it.
        """
        # (B, S, conditioning_size)
        conditioning = F.silu(self.time_embedding(timestep)) if modulations is None else None
        if self.config.attention_type == "factorized":
            places = group_size or moment_size(position_ids)
            where = position_ids, attention_mask, places
            return self._attend_in_turns(hidden_states, conditioning, modulations, *where, **kwargs)
        mask = None
        if self.config.head_attention:
            # layers without attention have no use for a mask
            mask = self._expand(attention_mask, hidden_states)
        for i, layer in enumerate(self.layers[self.config.num_context_layers :]):
            known = {} if modulations is None else {"modulation": modulations[i]}
            hidden_states = layer(
                hidden_states, conditioning, tables, mask, past_key_values, **known, **kwargs
            )
        return hidden_states

    def _read(
        self,
        latents: torch.Tensor,
        features: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States `(B, S, D)` of what is read, and of several streams the channels `(B, S, C)` each
        latent uses."""
        own = None
        if self.stream_embedding is not None:
            if position_ids is None:
                raise ValueError(
                    "`position_ids` is missing: its first axis says which stream a latent is of; "
                    "`encode` gives it."
                )
            own = self._own_channels(position_ids)  # (B, S, C)
            latents = torch.where(own, latents, 0)
        inputs = features if self.config.feature_size else latents
        hidden_states = self.proj_in(inputs)  # (B, S, D)
        if position_ids is not None:
            hidden_states = self._place_starts(hidden_states, position_ids)
        if own is not None:
            hidden_states = hidden_states + self.stream_embedding(position_ids[..., 0].long())
        return hidden_states, own

    def _rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of the rotary embedding; the learned starts of a text stand just before its first
        latent."""
        config = self.config
        if config.start_latents:
            position_ids = position_ids.clamp_min(-1)  # both starts at -1
        head_size = config.hidden_size // config.num_attention_heads
        return rotary_embedding(position_ids, head_size, config.rope_theta)

    def _expand(self, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor):
        """The boolean mask in the form that the attention function of this model wants."""
        implementation = self.config._attn_implementation
        return expand_attention_mask(
            attention_mask, hidden_states.shape[1], implementation, hidden_states.dtype
        )

    def _attend_in_turns(
        self, hidden_states, conditioning, modulations, position_ids, mask, places, **kwargs
    ) -> torch.Tensor:
        """All layers of a model with factorised attention: even ones within a moment, odd ones
        along time."""
        batch = len(hidden_states)
        position_ids = position_ids.expand(batch, -1, -1)
        folded = _Factorized(position_ids.shape[1], places)
        layouts = []  # rotary tables and mask, within a moment and along time
        for along_time in (False, True):
            where = folded.fold(position_ids, along_time, batch)
            seen = None
            if mask is not None:
                seen = folded.fold(mask, along_time, batch)
                implementation = self.config._attn_implementation
                seen = expand_attention_mask(
                    seen, where.shape[1], implementation, hidden_states.dtype
                )
            layouts.append((self._rotary(where), seen))
        for i, layer in enumerate(self.layers):
            # even layers attend within a moment, odd ones along time
            along_time = bool(i % 2)
            states = folded.fold(hidden_states, along_time, batch)  # (B G, P, D) or (B P, G, D)
            # times are per latent, so what is made of them is folded like the states
            time = None
            known = {}
            if modulations is None:
                time = folded.fold(conditioning, along_time, batch)
            else:
                known = {"modulation": folded.fold(modulations[i], along_time, batch)}
            output = layer(states, time, *layouts[along_time], **known, **kwargs)
            hidden_states = folded.unfold(output, along_time, batch)  # (B, S, D)
        return hidden_states

    def _prepend(
        self, prefix, hidden_states, timestep, position_ids, attention_mask
    ) -> tuple[torch.Tensor, ...]:
        """States, times, positions and the mask of keys with those of a prefix in front."""
        states, exists, places = prefix
        batch, length, _ = hidden_states.shape
        shape = batch, -1, self.config.num_position_axes
        # a caption stands at the same negative number on every axis
        places = places[None, :, None].expand(shape)  # (B, L, A)
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, dtype=torch.bool, device=states.device)
        return (
            torch.cat((states.to(hidden_states.dtype), hidden_states), dim=1),
            torch.cat(
                (timestep.new_ones(batch, states.shape[1]), timestep.expand(batch, -1)), dim=1
            ),
            torch.cat((places, position_ids.expand(shape)), dim=1),
            torch.cat((exists, attention_mask), dim=1),
        )

    def _enter(
        self,
        hidden_states,
        num_context,
        position_ids,
        attention_mask,
        tables,
        past_key_values,
        **kwargs,
    ) -> torch.Tensor:
        """Pass the first `num_context` latents through the context layers, and give all others the
        state of the nearest visible context latent before them. `hidden_states (B, S, D)` in and
        out.

        One more layer of the cache holds states and positions of the context.
        """
        batch, queries, _ = hidden_states.shape
        known = hidden_states[:, :num_context]  # clean
        noisy = hidden_states[:, num_context:]
        where = position_ids[..., 0].float().expand(batch, -1)  # (B, S); -inf needs floats
        visible = attention_mask
        if visible is not None and visible.ndim == 2:
            # one row of keys serves all queries
            visible = visible[:, None].expand(-1, queries, -1)  # (B, S, S_kv)
        if num_context:
            # context latents see what is cached and each other, but none of the noisy ones
            keys = None if visible is None else visible.shape[-1] - queries + num_context
            mask = None if visible is None else visible[:, :num_context, :keys]
            mask = expand_attention_mask(
                mask, num_context, self.config._attn_implementation, known.dtype
            )
            known_tables = tuple(table[:, :, :num_context] for table in tables)
            for layer in self.layers[: self.config.num_context_layers]:
                known = layer(known, None, known_tables, mask, past_key_values, **kwargs)
            # normed here, once, since every denoising layer and step reads them
            states = self.context_norm(known)  # (B, S_context, D)
            positions = where[:, :num_context]
            if past_key_values is not None:
                states, positions = past_key_values.update(
                    states[:, None], positions[:, None, :, None], len(self.layers)
                )
                states = states[:, 0]  # (B, S_context, D)
                positions = positions[:, 0, :, 0]
        if not noisy.shape[1]:
            return known
        visible = None if visible is None else visible[:, num_context:]
        if num_context:
            entry = self._nearest(states, positions, where[:, num_context:], visible)
        else:
            entry = self.entry(position_ids.expand(batch, -1, -1), visible, past_key_values)
        return torch.cat((known, noisy + entry), dim=1)

    def _nearest(self, states, positions, where, visible) -> torch.Tensor:
        """For each latent at `where (B, S)` the state of the last context latent before it that
        `visible (B, S_kv)` or `(B, S, S_kv)` shows it, projected: `(B, S, D)`. Context `states
        (B, S_context, D)` stand at `positions (B, S_context)`."""
        if not states.shape[1]:
            return self.context_proj(states.new_zeros(*where.shape, states.shape[2]))
        # strictly earlier: a latent must not read its own clean self
        earlier = positions[:, None] < where[..., None]  # (B, S, S_context)
        if visible is not None:
            visible = visible[:, None] if visible.ndim == 2 else visible  # (B, 1 or S, S_kv)
            earlier = earlier & visible[..., : states.shape[1]]  # keys of the context come first
        # the largest position that is earlier and visible
        nearest = positions[:, None].masked_fill(~earlier, float("-inf")).argmax(-1)  # (B, S)
        nearest = states.gather(1, nearest[..., None].expand(-1, -1, states.shape[2]))  # (B, S, D)
        return self.context_proj(torch.where(earlier.any(-1, keepdim=True), nearest, 0))


__all__ = [
    "INSIDE_TEXT",
    "START_OF_TEXT",
    "TokComOutput",
    "TokComTransformer",
    "TokComTransformerOutput",
    "block_causal_mask",
    "moment_size",
    "read_text",
]
