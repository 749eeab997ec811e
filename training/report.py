"""What a run has read, in words: one block for each source, and one for each part of the data as
the loader yields it.

Nothing is counted in a pass of its own: sources note what they find while they are opened, data
sets what they decode.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tokcom.training.files import Listing

NAMED = 5  # names of files, or problems, that are listed; of the others the number
EXAMPLES = 3  # decoded records that are shown of each part
ADDED = ("characters", "seconds", "frames")  # sizes whose sum means something


def several(count: int, noun: str) -> str:
    """A number and its noun: `1 file`, `2 files`, `1,000 records`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def some(names: list[str], most: int = NAMED) -> str:
    """The first few of some names, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


@dataclass
class SourceReport:
    """One source: where it lies, its files, and the fields that are used."""

    path: str
    format: str = "records"  # of its files, or what else it is, in words
    listing: Listing | None = None
    used: int = 0  # files
    records: int | None = None
    fields: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = [f"{self.path}: {self.format}"]
        if self.listing is not None:
            found = self.listing.left_out
            count = sum(map(len, found.values()))
            lines.append(
                f"  {several(self.used + count, 'file')} found, {self.used:,} used, {count:,} "
                "left out"
            )
            lines += [f"    left out ({reason}): {some(names)}" for reason, names in found.items()]
        records = "a stream of records" if self.records is None else several(self.records, "record")
        lines.append(f"  {records}, fields {', '.join(self.fields) or 'none'}")
        return lines + [f"  {note}" for note in self.notes]


@dataclass
class PartReport:
    """The training or the validation data as their loader yields them: named counts, sizes, and
    decoded examples."""

    name: str
    records: int | None = None
    counts: Counter = field(default_factory=Counter)
    sizes: dict[str, list[float]] = field(default_factory=dict)  # by unit, one for each record
    examples: list[str] = field(default_factory=list)
    letters: str = ""  # every character of the texts, once

    def add(self, facts: dict[str, float]) -> None:
        """Count the facts of a record: truth values are counted, numbers kept for their range."""
        for name, value in facts.items():
            if isinstance(value, bool):
                self.counts[name] += value
            else:
                self.sizes.setdefault(name, []).append(value)

    def lines(self) -> list[str]:
        lines = [f"{self.name}:"]
        counted = [] if self.records is None else [several(self.records, "record")]
        counted += [f"{count:,} {name}" for name, count in self.counts.items() if count]
        if counted:
            lines.append("  " + ", ".join(counted))
        for name, values in self.sizes.items():
            # the range shows outliers, which a mean and a deviation hide
            low, middle, high = np.percentile(values, (0, 50, 100))
            total = f", {sum(values):,g} in all" if name in ADDED else ""
            lines.append(f"  {name}: {low:g} to {high:g}, median {middle:g}{total}")
        return lines + [
            f"  example {i}: {text}" for i, text in enumerate(self.examples[:EXAMPLES], 1)
        ]


class Report:
    """What was read, and the records that were left out, at most `max_skipped`."""

    def __init__(self, max_skipped: int = 0):
        self.max_skipped = max_skipped
        self.sources: list[SourceReport] = []
        self.parts: list[PartReport] = []
        self.problems: list[str] = []

    def part(self, name: str) -> PartReport:
        self.parts.append(PartReport(name))
        return self.parts[-1]

    def skip(self, problem: str) -> None:
        """Note that a record is left out; `ValueError` with its problem if that is one too many."""
        self.problems.append(problem)
        if len(self.problems) > self.max_skipped:
            remedy = f"data.max_skipped={len(self.problems)} leaves it out"
            if self.max_skipped:
                remedy = (
                    f"it is one more than data.max_skipped={self.max_skipped}: "
                    f"{some(self.problems[:-1])}"
                )
            raise ValueError(f"{problem.rstrip()} ({remedy})")

    def __str__(self) -> str:
        lines = ["data that were read"]
        for part in (*self.sources, *self.parts):
            lines += [f"  {line}" for line in part.lines()]
        if self.problems:
            lines.append(
                f"  {several(len(self.problems), 'record')} left out "
                f"(data.max_skipped={self.max_skipped}):"
            )
            lines += [f"    {problem}" for problem in self.problems[:NAMED]]
            if len(self.problems) > NAMED:
                lines.append(f"    and {len(self.problems) - NAMED:,} more")
        return "\n".join(lines)
