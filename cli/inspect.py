"""Say what a preset would read of some data, before anything is trained on it, and draw a
contact sheet.

    tokcom inspect my_pictures --preset style-tiny
    tokcom inspect stories.jsonl --preset tiny --sheet sheet.png data.text_column=body

Every record is read, decoded or tokenized as in training. What cannot be read is named, and the
command fails. With --preset it also fails, after the report, if a run would refuse the data.
"""

import argparse
import tempfile

import numpy as np
import torch
from PIL import Image, ImageDraw

from tokcom.cli.errors import report_errors
from tokcom.training.checks import check_run
from tokcom.training.config import as_override, load_train_config
from tokcom.training.corpora import Corpus, OmniCorpus, PictureCorpus, Reading
from tokcom.training.plan import check_starts

PRESET = "debug"  # if none is given
RECORDS = 24  # on a sheet
COLUMNS = 6  # records side by side, of pictures
TILE = 96  # pixels of the height of a picture
LINE = 14  # pixels of a line of text
LETTERS = 6  # pixels of the width of a letter, about
PAPER = "white"
INK = "black"


def picture_of(pixels: torch.Tensor) -> Image.Image:
    """`(3, H, W)` in [-1, 1] as a picture of the height of a tile."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    width = max(1, round(image.width * TILE / image.height))
    return image.resize((width, TILE), Image.Resampling.NEAREST)


def spectrum_of(features: torch.Tensor) -> Image.Image:
    """Log-mel features `(bands, F)` as a picture, low pitches at the bottom."""
    values = features.numpy()
    # silence has one value everywhere
    span = max(float(values.max() - values.min()), 1e-6)
    # upside down: row 0 of a picture is at the top
    levels = (255 * (values - values.min()) / span).astype(np.uint8)[::-1]
    image = Image.fromarray(np.ascontiguousarray(levels))
    return image.convert("RGB").resize((2 * TILE, TILE), Image.Resampling.NEAREST)


def tiles_of(values: torch.Tensor) -> list[Image.Image]:
    """Log-mel features `(bands, F)`, a picture `(3, H, W)` or a clip `(3, F, H, W)` as pictures."""
    if values.ndim == 2:
        return [spectrum_of(values)]
    frames = values[None] if values.ndim == 3 else values.transpose(0, 1)  # (F, 3, H, W)
    return [picture_of(frame) for frame in frames]


def side_by_side(tiles: list[Image.Image], text: str, width: int | None = None) -> Image.Image:
    """Pictures of one height in a row, with a line of text below."""
    used = sum(tile.width + 2 for tile in tiles)
    sheet = Image.new(
        "RGB", (max(used, width or used, TILE), TILE + LINE if tiles else LINE), PAPER
    )
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width + 2
    shown = text.replace("\n", " ")[: sheet.width // LETTERS]
    # Pillow's own font has no other letters
    shown = shown.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(sheet).text((0, sheet.height - LINE), shown, fill=INK)
    return sheet


def stacked(rows: list[Image.Image]) -> Image.Image:
    sheet = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height + 2 for row in rows)), PAPER
    )
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 2
    return sheet


def contact_sheet(corpus: Corpus) -> Image.Image:
    """The first records as the model is given them: pictures, frames, spectra of sounds and
    captions; of texts the examples."""
    dataset = corpus.train
    if isinstance(corpus, OmniCorpus):
        if dataset.codec is None:
            raise ValueError(
                "the data have several streams, which the preset does not read; choose one such "
                "as omni-tiny."
            )
        return stacked(
            [_row_of_streams(dataset, index) for index in range(min(RECORDS, len(dataset)))]
        )
    if not isinstance(corpus, PictureCorpus):
        texts = [text for part in corpus.report.parts for text in part.examples]
        return stacked(
            [
                side_by_side([], text, 8 * TILE)
                for text in texts or ["a stream, of which nothing is read yet"]
            ]
        )
    items = []
    for index in range(min(RECORDS, len(dataset))):
        pixels = dataset[index]["pixel_values"]
        # behind the name of the record
        caption = dataset.describe(index).partition(": ")[2]
        items.append(side_by_side(tiles_of(pixels), caption))
    # clips are rows of frames already
    if dataset.clip_length is not None:
        return stacked(items)
    # pictures of different shapes in columns of one width
    width = max(item.width for item in items)
    rows = []
    for start in range(0, len(items), COLUMNS):
        row = Image.new("RGB", (COLUMNS * (width + 2), TILE + LINE), PAPER)
        for place, item in enumerate(items[start : start + COLUMNS]):
            row.paste(item, (place * (width + 2), 0))
        rows.append(row)
    return stacked(rows)


def _row_of_streams(dataset, index: int) -> Image.Image:
    item = dataset[index]
    tiles = []
    for name, values in item["streams"].items():
        # texts stand in the line below
        if not item["present"][name] or name in dataset.texts:
            continue
        tiles += tiles_of(values)
    return side_by_side(tiles, dataset.describe(index), 4 * TILE)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokcom inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data", help="a file, a folder, the name of a Hub dataset, or a .yaml list of sources"
    )
    parser.add_argument(
        "--preset",
        help=f"training preset that would read them (default: {PRESET}, which may not fit them)",
    )
    parser.add_argument(
        "--sheet",
        default="contact_sheet.png",
        help="file of the contact sheet (default: %(default)s)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without it a missing DATA is reported as a missing key=value too
        metavar="key=value",
        help="settings of the run, e.g. data.max_skipped=5; several sources are "
        "data.train=[a.txt,b.jsonl]",
    )
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            as_override("data.train", args.data),
            # an empty folder, so that no tokenizer of an earlier run is taken
            as_override("output_dir", folder),
            *args.overrides,
        ]
        config = load_train_config(args.preset or PRESET, settings)
        check_starts(config)
        reading = Reading(config)
        # everything is looked at, also what a run would hold out
        corpus = reading.corpus(hold_out=False)
        corpus.report = reading.report
        print(corpus.report)
        sheet = contact_sheet(corpus)
        try:
            if args.preset is not None:
                check_run(config, corpus)
        finally:
            # last: it may lie among the data, which the check may read again
            sheet.save(args.sheet)
            print(f"contact sheet written to {args.sheet}", flush=True)


if __name__ == "__main__":
    main()
