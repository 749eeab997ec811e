"""Split captioned pictures into training, validation and test files of one size.

    python examples/data/emoji.py --pictures emoji64/train.parquet --output_dir emoji

`emoji64/train.parquet` is Noto Emoji (Google, Apache-2.0) with a caption for each picture, such as
"an emoji of grinning face". Any parquet file with `image` and `caption` will do. The words "an
emoji of" are left out. Records are dealt at random, so all skin tones but one of a held-out person
are usually in the training data, while the only picture of a held-out flag is not.
"""

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from tokcom.pictures_tokcom import open_image
from tokcom.processing_tokcom import TokComImageProcessor

PREFIX = "an emoji of "
SIZE = 32  # pixels
PARTS = {"test": 350, "validation": 150}  # records; the rest is for training


def as_png(picture: Image.Image) -> bytes:
    """A picture at `SIZE` on white, scaled as an image model scales what it reads."""
    processor = TokComImageProcessor(SIZE)
    small = processor.postprocess(processor(picture)["pixel_values"])[0]
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", required=True, help="parquet with `image` and `caption`")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    args = parser.parse_args(argv)
    records = datasets.load_dataset("parquet", data_files=args.pictures, split="train")
    rows = np.random.default_rng(args.seed).permutation(len(records))
    start = 0
    for part, count in {**PARTS, "train": len(records) - sum(PARTS.values())}.items():
        chosen = records.select(sorted(rows[start : start + count]))
        start += count
        table = {"image": [], "caption": []}
        for record in chosen:
            table["image"].append(as_png(open_image(record["image"])))
            table["caption"].append(record["caption"].removeprefix(PREFIX))
        file = args.output_dir / f"{part}.parquet"
        datasets.Dataset.from_dict(table).to_parquet(file)
        print(f"{count} pictures written to {file}")


if __name__ == "__main__":
    main()
