"""Video codec: a clip <-> one latent per space-time patch.

Notable choices:
- Positions have three axes: time, row and column. They are computed from the size of the clip, so
  one model reads clips of any size.
- Without a network the values of a patch are its latent, and nothing is lost. With a network, a
  quantiser may sit in the middle.
- Clips are pixels, or latents of an external autoencoder. Only the number of channels differs.

Shape legend: B batch, N latents, C latent channels, c channels of the clip, F frames, H x W pixels,
P values in a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .codec_chunk_tokcom import TokComCodec, TokComCodecOutput, TokComResidualMLP
from .configuration_media_tokcom import TokComVideoCodecConfig
from .layers_tokcom import TokComRMSNorm
from .processing_tokcom import TokComImageProcessor, as_clips, pixels_of_tensor
from .quantization_tokcom import build_quantizer


@dataclass
class TokComVideoOutput(ModelOutput):
    """What the video codec's `decode` returns: `pixel_values (B, c, F, H, W)`.

    Pixels are -1 for black and 1 for white.
    """

    pixel_values: torch.FloatTensor | None = None


class TokComPatchNetwork(nn.Sequential):
    """Residual MLP over single patches, `(..., inputs)` -> `(..., outputs)`."""

    def __init__(self, config: TokComVideoCodecConfig, inputs: int, outputs: int):
        width = config.hidden_size
        layers = [TokComResidualMLP(config) for _ in range(config.num_hidden_layers)]
        norm = TokComRMSNorm(width, config.rms_norm_eps)
        super().__init__(nn.Linear(inputs, width), *layers, norm, nn.Linear(width, outputs))


class TokComVideoCodec(TokComCodec):
    """Space-time patches as latents.

    Latents are standardised per channel with the buffers `latent_mean` and `latent_std`.
    """

    config: TokComVideoCodecConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TokComVideoCodecConfig):
        super().__init__(config)
        channels = config.latent_channels
        values = config.patch_values
        # without a network the values of a patch are its latent, and nothing is lost
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
        # one for all places, since clips of other sizes have other places
        self.latent_mean = nn.Buffer(torch.zeros(channels))
        self.latent_std = nn.Buffer(torch.ones(channels))
        self.set_loss()
        self.gradient_checkpointing = False
        self.post_init()

    def initialize_parameters(self) -> None:
        init.zeros_(self.latent_mean)
        init.ones_(self.latent_std)

    def get_input_embeddings(self):
        return None

    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Store mean and standard deviation of raw latents, `(C,)`, or `(N, C)` to be pooled over
        N."""
        if mean.ndim == 2:  # law of total variance
            std = (std.square().mean(0) + mean.var(0, correction=0)).sqrt()
            mean = mean.mean(0)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp_min(1e-2))  # do not amplify values that hardly vary

    def as_stream(self, inputs: torch.Tensor, num_latents: int) -> torch.Tensor:
        return inputs[:, :, None] if inputs.ndim == 4 else inputs  # a picture is one frame

    # ---- where latents stand ----

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Index of latents `(...)` -> moment, row and column, `(..., 3)`, for clips of the
        configured height and width."""
        columns = self.config.width // self.config.patch_size
        moment = index // self.config.group_size  # a group is all patches of one moment
        place = index % self.config.group_size  # of the patch in its moment, row by row
        return torch.stack((moment, place // columns, place % columns), dim=-1)

    def grid(
        self, frames: int, height: int, width: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Positions `(N, 3)` of the latents of a clip of this size.

        Raises `ValueError` if patches do not divide the clip.
        """
        self.config.check_shape(frames, height, width)
        size = self.config.patch_size
        axes = frames // self.config.frames_per_patch, height // size, width // size
        # time changes slowest, so latents are in the order of moments
        return torch.cartesian_prod(*(torch.arange(n, device=device) for n in axes)).view(-1, 3)

    @staticmethod
    def size_of(pixel_values: torch.Tensor) -> tuple[int, int, int]:
        """Frames, height and width of the input of `encode`."""
        return tuple(pixel_values.shape[2:])

    # ---- clips <-> patches ----

    def to_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Clips `(B, c, F, H, W)` -> `(B, N, P)`. Raises `ValueError` for a wrong shape."""
        config = self.config
        if pixel_values.ndim != 5 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)} but (B, "
                f"{config.num_channels}, F, H, W) is needed; pass clips through the image "
                "processor, and through the external autoencoder if the model has one."
            )
        config.check_shape(*pixel_values.shape[2:])
        time = config.frames_per_patch
        size = config.patch_size
        parts = pixel_values.unflatten(4, (-1, size)).unflatten(3, (-1, size))
        parts = parts.unflatten(2, (-1, time))  # (B, c, moment, frame, row, y, column, x)
        parts = parts.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, moment, row, column, c, frame, y, x)
        return parts.flatten(4).flatten(1, 3)  # (B, N, P)

    def from_patches(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Patches `(B, N, P)` -> clips `(B, c, F, H, W)` of this height and width.

        Raises `ValueError` if N patches do not fill whole moments, and for sides that are no
        multiple of a patch's.
        """
        config = self.config
        size = self.config.patch_size
        if height % size or width % size:
            raise ValueError(
                f"a clip of {height} x {width} does not consist of patches of {size} x {size}; "
                f"give a `height` and `width` that are multiples of {size}."
            )
        rows = height // size
        columns = width // size
        if patches.shape[1] % (rows * columns):
            raise ValueError(
                f"{patches.shape[1]} latents do not fill moments of {rows * columns} patches "
                f"({height} x {width}); give the `height` and `width` of the clip."
            )
        parts = patches.unflatten(2, (config.num_channels, config.frames_per_patch, size, size))
        # (B, c, moment, frame, row, y, column, x)
        parts = parts.unflatten(1, (-1, rows, columns)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return parts.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (B, c, F, H, W)

    # ---- clips <-> latents ----

    def _raw_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Clips -> latents `(B, N, C)` in float32, before standardisation."""
        patches = self.to_patches(pixel_values)
        if self.encoder is not None:
            patches = self.encoder(patches.to(self.dtype))
        return patches.float()

    def _standardize(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw - self.latent_mean) / self.latent_std

    def _unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.to(self.latent_std) * self.latent_std + self.latent_mean

    def encode(
        self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TokComCodecOutput:
        """Clips `(B, c, F, H, W)` -> standardised latents `(B, N, C)`, moment by moment.

        Clips may have any size that patches divide. With a quantiser the output also has
        `codes (B, N, R)`.
        """
        raw = self._raw_latents(pixel_values)  # (B, N, C)
        codes = None
        if self.quantizer is not None:
            quantized = self.quantizer(raw, frozen=True)
            raw = quantized.latents
            codes = quantized.codes
        output = self.known(self._standardize(raw), codes=codes)
        # not those of `known`, which assumes the configured size
        frames, height, width = self.size_of(pixel_values)
        where = self.grid(frames, height, width, device=raw.device)
        output.position_ids = where.expand(len(raw), -1, -1)
        output.group_size = (height // self.config.patch_size) * (width // self.config.patch_size)
        return output

    def snap(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> the nearest quantised ones, straight-through."""
        # codebooks hold raw latents
        nearest = self._quantizer().nearest(self._unstandardize(latents)).latents
        return self._standardize(nearest).to(latents.dtype)

    def to_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents `(B, N, C)` -> codes `(B, N, R)`.

        Raises `ValueError` without a quantiser.
        """
        return self._quantizer().nearest(self._unstandardize(latents)).codes

    def from_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, N, R)` -> standardised latents `(B, N, C)`.

        Raises `ValueError` without a quantiser.
        """
        return self._standardize(self._quantizer().decode(codes))

    def _quantizer(self) -> nn.Module:
        if self.quantizer is None:
            raise ValueError(
                "this codec has no quantiser, so its latents have no codes; train one with "
                "`quantizer=vq` or `fsq`."
            )
        return self.quantizer

    def decode(
        self, latents: torch.Tensor, height: int | None = None, width: int | None = None
    ) -> TokComVideoOutput:
        """Standardised latents `(B, N, C)` -> `.pixel_values (B, c, F, H, W)`.

        H and W are those of the configuration by default; F follows from N.
        """
        patches = self._unstandardize(latents)  # (B, N, C), or P values without a network
        if self.decoder is not None:
            patches = self.decoder(patches.to(self.dtype)).float()
        clip = self.from_patches(patches, height or self.config.height, width or self.config.width)
        if self.config.spatial_compression == 1 and self.config.num_channels == 3:
            clip = clip.clamp(-1, 1)  # pixels; latents of an external autoencoder have no range
        return TokComVideoOutput(pixel_values=clip)

    def training_loss(self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None):
        """Loss of the codec stage on clips `(B, c, F, H, W)`, and its parts.

        Raises `ValueError` if the codec has no parameters.
        """
        if self.encoder is None:
            raise ValueError(
                "this codec has no parameters, so there is nothing to train; use stage='flow'."
            )
        patches = self.to_patches(pixel_values).to(self.dtype)
        latents = self.encoder(patches)  # (B, N, C)
        commitment = patches.new_zeros(())  # without a quantiser there is nothing to commit to
        if self.quantizer is not None:
            quantized = self.quantizer(latents)
            latents = quantized.latents
            commitment = quantized.loss
        # on patches: every value belongs to exactly one, so it is the error of the clip
        error = F.mse_loss(self.decoder(latents).float(), patches.float())
        return error + commitment, {"mse_loss": error.detach()}


# ---- clips that people hold ----


def read_clips(
    videos: Any,
    image_size: Sequence[int],
    name: str,
    height: int | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """Clips, as `as_clips` takes them, as `(B, 3, F, H, W)`: all of one length and size, or a
    `ValueError` with their `name`.

    Pictures are brought to `height` and `width`, by default `image_size`; tensors keep their size
    if there is no other wish.
    """
    clips = as_clips(videos, name)
    lengths = set()
    for clip in clips:  # a tensor (3, F, H, W), or a list of F pictures
        lengths.add(clip.shape[1] if isinstance(clip, torch.Tensor) else len(clip))
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"`{name}` must be clips of one length above 0, not of {sorted(lengths)} frames."
        )
    processor = TokComImageProcessor([height or image_size[0], width or image_size[1]])
    pixels = []
    for clip in clips:
        if isinstance(clip, torch.Tensor):
            clip = pixels_of_tensor(clip)
            if tuple(clip.shape[-2:]) == (height or clip.shape[-2], width or clip.shape[-1]):
                pixels.append(clip)
                continue
            clip = list(clip.transpose(0, 1))  # frames (3, H, W), to be scaled like pictures
        pixels.append(processor(clip)["pixel_values"].transpose(0, 1))  # (3, F, H, W)
    sizes = sorted({tuple(clip.shape[-2:]) for clip in pixels})
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must be clips of one size, not of {sizes}; scale them first.")
    return torch.stack(pixels)  # (B, 3, F, H, W)


# ---- external autoencoders ----


def _codes_time(autoencoder: nn.Module) -> bool:
    """Whether an autoencoder takes clips, not single pictures."""
    return any(isinstance(module, nn.Conv3d) for module in autoencoder.modules())


def _device_of(autoencoder: nn.Module) -> torch.device:
    """Where an autoencoder computes: with offloading that is not where its weights are."""
    hook = getattr(autoencoder, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or autoencoder.device)


@torch.no_grad()
def encode_clips(autoencoder: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Clips of pixels `(B, 3, F, H, W)` -> latents `(B, c, F', h, w)`, the mode of the posterior.

    The autoencoder is an `AutoencoderKL*` or `AutoencoderTiny` of diffusers; one of pictures codes
    every frame on its own.
    """
    pixel_values = pixel_values.to(_device_of(autoencoder), autoencoder.dtype)
    takes_clips = _codes_time(autoencoder)
    inputs = pixel_values if takes_clips else pixel_values.transpose(1, 2).flatten(0, 1)
    output = autoencoder.encode(inputs)
    # the mode, not a sample: the flow adds its own noise
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
    if not takes_clips:
        latents = latents.unflatten(0, (len(pixel_values), -1)).transpose(1, 2)  # (B, c, F, h, w)
    return latents.float()


@torch.no_grad()
def decode_clips(autoencoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The latents `(B, c, F', h, w)` that `encode_clips` gives -> clips `(B, 3, F, H, W)` in [-1,
    1]."""
    latents = latents.to(_device_of(autoencoder), autoencoder.dtype)
    if _codes_time(autoencoder):
        return autoencoder.decode(latents).sample.float().clamp(-1, 1)
    frames = autoencoder.decode(latents.transpose(1, 2).flatten(0, 1)).sample  # (B F, 3, H, W)
    return frames.unflatten(0, (len(latents), -1)).transpose(1, 2).float().clamp(-1, 1)


__all__ = ["TokComVideoCodec", "TokComVideoOutput", "decode_clips", "encode_clips", "read_clips"]
