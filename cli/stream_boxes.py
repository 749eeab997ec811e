"""The widgets of `tokcom app` for the streams of an omni model, one class for each kind of content.

A new kind of content is a new class here, and an entry of `STREAM_BOXES`.
"""

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from tokcom.configuration_codec_tokcom import TokComCodecConfig

SHOWN_SIZE = 192  # pixels that pictures and clips are enlarged to
BOX_HEIGHT = 224  # of a box for one picture, in pixels of the screen


def enlarged(picture: Image.Image, scale: int) -> Image.Image:
    """A picture whose pixels can be seen one by one."""
    # interpolation would blur pictures of a few dozen pixels beyond recognition
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def shown_large(picture: Image.Image) -> Image.Image:
    """A small picture, enlarged by a whole number to about `SHOWN_SIZE`."""
    return enlarged(picture, max(1, SHOWN_SIZE // picture.width))


def as_samples(sound: np.ndarray) -> np.ndarray:
    """What gradio recorded, `(n,)` or `(n, channels)` of any integers, as floats in [-1, 1]."""
    if np.issubdtype(sound.dtype, np.integer):
        return sound.astype(np.float32) / np.iinfo(sound.dtype).max
    return sound.astype(np.float32)


class StreamBox:
    """How the page asks for one stream of a model, and how it shows it.

    Args:
        config: of the stream's codec.
    """

    kind: str  # of the codec's configuration
    comes_first = False  # on the page

    def __init__(self, config: TokComCodecConfig):
        self.config = config

    def widget(self, label: str, is_input: bool) -> gr.components.Component:
        """The box of the page, to fill in or to look at."""
        raise NotImplementedError

    def begin_with(self, widget: gr.components.Component, caption: str) -> None:
        """Fill an empty box with an example, if it can hold a caption."""

    def read(self, value: Any) -> Any | None:
        """A filled-in value as the pipeline reads it; None if nothing was given."""
        return value

    def shown(self, entry: Any) -> Any:
        """What the pipeline made, as the widget shows it."""
        return entry


class TextBox(StreamBox):
    kind = "text"
    comes_first = True  # a caption is the quickest to give

    def widget(self, label: str, is_input: bool) -> gr.Textbox:
        return gr.Textbox(label=label, interactive=is_input, max_length=400)

    def begin_with(self, widget: gr.Textbox, caption: str) -> None:
        widget.value = caption

    def read(self, value: str | None) -> str | None:
        # gradio sends an empty box as "", and an empty text would condition the other streams
        return value if value and value.strip() else None


class PictureBox(StreamBox):
    kind = "image"

    def widget(self, label: str, is_input: bool) -> gr.Image:
        # as it is: gradio would make transparent pixels black, and training white
        return gr.Image(
            label=label, type="pil", image_mode=None, interactive=is_input, height=BOX_HEIGHT
        )

    def shown(self, entry: Image.Image) -> Image.Image:
        return shown_large(entry)


class SoundBox(StreamBox):
    kind = "audio"

    def widget(self, label: str, is_input: bool) -> gr.Audio:
        return gr.Audio(label=label, interactive=is_input)

    def read(self, value: tuple[int, np.ndarray] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        rate, samples = value
        return {"array": as_samples(samples), "sampling_rate": rate}

    def shown(self, entry: np.ndarray) -> tuple[int, np.ndarray]:
        return self.config.sampling_rate, entry


STREAM_BOXES: dict[str, type[StreamBox]] = {
    box.kind: box for box in (TextBox, PictureBox, SoundBox)
}


def stream_boxes(streams: dict[str, TokComCodecConfig]) -> dict[str, StreamBox]:
    """The box of each stream; raises `ValueError` for a stream that the page cannot show."""
    # while the page is built, not when somebody has filled in the first boxes
    boxes = {}
    for name, config in streams.items():
        box = STREAM_BOXES.get(config.kind)
        if box is None:
            raise ValueError(
                f"stream {name!r} holds {config.kind!r}, which has no place on the page; leave "
                "its model out."
            )
        boxes[name] = box(config)
    return boxes
