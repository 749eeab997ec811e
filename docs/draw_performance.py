"""Draw the tables of docs/performance.md: docs/performance_operations.png,
docs/performance_time.png and docs/performance_batch.png.

    python docs/draw_performance.py

The numbers are read from the page's own tables.
"""

import argparse
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter
from PIL import Image

DOCS = Path(__file__).resolve().parent
OURS = "#1f77b4"
LOCAL = "#2ca02c"
THEIRS = "#d62728"


def read_tables(text: str, header: str, count: int) -> list[list[list[str]]]:
    """The rows of cells of all Markdown tables whose header begins with `header`.

    Raises `ValueError` unless there are `count` of them.
    """
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [
            [cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in block.splitlines()
        ]
        if block.startswith(f"| {header} |"):
            tables.append(rows[2:])  # after the header and its rule
    if len(tables) != count:
        raise ValueError(f"{len(tables)} tables begin with {header!r}, not {count}.")
    return tables


def finish(axes, xlabel: str, ylabel: str, ticks: dict[float, str]) -> None:
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_operations(text: str) -> None:
    """Nats per character behind the teacher, against training operations."""
    (rows,) = read_tables(text, "training operations", 1)
    figure, axes = plt.subplots(figsize=(5.2, 3))
    names = ("TokCom, shipped head", OURS), ("TokCom, local head", LOCAL), ("Llama", THEIRS)
    for column, (name, color) in enumerate(names, 2):
        points = [(float(row[0]), float(row[column])) for row in rows if row[column] != "-"]
        axes.plot(*zip(*points), "o-", color=color, label=name)
    axes.set_ylim(bottom=0)
    ticks = {float(row[0]): row[0] for row in rows}
    finish(axes, "training operations", "nats per character\nover the teacher", ticks)
    save(figure, "performance_operations.png")


def draw_time(text: str) -> None:
    """Held-out nats per token against training operations and against hours."""
    (rows,) = read_tables(text, "system | training operations", 1)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axes, column, label in zip(panels, (1, 2), ("training operations", "hours of one core")):
        for name, color in (("TokCom", OURS), ("Llama", THEIRS)):
            points = [(float(row[column]), float(row[-1])) for row in rows if row[0] == name]
            axes.plot(*zip(*sorted(points)), "o-", color=color, label=name)
        ticks = {float(row[column]): row[column] for row in rows if row[0] == "Llama"}
        finish(axes, f"{label}, codec included", "held-out nats per token", ticks)
    panels[1].set_ylabel(None)
    save(figure, "performance_time.png")


def draw_batch(text: str) -> None:
    """Milliseconds per token against the size of a batch, on both axes logarithmic."""
    titles = "tiny, 32 tokens", "base, 16 tokens", "tiny, 256 tokens"
    tables = read_tables(text, "ms per token | TokCom | Llama | Llama / TokCom", len(titles))
    figure, panels = plt.subplots(1, len(titles), figsize=(10, 3), sharey=True)
    for axes, rows, title in zip(panels, tables, titles, strict=True):
        batches = [int(row[0].removeprefix("batch ")) for row in rows]
        for column, name, color in ((1, "TokCom", OURS), (2, "Llama", THEIRS)):
            axes.plot(batches, [float(row[column]) for row in rows], "o-", color=color, label=name)
        axes.set(yscale="log", title=title)
        finish(axes, "batch", "ms per token", {batch: str(batch) for batch in batches})
    save(figure, "performance_batch.png")


def save(figure, name: str) -> None:
    figure.tight_layout()
    canvas = io.BytesIO()
    figure.savefig(canvas, dpi=80)
    plt.close(figure)
    # few colors: half the bytes
    Image.open(canvas).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(
        DOCS / name, optimize=True
    )
    print(DOCS / name)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    draw_operations(text)
    draw_time(text)
    draw_batch(text)


if __name__ == "__main__":
    main()
