"""Join pictures and sounds of the same thing into records with a text, a picture and a sound.

    python examples/several_streams.py --pictures emoji.parquet --sounds digits.parquet \\
        --output joined.parquet

A sound with a field `digit` goes with the pictures whose caption ends with `keycap` and that digit,
in turn, and the record gets the sound's caption. Any other sound goes with the pictures whose
caption is what follows the colon of its own, and the record gets the picture's. `--silent` keeps
pictures without a sound, too. `--hold_out` sets the records of random pictures aside in
`OUTPUT_test.parquet`, none of them of a digit.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np

from tokcom.cli.errors import report_errors

KINDS = {"image": datasets.Image(decode=False), "audio": datasets.Audio(decode=False)}


def index_captions(captions: list[str]) -> dict[str, list[int]]:
    """Indices of pictures by caption, and those of digits also by the digit."""
    found = defaultdict(list)
    for index, caption in enumerate(captions):
        found[caption].append(index)
        if "keycap " in caption:
            found[caption.rpartition("keycap ")[2]].append(index)
    return found


def join(
    pictures: datasets.Dataset, sounds: datasets.Dataset, silent: bool
) -> list[tuple[int, dict]]:
    """Pairs of a picture's index and a record; `silent` keeps pictures without a sound."""
    by_caption = index_captions(pictures["caption"])
    records = []
    heard = set()
    for i, sound in enumerate(sounds):
        digit = sound.get("digit")
        key = sound["caption"].partition(": ")[2] if digit is None else digit
        matches = by_caption[key]
        if not matches:
            continue
        # in turn, so that several pictures of one digit share its many sounds
        index = matches[i % len(matches)]
        heard.add(index)
        record = {**pictures[index], "audio": sound["audio"]}
        if digit is not None:
            record["caption"] = sound["caption"]
        records.append((index, record))
    if silent:
        for index in sorted(set(range(len(pictures))) - heard):
            records.append((index, {**pictures[index], "audio": None}))
    return records


def hold_out(
    records: list[tuple[int, dict]], captions: list[str], count: int
) -> tuple[list[dict], list[dict]]:
    """Records to learn, and those of `count` random pictures, none of them of a digit."""
    by_picture = defaultdict(list)
    for index, record in records:
        by_picture[index].append(record)
    found = list(by_picture)
    # seed 0: the same pictures in every call
    order = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    digits = [index for index in order if "keycap" in captions[index]]
    others = [index for index in order if "keycap" not in captions[index]]
    learned = [*others[count:], *sorted(digits)]
    return (
        [record for index in learned for record in by_picture[index]],
        [record for index in others[:count] for record in by_picture[index]],
    )


def write(records: list[dict], names: list[str], output: Path) -> None:
    """Write records as they were encoded; columns of `names` are marked as pictures or sounds."""
    encoded = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = {"caption": datasets.Value("string"), **dict.fromkeys(KINDS, encoded)}
    joined = datasets.Dataset.from_list(records, datasets.Features(columns))
    for name in names:
        joined = joined.cast_column(name, KINDS[name])
    joined.to_parquet(output)
    heard = sum(record["audio"] is not None for record in records)
    print(f"{len(records)} records, {heard} with a sound, written to {output}")


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pictures", required=True, help="parquet with `image` and `caption`")
    add("--sounds", help="parquet with `audio`, `caption`, and of digits `digit` (default: none)")
    add("--output", required=True, type=Path, help="parquet file to write")
    add("--silent", action="store_true", help="keep pictures without a sound (default: off)")
    add("--hold_out", type=int, default=0, help="pictures for OUTPUT_test.parquet (default: 0)")
    args = parser.parse_args(argv)

    def read(file: str, name: str) -> datasets.Dataset:
        records = datasets.load_dataset("parquet", data_files=file, split="train")
        return records.cast_column(name, KINDS[name])

    # without columns of their own, which the records of other pictures would lack
    pictures = read(args.pictures, "image").select_columns(["caption", "image"])
    sounds = [] if args.sounds is None else read(args.sounds, "audio")
    records = join(pictures, sounds, args.silent or args.sounds is None)
    learned = [record for _, record in records]
    if args.hold_out:
        learned, test = hold_out(records, pictures["caption"], args.hold_out)
        test_file = args.output.with_name(f"{args.output.stem}_test{args.output.suffix}")
        write(test, list(KINDS), test_file)
    write(learned, list(KINDS), args.output)


if __name__ == "__main__":
    main()
