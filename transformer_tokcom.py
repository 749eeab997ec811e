"""The x1 network: noisy latents, one time and one position per latent -> the clean latents.

Notable choices: the timestep is per latent, so clean prompts, infilling and block-wise generation are data, not modes;
positions have any number of axes; which latent may see which is one boolean mask, and `block_causal_mask` builds the
one that trains block-wise generation (BD3-LM, Arriola et al. 2025) from the order in which latents are generated.

Shape legend: B batch, N latents, S sequence positions, C latent channels, D width, A position axes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

try:
    from .configuration_tokcom import TokComTransformerConfig
    from .layers_tokcom import (
        TokComAttention,
        TokComBlock,
        TokComPreTrainedModel,
        TokComRMSNorm,
        TokComTimestepEmbedding,
        expand_attention_mask,
        rotary_embedding,
    )
except ImportError:
    if __package__:
        raise
    import configuration_tokcom as _configuration
    import layers_tokcom as _layers

    TokComTransformerConfig = _configuration.TokComTransformerConfig
    TokComAttention, TokComBlock = _layers.TokComAttention, _layers.TokComBlock
    TokComPreTrainedModel, TokComRMSNorm = _layers.TokComPreTrainedModel, _layers.TokComRMSNorm
    TokComTimestepEmbedding = _layers.TokComTimestepEmbedding
    expand_attention_mask, rotary_embedding = _layers.expand_attention_mask, _layers.rotary_embedding


@dataclass
class TokComTransformerOutput(ModelOutput):
    """What the x1 network returns.

    Args:
        latents (`torch.FloatTensor` of shape `(B, S, C)`): the estimate of the clean latents x1.
        hidden_states, attentions (`tuple`, *optional*): per layer, on request (`attentions` with eager attention).
    """

    latents: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def block_causal_mask(
    order: torch.Tensor, valid: torch.Tensor, sees_context: torch.Tensor | None = None
) -> torch.Tensor:
    """Mask of the training sequence `[clean | noisy]`.

    A clean latent sees clean latents generated no later than itself; a noisy one sees clean latents generated earlier
    and the noisy ones of its own block. Every position sees itself, so that no softmax row is empty.

    Args:
        order (`torch.LongTensor` of shape `(B, N)`): the step at which each latent's block is generated. It need not
            follow the positions: a gap generated after what follows it trains infilling.
        valid (`torch.BoolTensor` of shape `(B, N)`): latents that are not padding.
        sees_context (`torch.BoolTensor` of shape `(B,)`, *optional*): rows whose noisy half sees the clean half.

    Returns: `torch.BoolTensor` of shape `(B, 2N, 2N)`.
    """
    query, key = order[:, :, None], order[:, None, :]
    same, earlier = key == query, key < query  # (B, N, N)
    visible = earlier if sees_context is None else earlier & sees_context[:, None, None]
    clean_rows = torch.cat((earlier | same, torch.zeros_like(same)), dim=-1)
    noisy_rows = torch.cat((visible, same), dim=-1)
    mask = torch.cat((clean_rows, noisy_rows), dim=1) & valid.repeat(1, 2)[:, None]
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


class TokComTransformer(TokComPreTrainedModel):
    """Transformer with per-latent adaLN conditioning that predicts clean latents.

    After DiT (Peebles and Xie 2023) with rotary positions, QK-norm, SwiGLU and grouped-query attention.
    """

    config: TokComTransformerConfig
    main_input_name = "latents"
    _can_record_outputs = {"hidden_states": TokComBlock, "attentions": TokComAttention}

    def __init__(self, config: TokComTransformerConfig):
        super().__init__(config)
        inputs = config.latent_channels * (2 if config.self_conditioning else 1)
        self.proj_in = nn.Linear(inputs, config.hidden_size) if config.input_projection else nn.Identity()
        self.time_embedding = TokComTimestepEmbedding(config.conditioning_size, config.timestep_scale)
        self.layers = nn.ModuleList(TokComBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = TokComRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj_out = nn.Linear(config.hidden_size, config.latent_channels)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        self_condition: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> TokComTransformerOutput:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(B, S, C)`): noisy latents, clean where `timestep` is 1.
            timestep (`torch.FloatTensor` of shape `(B, S)`): t in [0, 1]; 0 is noise, 1 is clean.
            position_ids (`torch.Tensor` of shape `(B, S, A)`, *optional*): defaults to 0..S-1 on one axis.
            attention_mask (`torch.BoolTensor`, *optional*): `(B, S_kv)` keys that exist, or `(B, S, S_kv)` keys that
                each query sees; S_kv includes what is cached.
            self_condition (`torch.FloatTensor` of shape `(B, S, C)`, *optional*): the previous estimate of x1.
            past_key_values (`Cache`, *optional*): keys and values of earlier blocks; this call's are appended.
        """
        config = self.config
        if config.self_conditioning:
            previous = torch.zeros_like(latents) if self_condition is None else self_condition
            latents = torch.cat((latents, previous), dim=-1)  # (B, S, 2C)
        if position_ids is None:
            position_ids = torch.arange(latents.shape[1], device=latents.device)[None, :, None]
        hidden_states = self.proj_in(latents)  # (B, S, D)
        conditioning = F.silu(self.time_embedding(timestep))  # (B, S, conditioning_size)
        head_dim = config.hidden_size // config.num_attention_heads
        tables = rotary_embedding(position_ids, head_dim, config.rope_theta)
        queries, implementation = latents.shape[1], config._attn_implementation
        mask = expand_attention_mask(attention_mask, queries, implementation, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning, tables, mask, past_key_values, **kwargs)
        return TokComTransformerOutput(latents=self.proj_out(self.norm(hidden_states)))


__all__ = ["TokComTransformer", "TokComTransformerOutput", "block_causal_mask"]
