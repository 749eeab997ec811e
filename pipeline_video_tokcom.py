"""What TokComPipeline does with clips: generate them from captions, from first frames or from nothing, encode them, and back.

Notable choices: frames that are given are clean latents before the ones to generate, as a prompt is for a text, so block-causal models
go on for any length with a key/value cache; an external autoencoder of diffusers, if the model was trained on its latents, is a
component of the pipeline.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .codec_chunk_tokcom import TokComCodecOutput
from .codec_video_tokcom import TokComVideoCodec


def _codes_time(autoencoder: nn.Module) -> bool:
    """Whether an autoencoder takes clips and not single pictures."""
    return any(isinstance(module, nn.Conv3d) for module in autoencoder.modules())


def _device_of(autoencoder: nn.Module) -> torch.device:
    """Where an autoencoder computes: with offloading not where its weights are."""
    hook = getattr(autoencoder, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or autoencoder.device)


@torch.no_grad()
def encode_clips(autoencoder: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Clips `(B, 3, F, H, W)` of pixels -> the latents `(B, c, F', h, w)` of an `AutoencoderKL*` or `AutoencoderTiny` of diffusers, the
    mode of its posterior; one of pictures codes every frame on its own."""
    pixel_values = pixel_values.to(_device_of(autoencoder), autoencoder.dtype)
    clips = _codes_time(autoencoder)
    output = autoencoder.encode(pixel_values if clips else pixel_values.transpose(1, 2).flatten(0, 1))
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
    latents = latents if clips else latents.unflatten(0, (len(pixel_values), -1)).transpose(1, 2)
    return latents.float()


@torch.no_grad()
def decode_clips(autoencoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The latents `(B, c, F', h, w)` that `encode_clips` gives -> clips `(B, 3, F, H, W)` in [-1, 1]."""
    latents = latents.to(_device_of(autoencoder), autoencoder.dtype)
    if _codes_time(autoencoder):
        return autoencoder.decode(latents).sample.float().clamp(-1, 1)
    frames = autoencoder.decode(latents.transpose(1, 2).flatten(0, 1)).sample
    return frames.unflatten(0, (len(latents), -1)).transpose(1, 2).float().clamp(-1, 1)


class TokComVideoMixin:
    """The methods of `TokComPipeline` for models of clips."""

    def _video_codec(self) -> TokComVideoCodec:
        codec = self._require_modality("video")
        if self.vae is None and (codec.config.num_channels, codec.config.spatial_compression) != (3, 1):
            raise ValueError(
                f"this model makes latents of {codec.config.num_channels} channels of an external autoencoder; build the pipeline "
                "with it as `vae`."
            )
        return codec

    @torch.no_grad()
    def generate_videos(
        self,
        prompt: str | Sequence[str] | None = None,
        frames: Any = None,
        num_frames: int | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
        on_step_end=None,
    ):
        """New clips for one or several captions, after first frames that are given, or from nothing.

        Args:
            prompt: a caption or a list of them, of which "" is none; for models that were trained with captions.
            frames: first frames: a list of pictures, a list of such lists, or `(B, 3, F, H, W)` in [-1, 1].
            num_frames: of the whole clip, those given included; by default that of training. Block-causal models go on for any
                length, over a window of what they saw in training.
            batch_size: clips, if neither captions nor frames say how many.
            num_inference_steps: denoising steps, of block-causal models per block; by default `config.num_inference_steps`.
            guidance_scale: 1 is off; above 1 strengthens caption and first frames at twice the cost.
            latents: initial noise of shape `(B, n, C)` of the latents to generate.
            output_type: `"pil"`, `"pt"` (values in [-1, 1]) or `"latent"`.
            height, width: pixels, if other than those of training and of the given frames; bidirectional models only.

        Returns `.videos`, a list of pictures for each clip or `(B, 3, F, H, W)`, and `.latents (B, N, C)`. Raises `ValueError` for
        arguments out of range.
        """
        codec, config = self._video_codec(), self.model.config.codec_config
        self.check_inputs(1, num_inference_steps, output_type, [])
        clip = None if frames is None else self._to_clips(frames, (height, width))
        size = clip.shape[-2:] if clip is not None else (height or config.image_size[0], width or config.image_size[1])
        batch_size = batch_size if clip is None else len(clip)
        batch_size, prefix = self._to_prefix(prompt, batch_size)
        if guidance_scale != 1.0 and prefix is None and clip is None:
            raise ValueError(
                f"`guidance_scale` ({guidance_scale}) needs captions or frames to move towards; leave it at 1."
            )
        if clip is not None and len(clip) != batch_size:
            raise ValueError(f"there are {batch_size} captions but {len(clip)} clips of first frames; give one each.")
        context, position_ids = self._lay_out(codec, clip, num_frames, size, batch_size)
        noise = self.prepare_latents(batch_size, position_ids.shape[1], generator, latents)
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "decode": False}
        result, _ = self._sample(
            noise, context, position_ids, generator=generator, prefix=prefix, on_step_end=on_step_end, **settings
        )
        if context is not None:
            result = torch.cat((context.latents.float(), result), dim=1)
        return self._show_clips(result, output_type, size, clip)

    def _lay_out(self, codec, clip, num_frames, size, batch_size) -> tuple[TokComCodecOutput | None, torch.Tensor]:
        """What is known of a clip, and the positions `(B, n, 3)` of what is not; raises `ValueError` if it does not fit."""
        config, transformer = codec.config, self.model.config.transformer_config
        num_frames = config.clip_length if num_frames is None else num_frames
        steps = config.temporal_compression
        if num_frames < 1 or (num_frames - 1) % steps:
            raise ValueError(f"`num_frames` ({num_frames}) must be 1 more than a multiple of {steps} frames.")
        height, width = (side // config.spatial_compression for side in size)
        position_ids = codec.grid((num_frames - 1) // steps + 1, height, width, device=self._execution_device)
        context = None
        if clip is not None:
            context = self.model.encode(pixel_values=self._to_codec(clip))
            known = context.latents.shape[1]
            if known >= len(position_ids):
                raise ValueError(
                    f"`frames` has {clip.shape[2]} frames already, so nothing is left to generate; raise `num_frames` "
                    f"({num_frames})."
                )
            position_ids = position_ids[known:]
        longest = transformer.max_position_embeddings
        total = len(position_ids) + (0 if context is None else context.latents.shape[1])
        if transformer.block_size is None and total > longest:
            raise ValueError(
                f"a clip of {num_frames} frames of {size[0]} x {size[1]} has {total} latents, more than the model's maximum of "
                f"{longest}; make it shorter or smaller, or train a block-causal model."
            )
        if transformer.block_size is not None and (height, width) != (config.height, config.width):
            raise ValueError(
                f"a block-causal model makes frames of the size it was trained with, {config.image_size}, not {list(size)}."
            )
        return context, position_ids.expand(batch_size, -1, -1)

    def _to_codec(self, clip: torch.Tensor) -> torch.Tensor:
        """What the codec reads of clips of pixels: themselves, or their latents in the external autoencoder."""
        return clip if self.vae is None else encode_clips(self.vae, clip).to(self._execution_device)

    def _to_clips(self, frames: Any, size: tuple[int | None, int | None] = (None, None)) -> torch.Tensor:
        """Clips `(B, 3, F, H, W)` of a tensor, of a list of pictures, or of a list of such lists of one length."""
        if isinstance(frames, torch.Tensor):
            clip = frames if frames.ndim == 5 else frames[None]
        else:
            several = bool(frames) and isinstance(frames[0], (list, tuple))
            clips = list(frames) if several else [list(frames)]
            if len({len(clip) for clip in clips}) != 1 or not clips[0]:
                lengths = sorted({len(clip) for clip in clips})
                raise ValueError(f"`frames` must be clips of one length above 0, not of {lengths} frames.")
            processor = self.image_processor
            if size != (None, None):
                own = processor.image_size
                processor = type(processor)([size[0] or own[0], size[1] or own[1]])
            clip = torch.stack([processor(pictures)["pixel_values"].transpose(0, 1) for pictures in clips])
        return clip.to(self._execution_device)

    @torch.no_grad()
    def encode_videos(self, videos: Any):
        """Clips, as `frames` of `generate_videos`, -> `.latents (B, N, C)`, and `.codes (B, N, R)` of a codec with a quantiser."""
        self._video_codec()
        clip = self._to_clips(videos)
        encoded = self.model.encode(pixel_values=self._to_codec(clip))
        self.maybe_free_model_hooks()
        return self.output_class(latents=encoded.latents, codes=encoded.codes)

    @torch.no_grad()
    def decode_videos(
        self, latents: torch.Tensor, output_type: str = "pil", height: int | None = None, width: int | None = None
    ):
        """Latents `(B, N, C)` or integer codes `(B, N, R)` -> `.videos` of `height` and `width` pixels, by default those of
        training."""
        config = self._video_codec().config
        self.check_inputs(1, None, output_type, [])
        latents = latents.to(self._execution_device)
        if not latents.is_floating_point():
            latents = self.model.from_codes(latents.long())
        if latents.ndim != 3 or latents.shape[2] != config.latent_channels:
            needed = f"(B, N, {config.latent_channels})"
            raise ValueError(f"`latents` has shape {tuple(latents.shape)} but {needed} is needed.")
        return self._show_clips(latents, output_type, (height or config.image_size[0], width or config.image_size[1]))

    def reconstruct_videos(self, videos: Any, output_type: str = "pil"):
        """Encode and decode: clips as the codec remembers them."""
        self._video_codec()
        clip = self._to_clips(videos)
        return self.decode_videos(self.encode_videos(clip).latents, output_type, *clip.shape[-2:])

    def _show_clips(self, latents: torch.Tensor, output_type: str, size: tuple[int, int], given=None):
        """Latents as clips of `size`, which begin with the frames `given (B, 3, F, H, W)` as they are."""
        videos = None
        if output_type != "latent":
            factor = self.model.config.codec_config.spatial_compression
            clip = self.model.decode(latents, height=size[0] // factor, width=size[1] // factor).pixel_values
            videos = clip if self.vae is None else decode_clips(self.vae, clip)
            if given is not None:
                videos[:, :, : given.shape[2]] = given
            if output_type == "pil":
                videos = [self.image_processor.postprocess(frames.transpose(0, 1)) for frames in videos]
        self.maybe_free_model_hooks()
        return self.output_class(videos=videos, latents=latents)


__all__ = ["TokComVideoMixin", "decode_clips", "encode_clips"]
