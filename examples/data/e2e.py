"""Turn E2E NLG into prompts and answers: what is to be said of a place, and a sentence that says
it.

    python examples/data/e2e.py --input dev.parquet --output_dir e2e

The input is a parquet or CSV file with the columns `mr` and `ref`, as the E2E NLG challenge
published them (CC BY-SA 4.0). Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` of
{"prompt", "answer"}, one row for each sentence. No meaning is in two of them.

Training rows come several times (`--copies`): with the slots of the meaning in another order, and
mostly with another name of the place or of the place near it, in the meaning and in the sentence
alike. Four thousand sentences are few, and names are best learnt as what is copied.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import pandas as pd

SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]")
SWAPPED = ("name", "near")  # slots whose values stand in the sentence word for word


def slots_of(meaning: str) -> list[tuple[str, str]]:
    """`name[Cotto], area[riverside]` -> its slots and their values, in their order."""
    return [(slot.strip(), value) for slot, value in SLOT.findall(meaning)]


def meaning_of(slots: list[tuple[str, str]]) -> str:
    return ", ".join(f"{slot}[{value}]" for slot, value in slots)


def vary(
    slots: list[tuple[str, str]], sentence: str, names: dict[str, list[str]], rng: random.Random
) -> tuple[str, str]:
    """The meaning and the sentence with slots in another order, and names swapped for others.

    A name is only swapped if it stands in the sentence exactly as in the meaning.
    """
    slots = list(slots)
    rng.shuffle(slots)
    for i, (slot, value) in enumerate(slots):
        other = rng.choice(names[slot]) if slot in SWAPPED else value
        is_taken = any(other in text for _, text in slots)
        # two places of one name in a meaning could not be told apart in its sentence
        if other == value or is_taken or sentence.count(value) == 0:
            continue
        # replacing it would change the other value, too
        if any(value != text and value in text for _, text in slots):
            continue
        slots[i] = (slot, other)
        sentence = sentence.replace(value, other)
    return meaning_of(slots), sentence


def split(meanings: list[str], counts: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Meanings of each part: as many as `counts` says at random, and the rest to learn."""
    # sorted first: the split depends on the seed, not on the order of the file
    shuffled = sorted(meanings)
    random.Random(seed).shuffle(shuffled)
    parts = {}
    for part, count in counts.items():
        parts[part] = shuffled[:count]
        shuffled = shuffled[count:]
    return {"train": shuffled, **parts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, type=Path, help="parquet or CSV file with `mr` and `ref`")
    add("--output_dir", required=True, type=Path)
    add("--copies", type=int, default=12, help="of every training sentence (default: 12)")
    add("--validation", type=int, default=30, help="meanings to tune on (default: 30)")
    add("--test", type=int, default=60, help="meanings to test on (default: 60)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    read = pd.read_csv if args.input.suffix == ".csv" else pd.read_parquet
    records = read(args.input)
    sentences = defaultdict(list)
    for meaning, sentence in zip(records["mr"], records["ref"]):
        sentences[meaning].append(" ".join(sentence.split()))
    parts = split(list(sentences), {"validation": args.validation, "test": args.test}, args.seed)
    rng = random.Random(args.seed)
    names = {slot: sorted({dict(slots_of(m)).get(slot, "") for m in sentences}) for slot in SWAPPED}
    names = {slot: [name for name in found if name] for slot, found in names.items()}
    held_out = {
        # sets, since the order of slots changes nothing about what a meaning says
        frozenset(slots_of(meaning))
        for part in ("validation", "test")
        for meaning in parts[part]
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for part, meanings in parts.items():
        rows = [(meaning, sentence) for meaning in meanings for sentence in sentences[meaning]]
        if part == "train":
            varied = [
                vary(slots_of(meaning), sentence, names, rng)
                for meaning, sentence in rows
                for _ in range(args.copies - 1)
            ]
            # another name could make a held-out meaning of one that is learnt
            rows = rows + [row for row in varied if frozenset(slots_of(row[0])) not in held_out]
            rng.shuffle(rows)
        file = args.output_dir / f"{part}.jsonl"
        lines = [json.dumps({"prompt": m, "answer": s}, ensure_ascii=False) for m, s in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{len(rows)} rows of {len(meanings)} meanings written to {file}")


if __name__ == "__main__":
    main()
