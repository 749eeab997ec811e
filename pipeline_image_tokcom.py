"""What TokComPipeline does with pictures: generate them for captions, encode them as ordered tokens or codes, and back.

Notable choices: the sampler is that of texts; a caption takes the place of a prompt; guidance moves away from what the
network predicts without it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from .codec_style_tokcom import TokComStyleCodec
from .processing_tokcom import TokComImageProcessor

IMAGE_OUTPUTS = ("pil", "pt", "latent")


class TokComImageMixin:
    """The methods of `TokComPipeline` for models of images."""

    @property
    def image_processor(self) -> TokComImageProcessor | None:
        """Pictures, or frames, <-> `pixel_values`; None for models of text or of several streams."""
        config = self.model.config.codec_config
        return TokComImageProcessor(config.image_size) if config.modality in ("image", "video") else None

    def _require_modality(self, modality: str):
        """The codec; raises `ValueError` if it is of something else."""
        config = self.model.config.codec_config
        if config.modality != modality:
            found = {"text": "writes text: call pipe(prompt)", "image": "makes pictures: call generate_images"}
            found |= {
                "video": "makes clips: call generate_videos",
                "several": "has several streams: call generate_streams",
            }
            raise ValueError(f"this model (codec {config.model_type!r}) {found[config.modality]}.")
        return self.model.codec

    def _style_codec(self) -> TokComStyleCodec:
        return self._require_modality("image")

    def _to_prefix(self, prompt: str | Sequence[str] | None, batch_size: int):
        """How many samples captions ask for, by default `batch_size`, and what the transformer reads of them."""
        if prompt is None:
            return batch_size, None
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        if not captions:
            raise ValueError("`prompt` is an empty list; give at least one caption.")
        rows = [[] if caption == "" else self._tokenize([caption], "prompt")[0] for caption in captions]
        return len(rows), self.model.condition(*self._pad(rows, "right"))

    @torch.no_grad()
    def generate_images(
        self,
        prompt: str | Sequence[str] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        on_step_end=None,
    ):
        """New pictures for one or several captions, or without captions `batch_size` of them.

        Args:
            prompt: a caption or a list of them, of which "" is none; for models that were trained with captions.
            num_inference_steps: denoising steps; by default `config.num_inference_steps`.
            guidance_scale: 1 is off; above 1 strengthens the caption at twice the cost.
            generator: `torch.Generator` or one per picture, for reproducible samples.
            latents: initial noise of shape `(B, N, C)`.
            output_type: `"pil"`, `"pt"` (values in [-1, 1]) or `"latent"`.

        Returns `.images` and `.latents (B, N, C)`. Raises `ValueError` for arguments out of range.
        """
        codec = self._style_codec()
        self.check_inputs(1, num_inference_steps, output_type, [])
        batch_size, prefix = self._to_prefix(prompt, batch_size)
        if prefix is None and guidance_scale != 1.0:
            raise ValueError(f"`guidance_scale` ({guidance_scale}) needs a `prompt` to move towards; leave it at 1.")
        noise = self.prepare_latents(batch_size, codec.config.num_tokens, generator, latents)
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        result, _ = self._sample(
            noise, generator=generator, decode=False, prefix=prefix, on_step_end=on_step_end, **settings
        )
        return self._show(result, output_type)

    @torch.no_grad()
    def encode_images(self, images: Any):
        """Pictures -> `.latents (B, N, C)`, and `.codes (B, N, 1)` of a codec with a codebook."""
        self._style_codec()
        pixel_values = self.image_processor(images)["pixel_values"].to(self._execution_device)
        encoded = self.model.encode(pixel_values=pixel_values)
        self.maybe_free_model_hooks()
        return self.output_class(latents=encoded.latents, codes=encoded.codes)

    @torch.no_grad()
    def decode_images(self, latents: torch.Tensor, num_tokens: int | None = None, output_type: str = "pil"):
        """Latents `(B, N, C)` or integer codes `(B, N, 1)` -> `.images`, of the first `num_tokens` only if given."""
        config = self._style_codec().config
        self.check_inputs(1, None, output_type, [])
        latents = latents.to(self._execution_device)
        if not latents.is_floating_point():
            latents = self.model.from_codes(latents.long())
        if latents.shape[1:] != (config.num_tokens, config.latent_channels):
            needed = f"(B, {config.num_tokens}, {config.latent_channels})"
            raise ValueError(f"`latents` has shape {tuple(latents.shape)} but {needed} is needed.")
        return self._show(latents, output_type, num_tokens)

    def reconstruct_images(self, images: Any, num_tokens: int | None = None, output_type: str = "pil"):
        """Encode and decode: pictures as the first `num_tokens` of their tokens, by default all, remember them."""
        return self.decode_images(self.encode_images(images).latents, num_tokens, output_type)

    def _show(self, latents: torch.Tensor, output_type: str, num_tokens: int | None = None):
        images: list[Image.Image] | torch.Tensor | None = None
        if output_type != "latent":
            images = self.model.decode(latents, num_tokens=num_tokens).pixel_values
            images = self.image_processor.postprocess(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return self.output_class(images=images, latents=latents)


__all__ = ["TokComImageMixin", "IMAGE_OUTPUTS"]
