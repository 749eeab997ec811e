"""Images -> `pixel_values`, in the convention of transformers: `AutoImageProcessor.from_pretrained(...)(images)`.

Notable choices: transparent pictures are laid on white; a picture is cut at its sides before it is scaled, so that nothing is
stretched; values are -1 for black and 1 for white. Only PIL and NumPy are needed.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


class TokComImageProcessor(BaseImageProcessor):
    """Prepare pictures for a TokCom model of images.

    Args:
        image_size (`int` or `list[int]`): pixels of a side of what the model sees, or height and width.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int | list[int] = 64, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        if min(self._size) < 1:
            raise ValueError(f"`image_size` ({image_size}) must be at least 1 pixel.")

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """One picture or a list of them (PIL, or arrays `(H, W)`, `(H, W, 3)`, `(H, W, 4)` of uint8) -> `pixel_values
        (B, 3, height, width)`, float32 in [-1, 1]."""
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("`images` is an empty list; give at least one picture.")
        pixels = torch.stack([self._prepare(image) for image in images])
        return BatchFeature({"pixel_values": pixels.numpy()}, tensor_type=return_tensors)

    def _prepare(self, image: Any) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if (
                array.dtype != np.uint8
                or array.ndim not in (2, 3)
                or (array.ndim == 3 and array.shape[2] not in (3, 4))
            ):
                raise ValueError(
                    f"a picture must be a PIL image or an array (H, W, 3) of uint8, not {array.dtype} of shape {array.shape}."
                )
            image = Image.fromarray(array)
        image = ImageOps.exif_transpose(image)  # cameras store how they were held
        if min(image.size) < 1:
            raise ValueError(f"a picture of {image.width} x {image.height} pixels shows nothing; leave it out.")
        if image.mode.startswith("I;16"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"a picture of mode {image.mode!r} has no known range; convert it to 8 bits first.")
        if image.mode != "RGB":  # what is transparent becomes white
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image).convert("RGB")
        height, width = self._size
        scale = min(image.height / height, image.width / width)
        cut = max(1, round(height * scale)), max(1, round(width * scale))
        left, top = (image.width - cut[1]) // 2, (image.height - cut[0]) // 2
        image = image.crop((left, top, left + cut[1], top + cut[0]))
        if image.size != (width, height):
            resample = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
            image = image.resize((width, height), resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """`pixel_values (B, 3, H, W)` -> pictures."""
        pixels = ((pixel_values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


TokComImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["TokComImageProcessor"]
