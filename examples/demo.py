"""What `make demo` runs: all five systems, each with the small model that ships for it.

    python examples/demo.py
    python examples/demo.py --only emoji clips

The model at the root writes text; those in `zoo/` write a sentence as pixels, draw an emoji, move
one, and hear, draw and speak a digit. Everything is in this directory, so it needs no network. What
is made lies in `outputs/demo/`; open its `index.html`. It is also the shortest tour of the Python
interface.
"""

import argparse
import html
import importlib.util
import shutil
import sys
import time
from pathlib import Path

# before the heavy imports, so that the remedy comes at once
if importlib.util.find_spec("tokcom") is None:
    remedy = "run `make setup`, then `.venv/bin/python examples/demo.py`"
    sys.exit(f"error: the package tokcom is not installed; {remedy}.")

import numpy as np
import torch
from diffusers.utils import export_to_gif
from PIL import Image

from tokcom import (
    TokComImagePipeline,
    TokComOmniPipeline,
    TokComPipeline,
    TokComVideoPipeline,
)
from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.processing_tokcom import write_wav
from tokcom.training.images import picture_grid

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Lily had a little dog named Max. One day,"
TEXT = "Once upon a time there was a little rabbit who lived in a big wood."
GAPPED = "Lily was sad because she lost her ____. Her mom helped her find it."
MEANING = (
    "name[Cotto], eatType[coffee shop], food[Chinese], priceRange[moderate], area[riverside], "
    "familyFriendly[yes], near[The Portland Arms]"
)
EMOJI = (
    "woman cook, medium skin tone",
    "grinning face",
    "blue heart",
    "man running, dark skin tone",
)
PREFIXES = (1, 4, 9, 36)  # tokens of a picture that are decoded
CLIPS = ("red apple, rising", "sailboat, sliding to the right", "dog face, turning")
DIGIT = "the digit seven"
RECORDING = ROOT / "sample_data" / "seven.flac"  # which no shipped model has learnt
STYLE = (
    "body {font-family: system-ui, sans-serif; max-width: 52rem; margin: 2rem auto}"
    "img {image-rendering: pixelated; margin: .3rem; vertical-align: middle}"
    "pre {white-space: pre-wrap}"
)


def seed(number: int) -> torch.Generator:
    """Noise of its own for every sample, the same in every run."""
    return torch.Generator().manual_seed(number)


class Page:
    """`index.html` and the files that it shows, made on `device`; what it is told is printed."""

    def __init__(self, directory: Path, device: str):
        self.directory = directory
        self.device = device
        self.parts: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)

    def title(self, text: str) -> None:
        print(f"\n{text}")
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def say(self, text: str) -> None:
        print(f"  {text}")
        # escaped, since a model may write what a browser takes for markup
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def show(self, name: str, what: str, scale: int = 1) -> None:
        """A picture, clip or sound that lies in the directory, `scale` times as large."""
        print(f"  {what}: {self.directory / name}")
        if name.endswith((".wav", ".flac")):
            tag = f'<audio controls src="{name}"></audio>'
        else:
            width = Image.open(self.directory / name).width * scale
            tag = f'<img src="{name}" width="{width}" alt="{html.escape(what)}">'
        self.parts.append(f"<p>{tag} {html.escape(what)}</p>")

    def write(self) -> Path:
        file = self.directory / "index.html"
        head = f'<!doctype html><meta charset="utf-8"><title>TokCom</title><style>{STYLE}</style>'
        file.write_text("\n".join([head, "<h1>TokCom</h1>", *self.parts]), encoding="utf-8")
        return file


def show_text(directory: Path, page: Page) -> None:
    """Continue, stream, fill a gap, mend a noisy text, and go through latents and back."""
    # or the id of a repository
    pipe = TokComPipeline.from_pretrained(directory).to(page.device)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    size = sum(parameter.numel() for parameter in pipe.model.parameters()) / 1e6
    page.title(f"Text: {size:.1f} M parameters, {pipe.chunk_size} tokens in each latent")

    page.say("Two prompts at once:")
    prompts = [PROMPT, "The king said to the"]
    output = pipe(prompts, gen_length=40, temperature=0.7, generator=seed(0))
    for prompt, text in zip(prompts, output.texts):
        page.say(f"{prompt}|{text}")

    print("  One text while it is written:\n  Once upon a time", end="", flush=True)
    pipe.set_progress_bar_config(disable=True)  # the text is the progress
    streamed = "Once upon a time"
    for piece in pipe.stream("Once upon a time", gen_length=64, generator=seed(1)):
        streamed += piece
        print(piece.replace("\n", "\n  "), end="", flush=True)
    print()
    page.parts.append(f"<pre>{html.escape(streamed)}</pre>")

    page.say("A gap, filled from both sides:")
    page.say(GAPPED)
    page.say(pipe.infill(GAPPED, gap_length=2, num_candidates=16, generator=seed(0)).texts[0])
    pipe.set_progress_bar_config(desc="denoising", leave=False, disable=False)

    page.say("A text of which a share is kept, and the rest made up:")
    for share in (0.5, 0.8, 1.0):
        text = pipe.denoise_reconstruct(TEXT, noise_level=share, generator=seed(0)).texts[0]
        page.say(f"{share:4.0%}  {text}")

    latents = pipe.encode(TEXT).latents  # (1, N, C)
    count = latents.shape[1]
    page.say(f"That text as {count} latents of {latents.shape[2]} numbers, and back:")
    page.say(pipe.decode(latents).texts[0])


def show_pixels(directory: Path, page: Page) -> None:
    """A sentence for a meaning, denoised as the pixels of a picture."""
    pipe = TokComPipeline.from_pretrained(directory).to(page.device)
    pipe.set_progress_bar_config(disable=True)
    page.title(
        "Pixels: each token is a pixel; a meaning as a picture, and the picture that says it"
    )
    answer = pipe(MEANING, gen_length=48, generator=seed(0)).texts[0].strip()
    page.say(f"{MEANING} -> {answer}")
    pipe.text_to_image(answer).save(page.directory / "pixels.png")
    page.show("pixels.png", "the sentence as pixels", scale=16)


def show_emoji(directory: Path, page: Page) -> None:
    """Pictures for captions, one of them from its first tokens, and from its codes."""
    # weights lie in bfloat16, which many processors compute slowly
    pipe = TokComImagePipeline.from_pretrained(directory, dtype=torch.float32).to(page.device)
    pipe.set_progress_bar_config(disable=True)
    page.title("Emoji: 36 ordered tokens, drawn for a caption")
    drawn = pipe(list(EMOJI), generator=seed(0))
    picture_grid([drawn.images], scale=4).save(page.directory / "emoji.png")
    page.show("emoji.png", " | ".join(EMOJI))
    first = drawn.latents[:1]
    prefixes = [pipe.decode(first, count).images[0] for count in PREFIXES]
    picture_grid([prefixes], scale=4).save(page.directory / "emoji_prefixes.png")
    numbers = ", ".join(map(str, PREFIXES))
    page.show("emoji_prefixes.png", f"{EMOJI[0]}: from its first {numbers} tokens")
    codes = pipe.encode(drawn.images[0]).codes  # (1, N, 1)
    pipe.decode(codes).images[0].save(page.directory / "emoji_codes.png")
    page.say(f"as codes: {' '.join(map(str, codes[0, :, 0].tolist()))}")
    page.show("emoji_codes.png", "and what these codes say", scale=4)


def show_clips(directory: Path, page: Page) -> None:
    """Clips for captions."""
    pipe = TokComVideoPipeline.from_pretrained(directory, dtype=torch.float32).to(page.device)
    pipe.set_progress_bar_config(disable=True)
    steps = pipe.model.config.num_inference_steps
    page.title(f"Clips: 8 frames for a caption, in {steps} evaluations of the network")
    clips = pipe(list(CLIPS), generator=seed(0)).videos
    for place, (caption, clip) in enumerate(zip(CLIPS, clips)):
        name = f"clip_{place}.gif"
        large = [frame.resize((128, 128), Image.Resampling.NEAREST) for frame in clip]
        export_to_gif(large, str(page.directory / name), fps=8)
        page.show(name, caption)


def show_digits(directory: Path, page: Page) -> None:
    """Listen to a recording that training never had, then make a digit of all three kinds."""
    pipe = TokComOmniPipeline.from_pretrained(directory, dtype=torch.float32).to(page.device)
    pipe.set_progress_bar_config(disable=True)
    page.title("Digits: text, picture and sound, each for the others")
    shutil.copy(RECORDING, page.directory / "digit_given.flac")
    page.show("digit_given.flac", f"a recording of {DIGIT}")
    heard = pipe({"audio": RECORDING}, "text", generator=seed(0)).texts[0]
    page.say(f"heard in it: {heard}")
    drawn = pipe({"audio": RECORDING}, "image", generator=seed(0)).images[0]
    _show_digit("digit_heard", "drawn for it", page, drawn)

    page.say(f"For the text {DIGIT!r}:")
    drawn = pipe({"text": DIGIT}, "image", generator=seed(0)).images[0]
    spoken = pipe({"text": DIGIT}, "audio", generator=seed(0)).audios[0]
    _show_digit("digit_for_text", "for the text", page, drawn, spoken, pipe.sampling_rates["audio"])

    made = pipe(generator=seed(0))
    page.say(f"A text from nothing: {made.texts[0]}. A picture and a sound for it:")
    parts = made.images[0], made.audios[0], pipe.sampling_rates["audio"]
    _show_digit("digit_from_nothing", "from nothing", page, *parts)


def _show_digit(
    name: str,
    what: str,
    page: Page,
    picture: Image.Image,
    sound: np.ndarray | None = None,
    rate: int | None = None,
) -> None:
    picture.save(page.directory / f"{name}.png")
    page.show(f"{name}.png", f"{what}: the picture", scale=4)
    if sound is not None:
        write_wav(sound, page.directory / f"{name}.wav", rate)
        page.show(f"{name}.wav", f"{what}: the sound")


# name -> directory, and what shows it
PARTS = {
    "text": (ROOT, show_text),
    "pixels": (ROOT / "zoo" / "pixels", show_pixels),
    "emoji": (ROOT / "zoo" / "emoji", show_emoji),
    "clips": (ROOT / "zoo" / "clips", show_clips),
    "digits": (ROOT / "zoo" / "digits", show_digits),
}


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="systems")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo")
    add_device_option(parser)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    page = Page(args.output_dir, args.device)
    for name in args.only:
        directory, show = PARTS[name]
        if (directory / "model_index.json").is_file():
            show(directory, page)
        else:
            page.title(f"{name}: left out")
            page.say(f"{directory} holds no model; `presets/zoo-{name}.yaml` trains one.")
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} seconds; open {page.write()}")
    print("README.md and the cards in zoo/ say what to expect of models of this size.")


if __name__ == "__main__":
    main()
