"""The tabs of `tokcom app` for models of pixels, pictures, clips and several streams.

A tab is made of the model's configuration; its weights are loaded when somebody first uses it.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import torch
from diffusers.utils import export_to_gif
from PIL import Image

from tokcom.cli.loading import check_model_path, open_pipeline
from tokcom.cli.stream_boxes import BOX_HEIGHT, StreamBox, enlarged, shown_large, stream_boxes
from tokcom.configuration_codec_tokcom import TokComCodecConfig, TokComColorCodecConfig
from tokcom.configuration_media_tokcom import (
    TokComCompositeCodecConfig,
    TokComStyleCodecConfig,
    TokComVideoCodecConfig,
)
from tokcom.configuration_tokcom import TokComConfig
from tokcom.training.report import several

BUSY = threading.Lock()  # one sample at a time on the whole page: the machine is small
LONGEST_ANSWER = 64  # tokens that a pixel model writes
FRAMES_PER_SECOND = 8  # of the .gif files
KEPT = 60.0  # seconds that these are kept
PREFIXES = (1, 2, 4, 8, 16, 32)  # tokens of a picture that are decoded, besides all
# what to ask the models that ship; others begin with an empty box
EXAMPLES = {
    "pixels": (
        "name[Cotto], eatType[coffee shop], food[Chinese], priceRange[moderate], "
        "area[riverside], familyFriendly[yes], near[The Portland Arms]"
    ),
    "emoji": "woman cook, medium skin tone",
    "clips": "red apple, rising",
    "digits": "the digit seven",
}


def numbered_noise(seed: float | None) -> torch.Generator:
    """Numbered noise; without a seed noise of its own."""
    generator = torch.Generator()
    if seed is None:
        # a random seed from the system
        generator.seed()
        return generator
    # torch takes no seed of more than 64 bits, and a visitor may type anything
    return generator.manual_seed(int(seed) % 2**63)


def explained(error: Exception) -> gr.Error:
    """An exception as a message for people."""
    return gr.Error(str(error), title="This cannot be done", print_exception=False)


class ShownModel:
    """A model of a tab: its name and configuration now, its pipeline from the first use on.

    Args:
        path (`str`): directory or Hub id; its last part names the tab.

    Raises `FileNotFoundError` or `ValueError` if nothing is there, or a model without a tab.
    """

    def __init__(self, path: str, device: str = "auto"):
        check_model_path(path, "--models")
        self.path = path
        self.device = device
        self.name = Path(path).name
        self.config = TokComConfig.from_pretrained(path)
        self.files = tempfile.TemporaryDirectory(prefix="tokcom-app-")  # gradio shows copies
        self._pipe = None
        codec = self.config.codec_config
        if type(codec) not in TABS:
            raise ValueError(f"{path} is a model of {codec.modality}: show it with --checkpoint.")

    @property
    def title(self) -> str:
        return self.name.replace("-", " ").capitalize()

    def stream_boxes(self) -> dict[str, StreamBox]:
        """The box of each stream of an omni model."""
        return stream_boxes(self.config.codec_config.stream_configs())

    def build_tab(self) -> None:
        """Add the widgets of the model to the page."""
        TABS[type(self.config.codec_config)](self)

    @property
    def is_loaded(self) -> bool:
        return self._pipe is not None

    @property
    def pipe(self):
        """The pipeline; loads it. Call it while `BUSY` is held."""
        if self._pipe is None:
            gr.Info(f"Loading the weights of {self.name}. The next answers come sooner.")
            self._pipe = open_pipeline(self.path, self.device, "--models")
            self._pipe.set_progress_bar_config(disable=True)
        return self._pipe

    def run(self, function: Callable):
        """What `function(pipe)` returns; raises `gr.Error` with a message for people."""
        try:
            # loading, too, happens within: two visitors must not load a model twice
            with BUSY, torch.no_grad():
                return function(self.pipe)
        except (ValueError, OSError) as error:
            raise explained(error) from error


# ---- what tabs do ----


def write_pixels(shown: ShownModel, prompt: str, seed: float) -> tuple[str, Image.Image]:
    """A continuation of `prompt`, and the picture whose pixels are its tokens."""

    def work(pipe) -> tuple[str, Image.Image]:
        output = pipe(prompt, gen_length=LONGEST_ANSWER, generator=numbered_noise(seed))
        text = output.texts[0].strip()
        return text, enlarged(pipe.text_to_image(text), 16)

    return shown.run(work)


def draw_text(shown: ShownModel, text: str) -> tuple[Image.Image, str]:
    """A text as a picture, and what is read in that picture."""

    def work(pipe) -> tuple[Image.Image, str]:
        picture = pipe.text_to_image(text)
        return enlarged(picture, 8), pipe.image_to_text(picture)

    return shown.run(work)


def _options(caption: str, steps: int, guidance: float, seed: float) -> dict:
    """What a pipeline of pictures or clips is asked with; without a caption nothing guides it."""
    prompt = caption.strip() or None
    return {
        "prompt": prompt,
        "num_inference_steps": int(steps),
        "guidance_scale": guidance if prompt else 1.0,
        "generator": numbered_noise(seed),
    }


def draw(
    shown: ShownModel, caption: str, steps: int, guidance: float, seed: float
) -> list[tuple[Image.Image, str]]:
    """Pictures for a caption: of all tokens, and of the first ones only."""

    def work(pipe) -> list[tuple[Image.Image, str]]:
        options = _options(caption, steps, guidance, seed)
        return _prefixes(pipe, pipe(**options, output_type="latent").latents)

    return shown.run(work)


def rebuild(shown: ShownModel, picture: Image.Image | None) -> list[tuple[Image.Image, str]]:
    """A picture as all of its tokens, and the first of them, remember it."""
    if picture is None:
        raise explained(ValueError("there is no picture; give one first."))
    return shown.run(lambda pipe: _prefixes(pipe, pipe.encode(picture).latents))


def _prefixes(pipe, latents: torch.Tensor) -> list[tuple[Image.Image, str]]:
    count = pipe.model.config.codec_config.num_tokens
    # all tokens first, then fewer and fewer
    kept = [count, *(k for k in reversed(PREFIXES) if k < count)]
    pictures = [pipe.decode(latents, num_tokens=k).images[0] for k in kept]
    return [(shown_large(picture), several(k, "token")) for picture, k in zip(pictures, kept)]


def animate(shown: ShownModel, caption: str, steps: int, guidance: float, seed: float) -> str:
    """A clip for a caption, as the name of a .gif file."""

    def work(pipe) -> str:
        clip = pipe(**_options(caption, steps, guidance, seed)).videos[0]
        # the page shows copies, and must not fill the disk
        for file in Path(shown.files.name).glob("*.gif"):
            if time.time() - file.stat().st_mtime > KEPT:
                file.unlink(missing_ok=True)
        # a name of its own for every visitor
        descriptor, name = tempfile.mkstemp(".gif", dir=shown.files.name)
        # the exporter opens the file by its name
        os.close(descriptor)
        return export_to_gif([shown_large(frame) for frame in clip], name, FRAMES_PER_SECOND)

    return shown.run(work)


def complete(shown: ShownModel, steps: int, guidance: float, seed: float, *values) -> list:
    """The streams that are not given, for those that are; the given ones come back as they are."""
    boxes = shown.stream_boxes()
    read = {name: box.read(value) for (name, box), value in zip(boxes.items(), values, strict=True)}
    given = {name: value for name, value in read.items() if value is not None}

    def work(pipe) -> list:
        output = pipe(
            given,
            num_inference_steps=int(steps),
            # also from nothing, since later streams are made for earlier ones
            guidance_scale=guidance,
            generator=numbered_noise(seed),
        )
        made = dict(zip(boxes, values))
        for name, box in boxes.items():
            if name not in given:
                made[name] = box.shown(output.streams[name][0])
        return list(made.values())

    return shown.run(work)


# ---- the tabs ----


def pixel_tab(shown: ShownModel) -> None:
    gr.Markdown("This model writes texts as pictures: every token is one pixel.")
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(
                EXAMPLES.get(shown.name, ""), label="Prompt", lines=3, max_length=2000
            )
            seed = gr.Number(0, label="Seed", precision=0)
            write = gr.Button("Write", variant="primary")
        with gr.Column(scale=3):
            written = gr.Textbox(label="Text, written as pixels", lines=2, interactive=False)
            pixels = gr.Image(label="One pixel per token", format="png", height=BOX_HEIGHT)
    write.click(
        lambda *values: write_pixels(shown, *values),
        [prompt, seed],
        [written, pixels],
        # several tabs of the page have the same functions, so names begin with the model's
        api_name=f"{shown.name}_write",
    )
    gr.Markdown("A text of your own as a picture, and the text that is read in it:")
    with gr.Row():
        with gr.Column(scale=2):
            text = gr.Textbox(
                "Once upon a time there was a rabbit.", label="Text", lines=3, max_length=2000
            )
            draw = gr.Button("Draw")
        with gr.Column(scale=3):
            picture = gr.Image(label="One pixel per token", format="png", height=BOX_HEIGHT)
            back = gr.Textbox(label="Read back from the picture", interactive=False)
    draw.click(
        lambda value: draw_text(shown, value),
        text,
        [picture, back],
        api_name=f"{shown.name}_draw",
    )


def _caption_and_noise(shown: ShownModel) -> list:
    """What pictures and clips are asked with: a caption, steps, guidance and a seed."""
    captioned = shown.config.condition_vocab_size > 0
    example = EXAMPLES.get(shown.name, "") if captioned else ""
    caption = gr.Textbox(example, label="Caption", interactive=captioned, max_length=400)
    return [caption, *_noise(shown, captioned)]


def _noise(shown: ShownModel, has_guidance: bool) -> list:
    with gr.Row():
        own = shown.config.num_inference_steps
        steps = gr.Slider(1, 100, own, step=1, label="Denoising steps")
        scale = shown.config.sampling_guidance_scale if has_guidance else 1
        guidance = gr.Slider(1, 6, scale, label="Guidance (1 is off)", interactive=has_guidance)
        seed = gr.Number(0, label="Seed", precision=0)
    return [steps, guidance, seed]


def image_tab(shown: ShownModel) -> None:
    gr.Markdown(
        "The tokens of a picture go from coarse to fine. Shown are the pictures of all tokens and "
        "of the first ones only."
    )
    inputs = _caption_and_noise(shown)
    button = gr.Button("Draw", variant="primary")
    drawn = gr.Gallery(show_label=False, columns=7, height=BOX_HEIGHT)
    button.click(lambda *values: draw(shown, *values), inputs, drawn, api_name=f"{shown.name}_draw")
    gr.Markdown("A picture of your own, turned into tokens and back:")
    with gr.Row():
        with gr.Column(scale=2):
            # as it is: gradio would make transparent pixels black, and training white
            picture = gr.Image(label="Picture", type="pil", image_mode=None, height=BOX_HEIGHT)
            button = gr.Button("Encode and decode")
        with gr.Column(scale=3):
            rebuilt = gr.Gallery(show_label=False, columns=7, height=BOX_HEIGHT)
    button.click(
        lambda value: rebuild(shown, value), picture, rebuilt, api_name=f"{shown.name}_rebuild"
    )


def video_tab(shown: ShownModel) -> None:
    gr.Markdown("A short clip for a caption.")
    inputs = _caption_and_noise(shown)
    button = gr.Button("Animate", variant="primary")
    clip = gr.Image(label="Clip", type="filepath", format="gif", height=BOX_HEIGHT)
    button.click(
        lambda *values: animate(shown, *values), inputs, clip, api_name=f"{shown.name}_animate"
    )


def stream_tab(shown: ShownModel) -> None:
    gr.Markdown("Give any of the streams; the others are made for them, or all from nothing.")
    boxes = shown.stream_boxes()
    widgets = {}
    for name in sorted(boxes, key=lambda name: not boxes[name].comes_first):
        with gr.Row(equal_height=True):
            given = boxes[name].widget(f"{name.capitalize()}, given", is_input=True)
            made = boxes[name].widget(f"{name.capitalize()}, made", is_input=False)
        boxes[name].begin_with(given, EXAMPLES.get(shown.name, ""))
        widgets[name] = (given, made)
    settings = _noise(shown, True)
    gr.Button("Make the others", variant="primary").click(
        lambda *values: complete(shown, *values),
        [*settings, *(widgets[name][0] for name in boxes)],
        [widgets[name][1] for name in boxes],
        api_name=f"{shown.name}_make",
    )


# the configuration of a model's codec -> what builds the model's tab
TABS: dict[type[TokComCodecConfig], Callable[[ShownModel], None]] = {
    TokComColorCodecConfig: pixel_tab,
    TokComStyleCodecConfig: image_tab,
    TokComVideoCodecConfig: video_tab,
    TokComCompositeCodecConfig: stream_tab,
}
