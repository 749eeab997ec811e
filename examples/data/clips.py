"""Make training, validation and test clips of a few pictures that move, with combinations held out.

    python examples/data/clips.py --pictures emoji64/train.parquet --output_dir clips

Chooses 96 pictures with short names, spread over the categories of the file, and moves each in six
ways (`examples/moving_pictures.py`). Of every picture one motion is only in the test clips and
another only in the validation clips, so a model must put together what it has seen apart.
"""

import argparse
import sys
from pathlib import Path

import datasets
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moving_pictures import MOTIONS, as_webp, move

from tokcom.pictures_tokcom import open_image

PREFIX = "an emoji of "
# too alike, or too small, at 16 pixels
LEFT_OUT = (
    "Flags",
    "Symbols",
    "People & Body",
    "Component",
)
COUNT = 96  # pictures
DRAWS = {
    "train": 10,
    "validation": 1,
    "test": 2,
}  # clips of each combination, of other size and speed


def choose(records: datasets.Dataset, count: int, rng: np.random.Generator) -> list[int]:
    """Rows with captions of one or two words, of the categories that show things."""
    rows = []
    for i, (caption, category) in enumerate(zip(records["caption"], records["category"])):
        words = caption.removeprefix(PREFIX).split()
        if len(words) <= 2 and category not in LEFT_OUT:
            rows.append(i)
    return sorted(rng.permutation(rows)[:count].tolist())


def part_of(picture: int, motion: int) -> str:
    """Which part a combination belongs to: each picture holds out two motions, neighbours hold out
    others."""
    place = (motion - picture) % len(MOTIONS)
    return {0: "test", 1: "validation"}.get(place, "train")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pictures", required=True, help="parquet with `image`, `caption` and `category`"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=COUNT, help=f"pictures (default: {COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: 0)")
    args = parser.parse_args(argv)
    records = datasets.load_dataset("parquet", data_files=args.pictures, split="train")
    rng = np.random.default_rng(args.seed)
    tables = {part: {"image": [], "caption": []} for part in DRAWS}
    for place, row in enumerate(choose(records, args.count, rng)):
        record = records[row]
        picture = open_image(record["image"])
        name = record["caption"].removeprefix(PREFIX)
        for index, motion in enumerate(MOTIONS):
            part = part_of(place, index)
            for _ in range(DRAWS[part]):
                # each draw has a size and a speed of its own
                tables[part]["image"].append(as_webp(move(picture, motion, rng)))
                tables[part]["caption"].append(f"{name}, {motion}")
    for part, table in tables.items():
        file = args.output_dir / f"{part}.parquet"
        datasets.Dataset.from_dict(table).to_parquet(file)
        print(f"{len(table['caption'])} clips written to {file}")


if __name__ == "__main__":
    main()
