"""A digest of the data that a run trains on, which is refused when it has changed between two calls
of the same run.

What is hashed is what training reads: token ids, dialogues, or the records of pictures and streams
as they are stored. Of files that records only name, and of sources that are read as a stream, the
size and both ends of every file count, so that nothing large is read twice. Of a Hub dataset that
is streamed only the name is known.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokcom.training.config import TrainConfig
from tokcom.training.directory import RunDirectory, write_atomically
from tokcom.training.files import names_media

END = 1 << 16  # bytes at each end of a file
ROWS = 256  # records that are hashed at a time


def data_digests(config: TrainConfig, corpus: Any) -> dict[str, str]:
    """Digests of the two parts of a corpus, by their names."""
    if corpus.streamed:
        return {
            "training data": _digest_sources(config.data.train),
            "validation data": _digest(corpus.validation),
        }
    train = _digest(corpus.train)
    validation = train if corpus.validation is corpus.train else _digest(corpus.validation)
    return {"training data": train, "validation data": validation}


def _digest(part: Any) -> str:
    total = hashlib.sha256()
    if isinstance(part, np.ndarray):
        # the memory itself, without a copy of what may be gigabytes
        total.update(np.ascontiguousarray(part).data)
    elif isinstance(part, list):
        for row in part:
            # dialogues are lists of ids, whose text is the same everywhere
            total.update(repr(row).encode())
    else:
        _add_records(total, part.records)
    return total.hexdigest()


def _add_records(total: Any, records: Any) -> None:
    """Add the records of a dataset as Arrow stores them, with the ends of the files that they
    name."""
    for table in records.with_format("arrow").iter(ROWS):
        sink = pa.BufferOutputStream()
        # the metadata describe the columns as one version of `datasets` does, not the data
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata(None))
        total.update(sink.getvalue())
        for column in table.columns:
            for name in _named_files(column):
                _add_file(total, Path(name))


def _named_files(column: pa.ChunkedArray) -> Iterator[str]:
    """Files that a column names: in the records of `datasets`, or as texts, alone or in lists."""
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        for value in column.to_pylist():
            if value and value.get("path") and value.get("bytes") is None:
                yield value["path"]
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        column = pc.list_flatten(column)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield from filter(names_media, column.to_pylist())


def _add_file(total: Any, file: Path) -> None:
    if not file.is_file():
        return
    size = file.stat().st_size
    # by its name alone, since a folder may have been moved or mounted elsewhere
    total.update(f"{file.name} {size}".encode())
    with file.open("rb") as stream:
        total.update(stream.read(END))
        if size > 2 * END:
            # headers and indices lie at either end of media files, and change when one is written
            # anew
            stream.seek(size - END)
        total.update(stream.read(END))


def _digest_sources(train: Any) -> str:
    from tokcom.training.data import read_sources  # which imports what reads files

    total = hashlib.sha256()
    for source in read_sources(train):
        path = Path(source.path)
        total.update(path.name.encode())
        if path.is_file():
            _add_file(total, path)
        # in an order of its own: that of a file system differs between machines
        for folder, _, names in sorted(os.walk(path)):
            for name in sorted(names):
                _add_file(total, Path(folder) / name)
    return total.hexdigest()


def check_unchanged(config: TrainConfig, corpus: Any, directory: RunDirectory) -> None:
    """Compare the data with those that a run has begun with, and note their digests in
    `run/data.json` and in the corpus.

    Raises `ValueError` if they have changed and `data.allow_changed` does not allow it. With it,
    what was made of the former data is removed, and the run goes on with the new ones.
    """
    file = directory.work / "data.json"
    now = data_digests(config, corpus)
    has_begun = directory.settings.is_file()
    # without settings the run was refused before it began, and its note does not count
    known = json.loads(file.read_text(encoding="utf-8")) if has_begun and file.is_file() else {}
    # runs that noted nothing are older than this file, and are believed
    changed = [name for name, digest in now.items() if known.get(name, digest) != digest]
    if changed and not config.data.allow_changed:
        raise ValueError(
            f"the {' and the '.join(changed)} changed since {directory.root} was begun, so its "
            "weights would be of two data sets; restore them, choose another output_dir, or set "
            "data.allow_changed=true."
        )
    if changed:
        print(f"the {' and the '.join(changed)} changed; the run goes on with the new ones")
        # the teacher's trajectories belong to rows by number; cached latents are checked by whoever
        # reads them
        (directory.work / "distill" / "pairs.pt").unlink(missing_ok=True)
    if now != known:
        write_atomically(file, json.dumps(now, indent=2) + "\n")
    corpus.digest = now["training data"]
    corpus.validation_digest = now["validation data"]
