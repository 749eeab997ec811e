"""Draw docs/pixels.png: a text whose tokens are pixels, from noise to finished.

python docs/draw_pixels.py --checkpoint pixel-model --prompt "Once upon a time there was a little"
"""

import argparse

import torch
from PIL import Image, ImageDraw

from tokcom.pipeline_tokcom import TokComPipeline

SCALE = 8
GAP = 8
LABEL = 14


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--prompt", default="Once upon a time there was a little")
    parser.add_argument("--gen_length", type=int, default=256)
    parser.add_argument("--width", type=int, default=16, help="pixels in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="docs/pixels.png")
    args = parser.parse_args()
    pipe = TokComPipeline.from_pretrained(args.checkpoint)
    steps = pipe.model.config.num_inference_steps
    frames = []

    def keep(pipe, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step + 1 in {1, steps // 4, steps // 2, 3 * steps // 4, steps - 2, steps}:
            ids = pipe.model.to_ids(tensors["latents"])[0]
            frames.append((f"step {step + 1}", pipe.model.codec.to_image(ids, args.width)))
        return {}

    generator = torch.Generator().manual_seed(args.seed)
    output = pipe(args.prompt, args.gen_length, generator=generator, callback_on_step_end=keep)
    print(args.prompt + output.texts[0])
    height, width = (size * SCALE for size in frames[0][1].shape[:2])
    strip = Image.new("RGB", (len(frames) * (width + GAP) - GAP, height + LABEL), "white")
    for i, (title, pixels) in enumerate(frames):
        picture = Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.NEAREST)
        strip.paste(picture, (i * (width + GAP), LABEL))
        ImageDraw.Draw(strip).text((i * (width + GAP), 0), title, fill="black")
    strip.save(args.output)


if __name__ == "__main__":
    main()
