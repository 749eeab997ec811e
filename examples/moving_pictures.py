"""Make clips of pictures that move, a small data set for video models.

    python examples/moving_pictures.py --pictures sample_data/emoji_train.parquet \\
        --output clips.parquet

Every picture slides, turns or grows over a white ground; the caption says what is shown and how it
moves. The clips in `sample_data/` were made by this from its pictures (seed 0).
"""

import argparse
import io

import datasets
import numpy as np
from PIL import Image

from tokcom.cli.errors import report_errors
from tokcom.pictures_tokcom import open_image

SIZE = 32  # pixels
FRAMES = 8  # of a clip, one second at the rate of `as_webp`
# how the centre moves; of the last two the picture itself changes
MOTIONS = {
    "sliding to the right": (1, 0),
    "sliding to the left": (-1, 0),
    "sinking": (0, 1),
    "rising": (0, -1),
    "turning": (0, 0),
    "growing": (0, 0),
}


def move(picture: Image.Image, motion: str, rng: np.random.Generator) -> list[Image.Image]:
    """`FRAMES` frames of a picture that moves."""
    # up to 17 of 32 pixels, so that most of the way lies inside the frame
    side = int(rng.integers(12, 18))
    speed = float(rng.uniform(1.2, 2.2))
    # BOX averages the pixels that fall together, so that thin lines do not vanish
    picture = picture.convert("RGBA").resize((side, side), Image.Resampling.BOX)
    dx, dy = MOTIONS[motion]
    frames = []
    for i in range(FRAMES):
        shown = picture
        if motion == "turning":
            shown = picture.rotate(-15 * speed * i, Image.Resampling.BICUBIC)
        elif motion == "growing":
            shown = picture.resize([round(side * (0.6 + 0.1 * i))] * 2, Image.Resampling.BICUBIC)
        away = speed * (i - (FRAMES - 1) / 2)  # from the middle, which is crossed halfway
        left = round((SIZE - shown.width) / 2 + dx * away)
        top = round((SIZE - shown.height) / 2 + dy * away)
        frame = Image.new("RGBA", (SIZE, SIZE), "white")
        # what would leave the frame on the left or above stays at its edge
        frame.alpha_composite(shown, (max(0, left), max(0, top)))
        frames.append(frame.convert("RGB"))
    return frames


def as_webp(frames: list[Image.Image]) -> bytes:
    """An animated WebP of 8 frames a second."""
    buffer = io.BytesIO()
    options = {"save_all": True, "duration": 125, "loop": 0, "quality": 80}
    frames[0].save(buffer, "WEBP", append_images=frames[1:], **options)
    return buffer.getvalue()


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", required=True, help="parquet with `image` and `caption`")
    parser.add_argument("--output", required=True, help="parquet file to write")
    parser.add_argument("--count", type=int, default=96, help="clips to make (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: 0)")
    args = parser.parse_args(argv)
    records = datasets.load_dataset("parquet", data_files=args.pictures, split="train")
    rng = np.random.default_rng(args.seed)
    rows = {"image": [], "caption": []}
    for i in range(args.count):
        record = records[int(rng.integers(len(records)))]
        # in turn, so that each motion is shown equally often
        motion = list(MOTIONS)[i % len(MOTIONS)]
        rows["image"].append(as_webp(move(open_image(record["image"]), motion, rng)))
        rows["caption"].append(f"{record['caption']}, {motion}")
    datasets.Dataset.from_dict(rows).to_parquet(args.output)
    print(f"{args.count} clips of {FRAMES} frames written to {args.output}")


if __name__ == "__main__":
    main()
