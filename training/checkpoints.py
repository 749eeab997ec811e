"""Checkpoints that are whole or not there: written beside their place, hashed, flushed to the disk,
then renamed.

A checkpoint is a folder `checkpoint-STEP` with a `manifest.json` of the size and SHA-256 of every
file. What does not match its manifest is never loaded: the newest checkpoint that does is.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from tokcom.integrity_tokcom import file_digest
from tokcom.training.stopping import TrainingError

MANIFEST = "manifest.json"


class CheckpointError(TrainingError):
    """A checkpoint could not be written, or none that exists is whole; the message names it and the
    remedy."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; some say nothing but their name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    # a descriptor instead of a Python file, because folders have to be flushed, too
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def seal(folder: Path) -> None:
    """Write the manifest of a finished folder, and flush all of it."""
    entries = {
        str(p.relative_to(folder)): [p.stat().st_size, file_digest(p)] for p in _files(folder)
    }
    # last of all files: a folder with a manifest was complete when that was written
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    flush_all(folder)


def flush_all(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its manifest says."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(entries, dict) or not entries:
            return f"{MANIFEST} lists no files"
        for name, (size, digest) in entries.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            # sizes first: a truncated file is found without hashing gigabytes
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if file_digest(file) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    # a file that was put there later may be read in place of one that was checked
    unknown = {str(p.relative_to(folder)) for p in _files(folder)} - set(entries)
    return f"{sorted(unknown)[0]} is not in {MANIFEST}" if unknown else None


class Checkpoints:
    """The checkpoints of one stage in `directory`, of which the newest `limit` are kept."""

    def __init__(self, directory: Path, limit: int):
        self.directory = directory
        self.limit = limit

    def all(self) -> list[Path]:
        """Oldest first, by step."""
        found = (
            p
            for p in self.directory.glob("checkpoint-*")
            if p.name.removeprefix("checkpoint-").isdigit()
        )
        # by number, since checkpoint-900 is older than checkpoint-1000
        return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None if there is none at all; warns of broken ones.

        Raises `CheckpointError` if there are some, but all are broken.
        """
        found = self.all()
        broken = []
        # a crash spoils at most the newest, so those before it are tried next
        for folder in reversed(found):
            problem = damage(folder)
            if problem is None:
                return folder
            broken.append(f"{folder}: {problem}")
            warnings.warn(f"passing over a broken checkpoint, {broken[-1]}", stacklevel=2)
        if found:
            raise CheckpointError(
                f"no checkpoint is whole ({'; '.join(broken)}); restore one, or remove "
                f"{self.directory} to start again."
            )
        return None

    def write(
        self, step: int, save: Callable[[str], object], is_main: bool, wait: Callable[[], None]
    ) -> None:
        """Call `save(folder)` on every process, seal the folder, give it its name and remove old
        ones.

        `wait` is a barrier. Raises `CheckpointError` if it cannot be written; then the ones before
        are as they were.
        """
        target = self.directory / f"checkpoint-{step}"
        partial = target.with_suffix(".tmp")
        if is_main:
            # what a killed process left, whose files would be sealed as if they belonged to this
            # step
            shutil.rmtree(partial, ignore_errors=True)
        # nobody writes into a folder that is still being cleared
        wait()
        try:
            save(str(partial))
            # all files are complete before they are hashed
            wait()
            if is_main:
                seal(partial)
        # torch, safetensors and the system name a full disk in ways of their own
        except Exception as error:
            # a failed attempt leaves nothing behind that the next one would have to make sense of
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            kept = ([None] + self.all())[-1]
            raise CheckpointError(
                f"{target} could not be written ({first_line(error)}); the last one is "
                f"{kept or 'none'}. Free some space and run the same command again."
            ) from error
        if is_main:
            # A folder cannot be renamed onto one that exists: this step was written before, found
            # broken, and reached again.
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            # the new name is on the disk before an older checkpoint is removed
            flush(self.directory)
            # never all of them: the settings keep at least one
            for old in self.all()[: -self.limit]:
                shutil.rmtree(old)
        wait()
