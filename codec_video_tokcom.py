"""Video codec: a clip <-> one latent per patch of space and time.

Notable choices: positions have three axes, time, row and column, and are made from the size of the
clip at hand, so one model reads clips of any size; without a network the values of a patch are its
latent and nothing is lost; with one, a quantiser may stand in the middle. Clips are pixels, or the
latents of an external autoencoder, of which only the number of channels differs.

Shape legend: B batch, N latents, C latent channels, c channels of the clip, F frames, H x W pixels,
P values in a patch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .codec_chunk_tokcom import TokComCodec, TokComCodecOutput, TokComResidualMLP
from .configuration_codec_tokcom import TokComVideoCodecConfig
from .layers_tokcom import TokComRMSNorm
from .quantization_tokcom import build_quantizer


@dataclass
class TokComVideoOutput(ModelOutput):
    """What the video codec's `decode` returns: `pixel_values (B, c, F, H, W)`, of pixels -1 black
    and 1 white."""

    pixel_values: torch.FloatTensor | None = None


class TokComPatchNetwork(nn.Sequential):
    """Residual MLP over single patches, `(..., inputs)` -> `(..., outputs)`."""

    def __init__(self, config: TokComVideoCodecConfig, inputs: int, outputs: int):
        width = config.hidden_size
        layers = [TokComResidualMLP(config) for _ in range(config.num_hidden_layers)]
        norm = TokComRMSNorm(width, config.rms_norm_eps)
        super().__init__(nn.Linear(inputs, width), *layers, norm, nn.Linear(width, outputs))


class TokComVideoCodec(TokComCodec):
    """Space-time patches as latents, standardised per channel with the buffers `latent_mean` and
    `latent_std`."""

    config: TokComVideoCodecConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TokComVideoCodecConfig):
        super().__init__(config)
        channels = config.latent_channels
        values = config.patch_values
        self.encoder = self.decoder = self.quantizer = None
        if config.hidden_size:
            self.encoder = TokComPatchNetwork(config, values, channels)
            self.decoder = TokComPatchNetwork(config, channels, values)
            self.quantizer = build_quantizer(
                config.quantizer,
                channels,
                config.num_codes,
                config.num_quantizers,
                config.fsq_levels,
            )
        self.latent_mean = nn.Buffer(torch.zeros(channels))
        self.latent_std = nn.Buffer(torch.ones(channels))
        self.gradient_checkpointing = False
        self.post_init()

    def initialize_parameters(self) -> None:
        init.zeros_(self.latent_mean)
        init.ones_(self.latent_std)

    def get_input_embeddings(self):
        return None

    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Standardise latents with these `mean` and `std`, `(C,)` or `(N, C)` of which the mean
        over N is taken."""
        if mean.ndim == 2:
            std = (std.square().mean(0) + mean.var(0, correction=0)).sqrt()
            mean = mean.mean(0)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp_min(1e-2))  # values that hardly vary must not become noise

    # ---- where latents stand ----

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Index of latents `(...)` of a clip of the configured height and width -> moment, row and
        column, `(..., 3)`."""
        columns = self.config.width // self.config.patch_size
        moment = index // self.config.group_size
        place = index % self.config.group_size
        return torch.stack((moment, place // columns, place % columns), dim=-1)

    def grid(
        self, frames: int, height: int, width: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Positions `(N, 3)` of the latents of a clip of this size; raises `ValueError` if patches
        do not divide it."""
        self.config.check_shape(frames, height, width)
        size = self.config.patch_size
        axes = frames // self.config.frames_per_patch, height // size, width // size
        return torch.cartesian_prod(*(torch.arange(n, device=device) for n in axes)).view(-1, 3)

    @staticmethod
    def size_of(pixel_values: torch.Tensor) -> tuple[int, int, int]:
        """Frames, height and width of what `encode` is given."""
        return tuple(pixel_values.shape[2:])

    # ---- clips <-> patches ----

    def to_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Clips `(B, c, F, H, W)` -> `(B, N, P)`; raises `ValueError` for a shape that does not
        fit."""
        config = self.config
        if pixel_values.ndim != 5 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)} but (B, {config.num_channels}, F, H, W) is needed; give "
                "clips as the image processor and an external autoencoder, if the model has one, make them."
            )
        config.check_shape(*pixel_values.shape[2:])
        time = config.frames_per_patch
        size = config.patch_size
        parts = (
            pixel_values.unflatten(4, (-1, size)).unflatten(3, (-1, size)).unflatten(2, (-1, time))
        )
        return (
            parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        )  # (B, moment, row, column, c, frame, y, x)

    def from_patches(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`(B, N, P)` of clips of this size -> `(B, c, F, H, W)`; raises `ValueError` if N does not
        fit."""
        config = self.config
        size = self.config.patch_size
        rows = height // size
        columns = width // size
        if patches.shape[1] % (rows * columns):
            raise ValueError(
                f"{patches.shape[1]} latents do not fill moments of {rows * columns} patches ({height} x {width}); give the "
                "`height` and `width` of the clip."
            )
        parts = patches.unflatten(2, (config.num_channels, config.frames_per_patch, size, size))
        parts = parts.unflatten(1, (-1, rows, columns)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return parts.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    # ---- clips <-> latents ----

    def _raw_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.to_patches(pixel_values)
        return (
            patches.float()
            if self.encoder is None
            else self.encoder(patches.to(self.dtype)).float()
        )

    def _standardize(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw - self.latent_mean) / self.latent_std

    def _unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.to(self.latent_std) * self.latent_std + self.latent_mean

    def encode(
        self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TokComCodecOutput:
        """Clips `(B, c, F, H, W)` of any size that patches divide -> standardised latents
        `(B, N, C)`, moment by moment, and `codes (B, N, R)` if there is a quantiser."""
        raw = self._raw_latents(pixel_values)
        codes = None
        if self.quantizer is not None:
            quantized = self.quantizer(raw, frozen=True)
            raw = quantized.latents
            codes = quantized.codes
        output = self.known(self._standardize(raw), codes=codes)
        where = self.grid(*self.size_of(pixel_values), device=raw.device)
        output.position_ids = where.expand(len(raw), -1, -1)
        return output

    def snap(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> their nearest quantised ones; the gradient passes
        straight through."""
        nearest = self._quantizer().nearest(self._unstandardize(latents)).latents
        return self._standardize(nearest).to(latents.dtype)

    def to_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> codes `(B, N, R)`; raises `ValueError` without a
        quantiser."""
        return self._quantizer().nearest(self._unstandardize(latents)).codes

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, R)` -> standardised latents `(B, N, C)`; raises `ValueError` without a
        quantiser."""
        return self._standardize(self._quantizer().decode(codes))

    def _quantizer(self) -> nn.Module:
        if self.quantizer is None:
            raise ValueError(
                "this codec has no quantiser, so its latents have no codes; train one with `quantizer`."
            )
        return self.quantizer

    def decode(
        self, latents: torch.Tensor, height: int | None = None, width: int | None = None
    ) -> TokComVideoOutput:
        """Standardised latents `(B, N, C)` -> `.pixel_values (B, c, F, H, W)`; H and W are the
        configured ones by default, F follows."""
        raw = self._unstandardize(latents)
        patches = raw if self.decoder is None else self.decoder(raw.to(self.dtype)).float()
        clip = self.from_patches(patches, height or self.config.height, width or self.config.width)
        pixels = self.config.spatial_compression == 1 and self.config.num_channels == 3
        return TokComVideoOutput(pixel_values=clip.clamp(-1, 1) if pixels else clip)

    def training_loss(self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None):
        """Loss of stage "codec" on clips `(B, c, F, H, W)`, and its parts; raises `ValueError` if
        there is nothing to train."""
        if self.encoder is None:
            raise ValueError(
                "this codec has no parameters, so there is nothing to train; use stage='flow'."
            )
        patches = self.to_patches(pixel_values).to(self.dtype)
        latents = self.encoder(patches)
        commitment = patches.new_zeros(())
        if self.quantizer is not None:
            quantized = self.quantizer(latents)
            latents = quantized.latents
            commitment = quantized.loss
        error = F.mse_loss(self.decoder(latents).float(), patches.float())
        return error + commitment, {"mse_loss": error.detach()}


__all__ = ["TokComVideoCodec", "TokComVideoOutput"]
