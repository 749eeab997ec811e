"""Folders of pictures, clips and sounds, and the captions that people keep with them.

A caption is looked for in a `metadata` file (.jsonl, .json, .csv, .tsv, .parquet) with
`file_name`, then in a text file of the same name beside it, then in the name of its folder. A
picture may have several: rows of `metadata` for one file, a list in its caption field, or the
lines of its side file.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets

from tokcom.training.config import DataConfig
from tokcom.training.files import MEDIA, PICTURES, SIDE_TEXTS, Listing, kind_of, natural_key
from tokcom.training.records import near_miss, read_rows, read_text, shown
from tokcom.training.report import Report, SourceReport, several, some

METADATA = "metadata"  # stem of the file with captions
FILE_NAME = "file_name"
CAPTIONS = ("caption", "text")  # fields that hold captions if none is named
NO_CAPTIONS = "none"  # as data.caption_column


def metadata_files(listing: Listing) -> list[Path]:
    return [path for path in listing.of_kind("table") if path.stem.lower() == METADATA]


def side_files(listing: Listing) -> dict[Path, Path]:
    """Media files and the text file beside each that has its name: 01.txt or 01.jpg.txt of
    01.jpg."""
    texts = {
        path.with_suffix(""): path for path in listing.files if path.suffix.lower() in SIDE_TEXTS
    }
    found = {
        path: texts.get(path.with_suffix(""), texts.get(path)) for path in listing.of_kind(*MEDIA)
    }
    return {path: text for path, text in found.items() if text is not None}


def find_caption_column(columns: list[str], config: DataConfig, where: str) -> str | None:
    """The field that holds captions: the one that is asked for, or else `caption` or `text`, if
    there is one.

    Raises `ValueError`, with the near miss, if the one that is asked for is missing. Only `none`
    means none.
    """
    asked = config.caption_column
    if asked == NO_CAPTIONS:
        return None
    if asked is None:
        # `caption` first: tables use `text` for other things, too
        return next((name for name in CAPTIONS if name in columns), None)
    if asked not in columns:
        raise ValueError(
            f"{where} has no captions in {asked!r} (fields: "
            f"{', '.join(columns) or 'none'}){near_miss(asked, columns)} "
            f"Set `data.caption_column` to one of them, or to {NO_CAPTIONS!r} to train without."
        )
    return asked


class MediaFolder:
    """A folder as records: a picture, a clip or a sound each, with its captions.

    Args:
        kinds: those of `MEDIA` that are read.

    With sounds among the kinds, files of one name and different kinds are one record of several
    streams.
    """

    def __init__(
        self, listing: Listing, kinds: tuple[str, ...], config: DataConfig, report: Report
    ):
        self.listing = listing
        self.kinds = kinds
        self.config = config
        self.report = report
        self.media = listing.of_kind(*kinds)
        self.bad: set[Path] = set()  # whose captions cannot be read
        self.source = SourceReport(str(listing.root), listing=listing)
        report.sources.append(self.source)

    def load(self) -> datasets.Dataset:
        """Columns `image_column`, `audio` and that of the captions, those that there are."""
        metadata = metadata_files(self.listing)
        side = side_files(self.listing)
        asked = self.config.caption_column
        captions = self._from_metadata(metadata)
        if asked == NO_CAPTIONS:
            # nobody wants captions, so text files beside pictures are left out as what they are
            side = {}
        else:
            lacking = [path for path in self.media if path in side and not captions.get(path)]
            captions |= {path: self._side_text(side[path], path) for path in lacking}
            if lacking:
                count = f"{len(lacking)} of {len(self.media)}"
                self.source.notes.append(f"captions from text files of the same name: {count}")
            # names of folders are guesses, so they serve only if nobody wrote a caption
            captions = captions or self._from_folders()
        if (
            not metadata
            and asked not in (None, NO_CAPTIONS)
            and (asked not in CAPTIONS or not any(captions.values()))
        ):
            find_caption_column(
                [], self.config, f"{self.listing.root} (which has no file {METADATA!r})"
            )
        if not captions:
            self.source.notes.append("no captions")
        self._leave_out({*metadata, *side.values()})
        for path in self.bad:
            self.listing.leave_out(path, "caption that cannot be read")
        self.media = [path for path in self.media if path not in self.bad]
        if not self.media:
            raise ValueError(f"{self.listing.root} holds no record that can be read.")
        columns = self._columns(captions)
        self.source.used = len(self.media) + len(metadata) + len(side)
        self.source.records = len(next(iter(columns.values())))
        self.source.fields = list(columns)
        counts = Counter(map(kind_of, self.media))
        found = [several(counts[medium], medium) for medium in self.kinds if counts[medium]]
        self.source.format = ", ".join(found)
        return datasets.Dataset.from_dict(columns)

    def _from_metadata(self, files: list[Path]) -> dict[Path, list[str]]:
        """Captions by file, of each metadata file from the field that holds them there."""
        rows = {file: self._rows(file) for file in files}
        columns = {file: _columns_of(row for _, row in rows[file]) for file in files}
        asked = self.config.caption_column
        if files and not any(asked in names for names in columns.values()):  # in none of them
            every = list(dict.fromkeys(name for names in columns.values() for name in names))
            find_caption_column(every, self.config, ", ".join(map(str, files)))
        captions: dict[Path, list[str]] = {}
        for file in files:
            # one of several metadata files may lack the field, if any of them has it
            column = asked if asked in columns[file] else None
            if asked is None:
                column = find_caption_column(columns[file], self.config, str(file))
            found = self._captions_in(file, rows[file], column)
            captions |= {path: captions.get(path, []) + texts for path, texts in found.items()}
            name = self.listing.name(file)
            if column is None:
                self.source.notes.append(
                    f"no captions in {name}; its fields are {', '.join(columns[file]) or 'none'}"
                )
            else:
                count = sum(map(bool, found.values()))
                self.source.notes.append(
                    f"captions from field {column!r} of {name}: {count} of {len(self.media)}"
                )
        return {path: texts for path, texts in captions.items() if texts}

    def _captions_in(
        self, file: Path, rows: list[tuple[str, dict]], column: str | None
    ) -> dict[Path, list[str]]:
        """Captions by file in the rows of a metadata file; a row without a file is a problem."""
        known = {_normal(path): path for path in self.media}
        captions: dict[Path, list[str]] = {}
        names = list(dict.fromkeys(name for _, row in rows for name in row))
        if names and FILE_NAME not in names:
            raise ValueError(
                f"{file} has no field {FILE_NAME!r}, which names the file of each caption (fields: "
                f"{some(names)}){near_miss(FILE_NAME, names)}"
            )
        for where, row in rows:
            if not isinstance(row.get(FILE_NAME), str):
                self.report.skip(
                    f"{where} has no file in field {FILE_NAME!r} but {shown(row.get(FILE_NAME))}."
                )
                continue
            path = file.parent / row[FILE_NAME].replace("\\", "/")  # as Windows writes it
            found = known.get(_normal(path))
            if found is not None:
                texts = self._strings(row.get(column), where, found) if column else []
                captions.setdefault(found, []).extend(texts)
            # a row for a file of a kind that this run does not read is no mistake
            elif kind_of(path) in self.kinds or not path.exists():
                hint = near_miss(row[FILE_NAME], [self.listing.name(media) for media in self.media])
                self.report.skip(
                    f"{where} names {row[FILE_NAME]!r}, which is not in the folder or is left "
                    f"out{hint}"
                )
        return captions

    def _rows(self, file: Path) -> list[tuple[str, dict]]:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            # `read_table` would take `key=value` in the names of folders for columns
            table = pyarrow.parquet.ParquetFile(file).read()
            return [(f"{file}, record {index}", row) for index, row in enumerate(table.to_pylist())]
        rows = []
        for where, row in read_rows(file, self.config.encoding):
            if isinstance(row, dict):
                rows.append((where, row))
            elif isinstance(row, ValueError):
                self.report.skip(str(row))
            else:
                self.report.skip(f"{where} is {shown(row)}, no object.")
        return rows

    def _strings(self, value: object, where: str, media: Path) -> list[str]:
        """One caption or a list of them as those that are not blank; what is no text is a
        problem of its file."""
        values = value if isinstance(value, list) else [value]
        # null is no caption, which is allowed
        if bad := [text for text in values if not isinstance(text, str) and text is not None]:
            self.bad.add(media)
            self.report.skip(
                f"{where}: the caption of {self.listing.name(media)} is {shown(bad[0])}, not a "
                "text; repair it."
            )
            return []
        return [text for text in values if text and text.strip()]

    def _side_text(self, file: Path, media: Path) -> list[str]:
        """The captions in a text file, one a line; one that cannot be read is a problem of its
        file."""
        try:
            lines = read_text(file, self.config.encoding).split("\n")
        except ValueError as error:
            self.bad.add(media)
            self.report.skip(f"{error} It is the caption of {self.listing.name(media)}.")
            return []
        return [line.strip() for line in lines if line.strip()]

    def _from_folders(self) -> dict[Path, list[str]]:
        """The names of sub-folders as captions; what lies in the folder itself has none."""
        root = self.listing.root
        inside = [path for path in self.media if path.parent != root]
        names = {path.parent.name for path in inside}
        # a single folder says nothing that tells pictures apart
        if len(names) < 2:
            return {}
        rest = len(self.media) - len(inside)
        without = f"; {several(rest, 'file')} outside of them without one" if rest else ""
        self.source.notes.append(
            f"captions are the names of {len(names)} folders: {some(sorted(names))}{without}"
        )
        return {path: [path.parent.name] for path in inside}

    def _leave_out(self, read: set[Path]) -> None:
        """Note the files of other kinds than those that are read."""
        for path in self.listing.files:
            if path not in read and kind_of(path) not in self.kinds:
                self.listing.leave_out(
                    path, f"{kind_of(path) or 'caption'} beside {' and '.join(self.kinds)} files"
                )

    def _columns(self, captions: dict[Path, list[str]]) -> dict[str, list]:
        names = {
            "picture": self.config.image_column,
            "clip": self.config.image_column,
            "sound": "audio",
        }
        records: dict[tuple, dict] = {}
        for path in self.media:
            column = names[kind_of(path)]
            # with sounds, 7.png and 7.wav are one record of two streams
            key = (path.with_suffix(""),) if "sound" in self.kinds else (path,)
            if column in records.get(key, {}):
                # 7.png and 7.jpg are two pictures, of which a record holds one
                key = (path,)
            record = records.setdefault(key, {})
            record[column] = {"bytes": None, "path": str(path)}
            if path in captions:
                # captions lie under "", which no column is called; both files of a record may bring
                # the same
                record.setdefault("", []).extend(
                    t for t in captions[path] if t not in record.get("", [])
                )
        columns = {
            name: [record.get(name) for record in records.values()]
            for name in dict.fromkeys(names.values())
        }
        columns = {name: column for name, column in columns.items() if any(column)}
        if captions:
            columns[self.config.captions] = as_captions(
                [record.get("", []) for record in records.values()]
            )
        return columns


def _normal(path: Path) -> str:
    """A path in the form in which it is compared: macOS writes an accent as a character of its
    own."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _columns_of(rows: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name != FILE_NAME))


def as_captions(rows: list[list[str]]) -> list:
    """Texts if no row has several, else lists of texts."""
    if any(len(row) > 1 for row in rows):
        return rows
    return [row[0] if row else "" for row in rows]


def folders_of_frames(listing: Listing, config: DataConfig, report: Report) -> datasets.Dataset:
    """Every folder that holds pictures as one clip of them in the order of their numbers; with
    several folders of such folders the names of those are captions."""
    pictures = listing.of_kind("picture")
    if not pictures:
        raise ValueError(
            f"{listing.root} holds no pictures ({', '.join(PICTURES)}); with "
            "data.frame_folders=true every folder of pictures is a clip."
        )
    folders: dict[Path, list[Path]] = {}
    for path in pictures:
        folders.setdefault(path.parent, []).append(path)
    # records in the same order on every file system
    folders = dict(sorted(folders.items()))
    frames = [[str(path) for path in sorted(paths, key=natural_key)] for paths in folders.values()]
    classes = [folder.parent.name for folder in folders]
    columns: dict[str, list] = {config.image_column: frames}
    asked = config.caption_column
    # one class for all clips would say nothing
    named = len(set(classes)) > 1
    if asked not in (None, NO_CAPTIONS) and not (named and asked in CAPTIONS):
        find_caption_column([], config, f"{listing.root} (whose captions are names of folders)")
    if named and asked != NO_CAPTIONS:
        columns[config.captions] = classes
    for path in listing.files:
        if kind_of(path) != "picture":
            listing.leave_out(path, f"{kind_of(path)} beside folders of frames")
    source = SourceReport(
        str(listing.root), "folders of frames", listing, len(pictures), len(frames), list(columns)
    )
    report.sources.append(source)
    return datasets.Dataset.from_dict(columns)
