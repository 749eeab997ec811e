"""Join pictures and sounds that mean the same into records with a text, a picture and a sound.

    python examples/several_streams.py --pictures emoji64/train.parquet --sounds fsdd/train.parquet --output digits.parquet
    python examples/several_streams.py --pictures stamps64/train.parquet --sounds stamp_sounds/train.parquet --silent --output stamps.parquet
    python examples/several_streams.py --pictures emoji64/train.parquet --hold_out 200 --output icons.parquet

A sound with a field `digit` goes with the pictures whose caption ends with `keycap` and that digit,
in turn; another one with those whose caption is what follows the colon of its own. `--silent` keeps
the pictures without a sound, too. The text is that of a digit's sound and of another sound's
picture. `--hold_out` writes the records of so many random pictures, those of no digit, to
`OUTPUT_test.parquet`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np


def join(
    pictures: datasets.Dataset, sounds: datasets.Dataset, silent: bool
) -> list[tuple[int, dict]]:
    """Index of a picture, and a record of its caption, itself and a sound, encoded as they were;
    without a sound, None."""
    by_caption, records, heard = defaultdict(list), [], set()
    for index, caption in enumerate(pictures["caption"]):
        by_caption[caption].append(index)
        if "keycap " in caption:
            by_caption[caption.rpartition("keycap ")[2]].append(index)
    for i, sound in enumerate(sounds):
        digit = sound.get("digit")
        matches = by_caption[digit if digit is not None else sound["caption"].partition(": ")[2]]
        if matches:
            index = matches[i % len(matches)]
            heard.add(index)
            text = sound["caption"] if digit is not None else pictures[index]["caption"]
            records.append(
                (
                    index,
                    {"caption": text, "image": pictures[index]["image"], "audio": sound["audio"]},
                )
            )
    for index in range(len(pictures)) if silent else ():
        if index not in heard:
            picture = pictures[index]
            records.append(
                (index, {"caption": picture["caption"], "image": picture["image"], "audio": None})
            )
    return records


def hold_out(
    records: list[tuple[int, dict]], captions: list[str], count: int
) -> tuple[list[dict], list[dict]]:
    """Records to learn, and all those of `count` random pictures that are of no digit, by the
    pictures' `captions`."""
    found = list(dict.fromkeys(index for index, _ in records))
    order = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    others, digits = (
        [i for i in order if ("keycap" in captions[i]) == digit] for digit in (False, True)
    )
    of = defaultdict(list)
    for index, record in records:
        of[index].append(record)
    rows = [
        [record for i in part for record in of[i]]
        for part in ([*others[count:], *sorted(digits)], others[:count])
    ]
    return rows[0], rows[1]


def write(records: list[dict], kinds: dict, output: Path) -> None:
    encoded = {
        "bytes": datasets.Value("binary"),
        "path": datasets.Value("string"),
    }  # as they are, not encoded again
    features = datasets.Features(
        {"caption": datasets.Value("string"), "image": encoded, "audio": encoded}
    )
    joined = datasets.Dataset.from_list(records, features)
    for name, kind in kinds.items():
        joined = joined.cast_column(name, kind)
    joined.to_parquet(output)
    print(
        f"{len(records)} records, {sum(r['audio'] is not None for r in records)} with a sound, written to {output}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", required=True, help="parquet with `image` and `caption`")
    parser.add_argument("--sounds", help="parquet with `audio`, `caption`, and for digits `digit`")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--silent", action="store_true", help="keep pictures without a sound")
    parser.add_argument("--hold_out", type=int, default=0, help="pictures for OUTPUT_test.parquet")
    args = parser.parse_args(argv)
    kinds = {"image": datasets.Image(decode=False), "audio": datasets.Audio(decode=False)}
    found = {
        name: datasets.load_dataset("parquet", data_files=file, split="train").cast_column(
            name, kinds[name]
        )
        for name, file in {"image": args.pictures, "audio": args.sounds}.items()
        if file is not None
    }
    records = join(found["image"], found.get("audio", []), args.silent or args.sounds is None)
    learned = [record for _, record in records]
    if args.hold_out:
        learned, test = hold_out(records, found["image"]["caption"], args.hold_out)
        write(test, kinds, args.output.with_name(f"{args.output.stem}_test{args.output.suffix}"))
    write(learned, kinds, args.output)


if __name__ == "__main__":
    main()
