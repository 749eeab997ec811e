"""Latent heads: small networks between the estimate of a frozen transformer and a frozen decoder.

Notable choices: what a head makes of an estimate is what is decoded, so training and sampling take the same path; every
part starts as the identity, a codebook until it has seen its first batch; only the head is trained (stage "head").

Shape legend: B batch, N latents, C channels, S codes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_tokcom import TokComConfig
from .quantization_tokcom import VectorQuantizer


class TokComZeroNorm(nn.LayerNorm):
    """LayerNorm whose weight starts at zero: the branch it ends adds nothing at first."""


class TokComLatentMLP(nn.Module):
    """x + LN(W2 GELU(LN(W1 x))) on latents `(..., C)`: OmniFlow's text-decoder head, and smaller its LatentRefiner."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.linear_1, self.norm_1 = nn.Linear(channels, hidden_size), nn.LayerNorm(hidden_size)
        self.linear_2, self.norm_2 = nn.Linear(hidden_size, channels), TokComZeroNorm(channels)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents + self.norm_2(self.linear_2(F.gelu(self.norm_1(self.linear_1(latents)))))


class TokComLatentHead(nn.Module):
    """`config.latent_refiner`, then `config.latent_head`: estimates `(B, N, C)` -> what is decoded, and a scalar loss."""

    def __init__(self, config: TokComConfig):
        super().__init__()
        codec = config.codec_config
        channels = codec.latent_channels
        self.refiner = self.mlp = self.quantizer = None
        if config.latent_refiner == "mlp":
            self.refiner = TokComLatentMLP(channels, config.latent_refiner_size)
        if config.latent_head != "none":
            self.mlp = TokComLatentMLP(channels, config.latent_head_size)
        if config.latent_head == "vq":
            self.quantizer = VectorQuantizer(config.latent_head_codes, channels)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = latents.new_zeros(())
        if self.refiner is not None:
            latents = self.refiner(latents)
        if self.mlp is not None:
            latents = self.mlp(latents)
        if self.quantizer is not None and (self.training or self.quantizer.is_fitted):
            output = self.quantizer(latents)
            latents, loss = output.latents, output.loss
        return latents, loss


__all__ = ["TokComLatentHead", "TokComLatentMLP"]
