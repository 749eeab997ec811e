"""Write photographs of ten classes with captions: CIFAR-10, 10,000 pictures for training and 1,500
for tests.

    python examples/data/photographs.py --dataset uoft-cs/cifar10 --output_dir photographs

`--dataset` is a name on the Hub or a folder of parquet files with a split `train` and a split
`test`, a column `img` or `image`, and a column `label` of CIFAR-10's ten classes. A caption is "a
photo of a horse". CIFAR-10 (Krizhevsky 2009) has no formal licence, so models trained on it are not
to be shipped.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np

COUNTS = {"train": 10_000, "test": 1_500}
# the order of the labels in CIFAR-10
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="Hub id or folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    args = parser.parse_args(argv)
    for split, count in COUNTS.items():
        records = datasets.load_dataset(args.dataset, split=split)
        if "img" in records.column_names:
            records = records.rename_column("img", "image")
        missing = {"image", "label"} - set(records.column_names)
        if missing or len(records) < count or not set(records["label"]) <= set(range(10)):
            raise SystemExit(
                f"error: split {split!r} of {args.dataset} is not CIFAR-10: give {count:,} or more "
                f"records with `image` and a `label` of 0 to 9; it has {len(records):,} with "
                f"{', '.join(records.column_names)}."
            )
        rows = np.random.default_rng(args.seed).permutation(len(records))[:count]
        records = records.select(sorted(rows)).select_columns(["image", "label"])
        captions = [
            f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"
            for name in (CLASSES[label] for label in records["label"])
        ]
        file = args.output_dir / f"{split}.parquet"
        records.add_column("caption", captions).to_parquet(file)
        print(f"{len(records)} pictures written to {file}")


if __name__ == "__main__":
    main()
