"""Building blocks shared by the codecs and the transformer.

Notable choices:
- Rotary embedding works for any number of axes. It is computed from `position_ids (B, N, A)`; there
  are no position buffers.
- Attention goes through the transformers interface: `attn_implementation` may be eager, sdpa, flash
  or flex.
- One block serves the codec (plain pre-norm) and the transformer (adaLN).
- One boolean attention mask serves every backend.
- Cross-entropy never holds the full `(tokens, vocabulary)` logits.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CROSS_ENTROPY_CHUNK = 512  # rows of logits that exist at once


def rotary_embedding(
    position_ids: torch.Tensor, head_size: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine tables of rotary position embedding (RoFormer) over A axes, each with a share
    of the channels.

    Args:
        position_ids (`torch.Tensor` of shape `(B, N, A)`): positions, integer or fractional.
        head_size (`int`): channels of a head, even and at least 2A. The first axes get the channel
            pairs that are left over.
        theta (`float`): base of the frequencies.

    Returns: two float32 tensors of shape `(B, 1, N, head_size)`.
    """
    pairs = head_size // 2  # each pair of channels is a plane that turns by one angle
    axes = position_ids.shape[-1]
    angles = []
    for axis in range(axes):
        # every axis has its own range of frequencies, from 1 down to nearly 1 / theta
        share = pairs // axes + (axis < pairs % axes)
        exponents = torch.arange(share, device=position_ids.device, dtype=torch.float32) / share
        angles.append(position_ids[..., axis, None].float() * theta**-exponents)  # (B, N, share)
    # twice, because channel i is rotated together with channel i + head_size / 2
    angles = torch.cat(angles * 2, dim=-1)[:, None]  # (B, 1, N, head_size)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `states (B, H, N, head_size)` by the tables of `rotary_embedding`."""
    cos, sin = (table.to(states.dtype) for table in tables)  # (B, 1, N, head_size)
    first, second = states.chunk(2, dim=-1)
    # (x, y) cos + (-y, x) sin turns the plane of x = channel i and y = channel i + head_size / 2
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def attention_backend(implementation: str, device: torch.device) -> str:
    """The attention function that actually runs on `device`: sdpa replaces flex on the CPU.

    Torch's compiled flex kernel has no backward pass on the CPU. On AVX2 it also reads past the
    keys if their number is 8 more than a multiple of 16 (torch 2.13: an error of 1 at 8 keys, NaN
    at 40). sdpa gives the same result.
    """
    return "sdpa" if implementation == "flex_attention" and device.type == "cpu" else implementation


def expand_attention_mask(
    mask: torch.Tensor | None, queries: int, implementation: str, dtype: torch.dtype
) -> "torch.Tensor | object | None":
    """Convert a boolean mask to the form that the attention backend expects.

    Args:
        mask (`torch.Tensor`, *optional*): `(B, S_kv)` marks the keys that exist; `(B, S_q, S_kv)`
            marks the keys that each query may see. `None` means that all keys are visible.
        queries (`int`): S_q, smaller than S_kv when keys are cached.
        implementation (`str`): the name in `config._attn_implementation`.

    Raises `ValueError` for a per-query mask with flash attention, which cannot express it.
    """
    if mask is None:
        return None
    implementation = attention_backend(implementation, mask.device)
    if "flash" in implementation:
        if mask.ndim == 3:
            # flash attention only knows padding, given as (B, S_kv)
            raise ValueError(
                f"`attn_implementation` ({implementation!r}) cannot express block-causal or "
                "per-query masks; load the model with attn_implementation='sdpa' or "
                "'flex_attention'."
            )
        return mask
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask  # slow to import

        def may_attend(batch, head, query, key):
            return mask[batch, key] if mask.ndim == 2 else mask[batch, query, key]

        return create_block_mask(
            may_attend, mask.shape[0], None, queries, mask.shape[-1], device=mask.device
        )
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]  # (B, 1, 1 or S_q, S_kv)
    if implementation == "eager":  # it adds the mask to the scores
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)  # (B, 1, 1 or S_q, S_kv)
        # not -inf: a row without any key would be NaN
        return bias.masked_fill(~mask, torch.finfo(dtype).min)
    return mask


class ContextPlan(NamedTuple):
    """In which order the context network reads `[start, chunk 0, ...]` of rows whose tokens are
    partly known.

    `order (B, 1 + N)` is the step at which each is read: it sees what is read no later.
    `partial (B, N)` marks chunks that are read with their unknown tokens blank, before those are
    known.
    """

    order: torch.Tensor
    partial: torch.Tensor

    @classmethod
    def of(
        cls, given: torch.Tensor, has_gaps: torch.Tensor, real: torch.Tensor | None = None
    ) -> "ContextPlan":
        """The plan of rows `has_gaps (B,)` whose `given (B, N, K)` tokens are known; other rows are
        read in order. What is not `real (B, N, K)` is padding, and no gap.

        What is known is read first, then for each gap the state before it, then the gap's chunks as
        they are filled.
        """
        batch, length, _ = given.shape
        index = torch.arange(length + 1, device=given.device).expand(batch, -1)  # 0 is the start
        # chunks of a gap are those of which some token is not known
        is_missing = ~given if real is None else real & ~given
        gap = is_missing.any(-1) & has_gaps[:, None]  # (B, N)
        inside = F.pad(gap[:, 1:], (0, 1))  # whether the gap goes on in the next chunk
        # only the last chunk of a gap can hold known tokens that are read before it is filled
        partial = gap & ~inside & given.any(-1)
        # the state before a gap must wait, since it tells the head what follows the gap
        # of the places [start, chunk 0, ...]: chunk i of a gap marks place i, right before it
        starts = F.pad(gap, (0, 1))  # (B, 1 + N)
        late = starts | F.pad(gap & ~partial, (1, 0))
        # late places follow all others, and keep their order among themselves
        return cls(torch.where(late, index + length + 1, index), partial)

    def mask(self, valid: torch.Tensor) -> torch.Tensor:
        """Which key each query sees, `(B, 1 + N, 1 + N)`; `valid (B, N)` are chunks that are no
        padding."""
        exists = F.pad(valid, (1, 0), value=True)  # the start always does
        # a place also sees itself, whose order is equal
        sees = (self.order[:, None, :] <= self.order[:, :, None]) & exists[:, None, :]
        return sees | torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
):
    """Attention in plain torch, with the signature that transformers expects; returns weights."""
    # each key/value head serves a group of query heads
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S_kv, head_dim)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, S_q, S_kv)
    if attention_mask is not None:
        scores = scores + attention_mask
    # in float32: a sum over many keys loses precision in bfloat16
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_float32_attention_forward(module, query, key, value, attention_mask, **kwargs):
    """`sdpa` in float32 even under autocast: on CPUs its bfloat16 backward pass is often slower."""
    with torch.autocast(query.device.type, enabled=False):
        inputs = query.float(), key.float(), value.float()
        output, weights = sdpa_attention_forward(module, *inputs, attention_mask, **kwargs)
    return output.to(query.dtype), weights


ALL_ATTENTION_FUNCTIONS.register("sdpa_float32", sdpa_float32_attention_forward)


class TokComRMSNorm(nn.RMSNorm):
    """RMSNorm with its weight in the input's dtype; the fused kernel then also runs under
    autocast."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, self.normalized_shape, weight, self.eps)


class TokComAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional QK-norm, and an optional key/value
    cache."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5  # gives scores a variance near 1
        self.is_causal = False  # the mask alone says what a query sees
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = TokComRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = TokComRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (B, S, D)` -> `(B, S, D)` and the attention weights, if the backend has
        them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        # QK-norm is per head and before rotation, which keeps lengths
        query = self.q_norm(self.q_proj(hidden_states).view(heads))
        query = query.transpose(1, 2)  # (B, H, S, head_dim)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # (B, key/value heads, S, .)
        # QK-norm may leave another dtype than the projections, and attention needs one
        query = apply_rotary(query, position_embeddings).to(value.dtype)
        key = apply_rotary(key, position_embeddings).to(value.dtype)
        if past_key_values is not None:  # keys are cached after rotation: positions never change
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = attention_backend(self.config._attn_implementation, query.device)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights  # (B, S, D)


class TokComMLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class TokComTimestepEmbedding(nn.Module):
    """Sinusoids of `scale * t` and a two-layer MLP: `timestep (B, N)` in [0, 1] -> `(B, N, size)`.

    The sinusoids are computed in float32, because neighbouring times differ little.
    """

    def __init__(self, size: int, scale: float):
        super().__init__()
        self.size = size
        self.scale = scale
        self.linear_1 = nn.Linear(size, 4 * size)
        self.linear_2 = nn.Linear(4 * size, size)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        half = self.size // 2
        exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
        frequencies = torch.exp(-math.log(10000.0) * exponents)  # (size / 2,), from 1 to near 1e-4
        angles = timestep[..., None].float() * self.scale * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, N, size)
        waves = waves.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class TokComModulation(nn.Linear):
    """Timestep embedding -> scales, shifts and gates of a block. Initialised to zero."""


class TokComProjection(nn.Linear):
    """Linear map into or out of the network. Its initial variance of 1 / inputs keeps the size of
    signals."""


class TokComTokenEmbedding(nn.Embedding):
    """Token embedding for both input and output. Its rows start with length 1."""


class TokComBlock(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, with adaLN per position (DiT, Peebles and Xie 2023).

    With `adaln_gates` the block is the identity at initialisation (adaLN-zero). Without gates it
    starts as a plain pre-norm block, the published v5.2 form. `modulated=False` leaves out adaLN;
    `attention=False` leaves only the feed-forward half.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        modulated: bool = True,
        attention: bool = True,
    ):
        super().__init__()
        self.attention_norm = self.self_attn = None
        if attention:
            self.attention_norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = TokComAttention(config, layer_idx)
        self.mlp_norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TokComMLP(config.hidden_size, config.intermediate_size)
        self.modulation = None
        if modulated:
            # scale, shift and perhaps a gate, for each of the two halves
            parts = 3 if config.adaln_gates else 2
            if attention:
                parts *= 2
            self.modulation = TokComModulation(config.conditioning_size, parts * config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        modulation: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`hidden_states (B, S, D)` -> `(B, S, D)`.

        `modulation` is `self.modulation(conditioning)`; the sampler computes it once for all
        blocks.
        """

        def attend(inputs: torch.Tensor) -> torch.Tensor:
            return self.self_attn(
                inputs, position_embeddings, attention_mask, past_key_values, **kwargs
            )[0]

        branches = [(self.mlp_norm, self.mlp)]
        if self.self_attn is not None:
            branches.insert(0, (self.attention_norm, attend))
        parts = ()  # scale and shift of every branch, then their gates
        if self.modulation is not None:
            if modulation is None:
                modulation = self.modulation(conditioning)
            parts = modulation.chunk(self.modulation.out_features // hidden_states.shape[-1], -1)
        for i, (norm, function) in enumerate(branches):
            inputs = norm(hidden_states)  # (B, S, D)
            if parts:
                # 1 +, so that a modulation of zeros changes nothing
                inputs = inputs * (1 + parts[2 * i]) + parts[2 * i + 1]
            update = function(inputs)  # (B, S, D)
            gates = parts[2 * len(branches) :]  # empty without `adaln_gates`
            if gates:
                update = gates[i] * update
            hidden_states = hidden_states + update
        return hidden_states


class TokComPreTrainedModel(PreTrainedModel):
    """Base class of every TokCom module: weight initialisation and supported backends."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # what `device_map` must not spread over devices, and what FSDP gathers at once
    _no_split_modules = [
        *("TokComBlock", "TokComResidualMLP", "TokComStyleBlock", "TokComStyledBlock"),
        "TokComSlotMLP",  # of some codecs most of their weights
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # "TokComZero" by name: those classes live in modules that import this one
        if isinstance(module, TokComModulation) or type(module).__name__.startswith("TokComZero"):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (TokComProjection, TokComTokenEmbedding)):
            # variance 1 / inputs; rows of an embedding start at a length near 1
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if hasattr(module, "initialize_parameters"):  # parameters and buffers outside torch layers
            module.initialize_parameters()


def entry_point(method: Callable) -> Callable:
    """Let accelerate's offload hook, which is installed for `forward`, act for this method too."""

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        if hasattr(getattr(self, "_hf_hook", None), "pre_forward"):
            # loads offloaded weights, as a call of `forward` would
            self._hf_hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return wrapper


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets`, with few logits in memory.

    At most `CROSS_ENTROPY_CHUNK` rows of logits exist at a time. The backward pass recomputes them,
    so memory is independent of `rows x V`.

    Args:
        hidden (`torch.Tensor` of shape `(rows, E)`), weight (`(V, E)`), targets (`(rows,)` of ids).

    Returns: nats `(rows,)` in float32.
    """

    def rows_loss(rows: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # float32: log-sum-exp over a vocabulary loses too much in bfloat16
        return F.cross_entropy(F.linear(rows, weight).float(), ids, reduction="none")

    # without a gradient, checkpointing would only cost time
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    losses = []
    for rows, ids in zip(hidden.split(CROSS_ENTROPY_CHUNK), targets.split(CROSS_ENTROPY_CHUNK)):
        if needs_grad:
            losses.append(checkpoint(rows_loss, rows, weight, ids, use_reentrant=False))
        else:
            losses.append(rows_loss(rows, weight, ids))
    return torch.cat(losses)
