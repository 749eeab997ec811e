"""Text files and tables as records: generators, whose outcome `datasets` keeps in its cache, and
what makes parts alike.

The key of the cache is the names and the content of the files: a file that is only touched is not
read again, and one that has changed is.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import xxhash

from tokcom.training.config import DataConfig
from tokcom.training.files import kind_of
from tokcom.training.records import (
    DIALOGUES,
    UNREADABLE,
    first_record,
    messages_of,
    read_rows,
    read_text,
    shown,
    text_of,
)
from tokcom.training.report import Report

PROBLEM = "problem"  # column that says what is wrong with a record
READER = 2  # version of what the cache holds
TURNS = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]


def text_records(files: list[str], column: str, encoding: str | None) -> Iterator[dict]:
    """A record for every text file; one that cannot be read has a problem instead of a text."""
    for file in files:
        try:
            yield {column: read_text(Path(file), encoding), PROBLEM: None}
        except ValueError as error:
            # a row like any other: it lies in the cache, too, so every later run names it
            yield {column: None, PROBLEM: str(error)}


def table_records(
    files: list[str], field: str | None, column: str, encoding: str | None
) -> Iterator[dict]:
    """The texts in `field` of JSON and CSV files, as `column`, or without a field their
    dialogues, as `messages`."""
    name = "messages" if field is None else column
    for file in files:
        try:
            for where, record in read_rows(Path(file), encoding):
                yield _table_record(record, where, field, name)
        except UNREADABLE as error:  # the file, not one of its records
            reason = str(error) if file in str(error) else f"{file} cannot be read ({error})."
            yield {name: None, PROBLEM: reason}


def _table_record(record: object, where: str, field: str | None, name: str) -> dict:
    try:
        if isinstance(record, ValueError):
            # the reader yields a broken record's problem in its place
            raise record
        if field is not None:
            return {name: text_of(record, field, where), PROBLEM: None}
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {shown(record)}, not an object with fields.")
        return {name: messages_of(record, where), PROBLEM: None}
    except ValueError as error:
        return {name: None, PROBLEM: str(error)}


def good_records(generator, max_skipped: int, **arguments) -> Iterator[dict]:
    """The records of a generator without problems, for a stream; `ValueError` after
    `max_skipped` of the others."""
    report = Report(max_skipped)
    for record in generator(**arguments):
        problem = record.pop(PROBLEM)
        if problem is None:
            yield record
        else:
            report.skip(problem)


def content_digest(files: list[Path]) -> str:
    """A digest of the names and the content of files."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            # 4 MiB at a time: a file may be larger than memory
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def format_of(path: Path) -> str:
    """text, json, csv or parquet."""
    if kind_of(path) == "text":
        return "text"
    # two, because the last one may be that of a compression
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if ".parquet" in suffixes:
        return "parquet"
    return "csv" if ".csv" in suffixes or ".tsv" in suffixes else "json"


def columns_of(path: Path, encoding: str | None) -> list[str]:
    """The fields of a table; none of one that cannot be read, which is named when it is."""
    if format_of(path) != "parquet":
        return list(first_record(path, encoding) or ())
    try:
        return pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowInvalid):
        return []


def table_of(
    rows: list[dict], columns: list[str], needed: list[str], path: str
) -> datasets.Dataset:
    """Records of several fields. Texts beside lists of texts become lists; a field that mixes
    other kinds is left out, or if it is `needed` a `ValueError`."""
    found = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, list) for value in values):
            values = [[value] if isinstance(value, str) else value for value in values]
        try:
            # a trial: Arrow wants one type for all values of a column
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            if name in needed:
                raise ValueError(
                    f"field {name!r} of {path} holds values of several kinds ({error}); make them "
                    "alike."
                ) from error
            continue
        found[name] = values
    return datasets.Dataset.from_dict(found)


def as_stored(part):
    """Records whose pictures, films and sounds are not decoded, and whose texts are of one type:
    sources are joined by equal ones, and parquet knows two."""
    for name, feature in (part.features or {}).items():
        # as they are stored: they are decoded one by one when training reads them
        if type(feature) in (datasets.Image, datasets.Video, datasets.Audio):
            part = part.cast_column(name, type(feature)(decode=False))
        elif getattr(feature, "dtype", None) == "large_string":
            part = part.cast_column(name, datasets.Value("string"))
    return part


def alike(parts: list, config: DataConfig) -> list:
    """Parts whose captions are all texts or all lists of texts, so that they can be joined."""
    name = config.captions
    if config.streaming or not any(
        isinstance(part.features.get(name), datasets.List) for part in parts
    ):
        return parts
    same = []
    for part in parts:
        if name in part.column_names and not isinstance(part.features[name], datasets.List):
            rows = [[text] if text else [] for text in part[name]]
            feature = datasets.List(datasets.Value("string"))
            part = part.remove_columns(name).add_column(name, rows, feature=feature)
        same.append(part)
    return same


def joined_parts(parts: list, weights: list[float | None]):
    """Parts one after the other, or if any has a weight mixed, the smaller ones repeated until all
    are used up."""
    if all(weight is None for weight in weights):
        return datasets.concatenate_datasets(parts)
    shares = np.array([1.0 if weight is None else weight for weight in weights])
    # whatever the seed of the run: runs learn the same text, and share its cached ids
    return datasets.interleave_datasets(
        parts, (shares / shares.sum()).tolist(), seed=0, stopping_strategy="all_exhausted"
    )


def holds_pictures(columns: list[str], config: DataConfig, field: str | None) -> bool:
    """Whether records are read as pictures, not as the texts that they hold, too."""
    if config.image_column not in columns:
        return False
    text = field or config.text_column
    if text not in columns or text == config.captions:
        return True
    return not config.wants_text and field is None and config.text_column == "text"


def part_kind(part, config: DataConfig) -> str:
    """pictures, sounds, dialogues or texts."""
    columns = set(part.column_names or next(iter(part), {}))
    kinds = {"sounds": {"audio"}, "pictures": {config.image_column}, "dialogues": set(DIALOGUES)}
    return next((kind for kind, fields in kinds.items() if fields & columns), "texts")


def cut_document(documents: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """One text as two documents, the second `validation_fraction` of it from the beginning of a
    line or a word."""
    text = documents[0][config.text_column]
    place = int(len(text) * (1 - config.validation_fraction))
    for mark in ("\n", " "):
        # at most a tenth of the text earlier, or the share that is held out would be another one
        found = text.rfind(mark, int(0.9 * place), place)
        if found > 0:
            place = found + 1
            break
    return datasets.Dataset.from_dict({config.text_column: [text[:place], text[place:]]})
