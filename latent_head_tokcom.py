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


class TokComZeroConv(nn.Conv2d):
    """Convolution that starts at zero."""


class TokComPixelUNet(nn.Module):
    """x + a two-level U-Net (Ronneberger et al. 2015) over the picture that patches `(B, N, K * G)` make at their places."""

    def __init__(self, digits: int, patch_size: int, columns: int, hidden_size: int):
        super().__init__()
        self.patch_size, self.columns = patch_size, columns
        self.conv_in = nn.Conv2d(digits, hidden_size, 3, padding=1)
        self.down = nn.Conv2d(hidden_size, 2 * hidden_size, 4, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * hidden_size, 2 * hidden_size, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * hidden_size, hidden_size, 4, stride=2, padding=1)
        self.conv_out = TokComZeroConv(2 * hidden_size, digits, 3, padding=1)

    def forward(self, latents: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`position_ids (B, N, 2)` are rows and columns of the patches; what no patch covers is 0."""
        batch, count, channels = latents.shape
        size = self.patch_size
        places = (position_ids[..., 0] * self.columns + position_ids[..., 1]).long().expand(batch, -1)
        rows = int(position_ids[..., 0].max()) + 1
        places = places[..., None].expand(-1, -1, channels)
        whole = latents.new_zeros(batch, rows * self.columns, channels).scatter(1, places, latents)
        grid = whole.view(batch, -1, self.columns, size, size, channels // size**2)  # rows, columns, row in, column in
        image = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, G, height, width)
        shape = image.shape
        image = F.pad(image, (0, shape[3] % 2, 0, shape[2] % 2))
        fine = F.silu(self.conv_in(image))
        coarse = F.silu(self.middle(F.silu(self.down(fine))))
        change = self.conv_out(torch.cat((fine, F.silu(self.up(coarse))), dim=1))[:, :, : shape[2], : shape[3]]
        change = change.unflatten(2, (-1, size)).unflatten(4, (self.columns, size)).permute(0, 2, 4, 3, 5, 1)
        return latents + change.reshape(whole.shape).gather(1, places)


class TokComLatentHead(nn.Module):
    """`config.latent_refiner`, then `config.latent_head`: estimates `(B, N, C)` -> what is decoded, and a scalar loss."""

    def __init__(self, config: TokComConfig):
        super().__init__()
        codec = config.codec_config
        channels = codec.latent_channels
        self.refiner = self.mlp = self.quantizer = None
        if config.latent_refiner == "mlp":
            self.refiner = TokComLatentMLP(channels, config.latent_refiner_size)
        elif config.latent_refiner == "unet":
            columns, size = codec.image_size // codec.patch_size, codec.patch_size
            self.refiner = TokComPixelUNet(codec.digits_per_token, size, columns, config.latent_refiner_size)
        if config.latent_head != "none":
            self.mlp = TokComLatentMLP(channels, config.latent_head_size)
        if config.latent_head == "vq":
            self.quantizer = VectorQuantizer(config.latent_head_codes, channels)

    def forward(self, latents: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = latents.new_zeros(())
        if self.refiner is not None:
            places = (position_ids,) if isinstance(self.refiner, TokComPixelUNet) else ()
            latents = self.refiner(latents, *places)
        if self.mlp is not None:
            latents = self.mlp(latents)
        if self.quantizer is not None and (self.training or self.quantizer.is_fitted):
            output = self.quantizer(latents)
            latents, loss = output.latents, output.loss
        return latents, loss


__all__ = ["TokComLatentHead", "TokComLatentMLP", "TokComPixelUNet"]
