"""Draw docs/denoising.gif: the shipped model writes, one frame for each denoising step.

python docs/draw_denoising.py
"""

from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from tokcom.cli.app import Demo
from tokcom.pipeline_tokcom import TokComPipeline

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time"
TOKENS = 64
SEED = 5
WIDTH = 760
HEIGHT = 155
MARGIN = 16
LINE = 32
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw(tokens: list[tuple[str, float]]) -> Image.Image:
    """One frame: the prompt in grey, tokens on a ground from red (noise) to green (denoised)."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), 19)
    x = MARGIN
    y = MARGIN
    for text, t in [(PROMPT, None), *tokens]:
        text = text.replace("\n", " ")
        width = pen.textlength(text, font=font)
        if x + width > WIDTH - MARGIN:
            x = MARGIN
            y = y + LINE
            text = text.lstrip(" ")
            width = pen.textlength(text, font=font)
        if t is not None:
            pen.rectangle((x, y, x + width, y + 25), fill=f"hsl({120 * t:.0f}, 70%, 82%)")
        pen.text((x, y + 1), text, fill="#777" if t is None else "#111", font=font)
        x += width
    return image


def main() -> None:
    pipe = TokComPipeline.from_pretrained(ROOT)
    demo = Demo(pipe)
    frames = []
    done = []
    current = []

    def after_step(pipe, step, timestep, tensors):
        nonlocal done, current
        index = step % len(pipe.scheduler.timesteps)
        done = done + current if index == 0 else done
        current = demo.emerging(tensors["latents"], 1 - float(pipe.scheduler.sigmas[index + 1]))
        frames.append(draw(done + current))
        return tensors

    generator = torch.Generator().manual_seed(SEED)
    pipe(PROMPT, gen_length=TOKENS, generator=generator, callback_on_step_end=after_step)
    palette = frames[len(frames) // 2].quantize(64)
    frames = [frame.quantize(palette=palette) for frame in frames]
    times = [120] * (len(frames) - 1) + [3000]
    frames[0].save(
        ROOT / "docs" / "denoising.gif",
        save_all=True,
        append_images=frames[1:],
        duration=times,
        loop=0,
    )


if __name__ == "__main__":
    main()
