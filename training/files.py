"""Which files of a folder are read, and as what.

A suffix counts in any case. Files that systems and editors leave behind are left out, and so is
what cannot be told by its name; `Listing.left_out` says which and why, so that nothing is
dropped in silence. File names are names, not patterns.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXTS = (".txt", ".text")
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PICTURES = tuple(
    (
        ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif .avifs .heic "
        ".heif .jp2 .j2k .tga .ppm .pgm .pbm .pnm .ico"
    ).split()
)
FILMS = tuple(".mp4 .m4v .webm .mov .avi .mkv .mpg .mpeg .ogv .3gp .wmv .flv .m2ts".split())
SOUNDS = tuple(".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .m4a .aac".split())
SIDE_TEXTS = (".txt", ".text", ".caption")  # beside a picture, clip or sound of the same name
KINDS = {
    **dict.fromkeys(TEXTS, "text"),
    **dict.fromkeys(TABLES, "table"),
    **dict.fromkeys(PICTURES, "picture"),
    **dict.fromkeys(FILMS, "clip"),
    **dict.fromkeys(SOUNDS, "sound"),
}
MEDIA = ("picture", "clip", "sound")
# `data.kind` -> the media that are read; of "text" none are, but texts and tables
MEDIA_READ = {
    "text": (),
    "pictures": ("picture", "clip"),
    "sounds": ("sound",),
    "records": MEDIA,
}
COMPRESSED = (".gz", ".bz2", ".xz")  # of texts and of tables
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".zst")  # named, since they may hold the data
READ = (  # in messages
    "texts (.txt), records (.jsonl, .json, .csv, .tsv, .parquet), pictures (.png, .jpg, .webp, ...), "
    "clips (.mp4, .webm, .gif, ...) and sounds (.wav, .flac, .mp3, ...); docs/data.md lists all, and "
    "other documents are to be converted to .txt"
)
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")  # of Windows and macOS, in lower case


@dataclass
class Listing:
    """The files below `root` by kind, and the ones that are left out by reason."""

    root: Path
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Path]:
        return [path for path in self.files if kind_of(path) in kinds]

    def leave_out(self, path: Path | str, reason: str) -> None:
        name = path if isinstance(path, str) else self.name(path)
        # one that is no UTF-8 can be printed
        name = name.encode(errors="backslashreplace").decode()
        self.left_out.setdefault(reason, []).append(name)

    def name(self, path: Path) -> str:
        """A path as messages show it: below the root, or its last part."""
        return str(path.relative_to(self.root)) if path != self.root else path.name


def kind_of(path: Path | str) -> str | None:
    """text, table, picture, clip or sound; None for any other suffix."""
    path = Path(path)
    if path.suffix.lower() in COMPRESSED:
        # parquet compresses by itself, and its reader needs to jump in the file
        suffix = Path(path.stem).suffix.lower()
        is_read = suffix in (*TEXTS, *TABLES) and suffix != ".parquet"
        return KINDS[suffix] if is_read else None
    return KINDS.get(path.suffix.lower())


def names_media(value: Any) -> bool:
    """Whether a value of a record may be the name of a picture, clip or sound."""
    # longer values are texts, and asking the system for such a name is an error
    return isinstance(value, str) and 0 < len(value) < 1000 and kind_of(value) in MEDIA


def natural_key(path: Path | str) -> list:
    """Sorts names as people number them: frame 2 before frame 10."""
    # text and digits in turn, beginning with text
    parts = re.split(r"(\d+)", str(path))
    # pairs of a number and a text, so that a number is never compared with a text
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def list_files(source: str | Path) -> Listing:
    """What a file or folder holds. A file that is named itself is taken whatever its name."""
    root = Path(source)
    listing = Listing(root)
    if root.is_file():
        listing.files.append(root)
        return listing
    for path in sorted(_walk(root, listing)):
        if reason := _reason_to_drop(path):
            listing.leave_out(path, reason)
        else:
            listing.files.append(path)
    return listing


def _reason_to_drop(path: Path) -> str | None:
    """Why a file of a folder is not read, if it is not."""
    if not str(path).isprintable() and not _is_utf8(str(path)):
        return "name that is no UTF-8"
    if kind_of(path) is None and path.suffix.lower() not in SIDE_TEXTS:
        return (
            "archive, which is not opened" if is_archive(path) else "no kind of file that is read"
        )
    try:
        found = path.stat()
    except FileNotFoundError:
        return "broken link"
    except OSError as error:
        loops = error.errno == errno.ELOOP
        return "link that leads to itself" if loops else (error.strerror or "unreadable").lower()
    if not stat.S_ISREG(found.st_mode):
        return "pipe, socket or device"
    return None if found.st_size else "empty"


def is_archive(path: Path) -> bool:
    """Whether a name is that of an archive, which may hold the data."""
    # the last but one suffix, too: .tar.gz
    return bool({path.suffix.lower(), *map(str.lower, path.suffixes[-2:-1])} & set(ARCHIVES))


def _is_utf8(name: str) -> bool:
    try:
        # names that are no UTF-8 come from the system with surrogates, which have no encoding
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(root: Path, listing: Listing) -> Iterator[Path]:
    """Every file below `root` once. Real folders come before links to folders, so a link that
    leads back to one of them, or to a folder above, ends there."""
    seen = {os.path.realpath(root)}
    waiting = [root]
    links = []
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        # real paths, since a link may be reached by many names
        if folder.is_symlink() and folder != root:
            target = os.path.realpath(folder)
            if target in seen:
                listing.leave_out(folder, "link to a folder that is read already")
                continue
            seen.add(target)
        for path in sorted(folder.iterdir()):
            if reason := _reason_to_skip(path):
                listing.leave_out(path, reason)
            elif not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            elif (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                waiting.append(path)


def _reason_to_skip(path: Path) -> str | None:
    if path.name.startswith("._") or path.name.lower() in SYSTEM_FILES:
        return "system file"
    if path.name == ".ipynb_checkpoints":
        return "notebook checkpoints"
    return "hidden" if path.name.startswith(".") else None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    # as datasets asks; a state.json alone may be anybody's
    marks = ("state.json", "dataset_info.json")
    return (path / "dataset_dict.json").is_file() or all((path / m).is_file() for m in marks)
