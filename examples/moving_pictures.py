"""Make clips of pictures that move, a small data set for models of clips.

    python examples/moving_pictures.py --pictures sample_data/emoji_train.parquet --output clips.parquet --count 96

Every picture slides, turns or grows over a white ground; the caption says what is shown and how it
moves. The clips in `sample_data/` were made by this from its pictures (seed 0).
"""

import argparse
import io

import datasets
import numpy as np
from PIL import Image

from tokcom.training.images import open_image

SIZE, FRAMES = 32, 8
MOTIONS = ("sliding to the right", "sliding to the left", "sinking", "rising", "turning", "growing")


def move(picture: Image.Image, motion: str, rng: np.random.Generator) -> list[Image.Image]:
    """`FRAMES` frames of a picture that moves."""
    side, speed = int(rng.integers(12, 18)), float(rng.uniform(1.2, 2.2))
    picture = picture.convert("RGBA").resize((side, side), Image.Resampling.BOX)
    direction = {
        "sliding to the right": (1, 0),
        "sliding to the left": (-1, 0),
        "sinking": (0, 1),
        "rising": (0, -1),
    }
    dx, dy = direction.get(motion, (0, 0))
    frames = []
    for i in range(FRAMES):
        shown, away = picture, speed * (i - (FRAMES - 1) / 2)
        if motion == "turning":
            shown = picture.rotate(-15 * speed * i, Image.Resampling.BICUBIC)
        elif motion == "growing":
            shown = picture.resize([round(side * (0.6 + 0.1 * i))] * 2, Image.Resampling.BICUBIC)
        frame = Image.new("RGBA", (SIZE, SIZE), "white")
        corner = (
            round((SIZE - shown.width) / 2 + dx * away),
            round((SIZE - shown.height) / 2 + dy * away),
        )
        frame.alpha_composite(shown, (max(0, corner[0]), max(0, corner[1])))
        frames.append(frame.convert("RGB"))
    return frames


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", required=True, help="parquet with `image` and `caption`")
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    records = datasets.load_dataset("parquet", data_files=args.pictures, split="train")
    rng, rows = np.random.default_rng(args.seed), {"image": [], "caption": []}
    for i in range(args.count):
        record, motion = records[int(rng.integers(len(records)))], MOTIONS[i % len(MOTIONS)]
        frames, buffer = move(open_image(record["image"]), motion, rng), io.BytesIO()
        frames[0].save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=125,
            loop=0,
            quality=80,
        )
        rows["image"].append(buffer.getvalue())
        rows["caption"].append(f"{record['caption']}, {motion}")
    datasets.Dataset.from_dict(rows).to_parquet(args.output)
    print(f"{args.count} clips of {FRAMES} frames written to {args.output}")


if __name__ == "__main__":
    main()
