"""From what `data.train` names, one source or several, to a dataset of records.

A source is a file, a folder, or a name on the Hub. Local texts and tables are read by
`documents.py`, folders of pictures, clips and sounds by `folders.py`.
"""

import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

from tokcom.training.checkpoints import first_line
from tokcom.training.config import DataConfig
from tokcom.training.documents import (
    PROBLEM,
    READER,
    TURNS,
    alike,
    as_stored,
    columns_of,
    content_digest,
    format_of,
    good_records,
    holds_pictures,
    joined_parts,
    part_kind,
    table_of,
    table_records,
    text_records,
)
from tokcom.training.files import (
    MEDIA,
    MEDIA_READ,
    READ,
    Listing,
    is_archive,
    is_saved_dataset,
    kind_of,
    list_files,
    names_media,
)
from tokcom.training.folders import (
    MediaFolder,
    find_caption_column,
    folders_of_frames,
    metadata_files,
    side_files,
)
from tokcom.training.mixtures import check_amounts, read_mixture
from tokcom.training.records import (
    DIALOGUES,
    first_record,
    messages_of,
    near_miss,
    read_rows,
    shown,
)
from tokcom.training.report import Report, SourceReport, several, some

FIELDS = 20  # fields of records that an error names; a folder of settings has hundreds


@dataclass
class Source:
    """One of several sources: where it lies, which of its fields holds the text, and how much of
    it is used.

    `weight` is the share of documents drawn from it, relative to the other sources; `fraction`
    in (0, 1] or `max_samples` take a part, of a stream its head. `fields` names for each of
    several streams the field that holds it; `modality` with `field` is short for one.
    """

    path: str
    field: str | None = None
    fields: dict[str, str] | None = None
    modality: str | None = None
    name: str | None = None  # configuration of a Hub dataset
    weight: float | None = None
    max_samples: int | None = None
    fraction: float = 1.0

    def __post_init__(self):
        check_amounts(self.path, self.weight, self.fraction, self.max_samples)
        if self.modality is not None:
            if self.field is None or self.fields is not None:
                raise ValueError(
                    f"source {self.path}: `modality` ({self.modality!r}) is that of one `field`; "
                    "name it."
                )
            # a stream is called after its modality if nobody names it otherwise
            self.fields = {self.modality: self.field}

    def load(self, config: DataConfig, split: str, report: Report):
        """Its records with the fields that training reads; notes in `report` what they are."""
        if self.path.startswith("~"):
            self.path = str(Path(self.path).expanduser())
        self.report = report
        self.group: dict[Path, int] = {}  # rows of the parquet files that are read together
        path = Path(self.path)
        if not path.exists():
            part = self._from_hub(config, split)
        elif is_saved_dataset(path):
            part = self._saved(path, config, split)
        else:
            part = self._local(config)
        return self._part_of(part, config.streaming)

    def _from_hub(self, config: DataConfig, split: str):
        path = Path(self.path)
        # a Hub name is NAME or USER/NAME; everything else was meant as a path
        if kind_of(path) or path.is_absolute() or self.path.startswith(".") or len(path.parts) > 2:
            raise FileNotFoundError(
                f"data file {self.path} does not exist; give an existing file, folder or Hub name."
            )
        part = datasets.load_dataset(
            self.path, self.name or config.name, split=split, streaming=config.streaming
        )
        return self._select(part, config, SourceReport(self.path, "dataset of the Hub"))

    def _saved(self, path: Path, config: DataConfig, split: str):
        """What `Dataset.save_to_disk` wrote."""
        part = datasets.load_from_disk(str(path))
        if isinstance(part, datasets.DatasetDict):
            if split not in part:
                raise ValueError(
                    f"{path} has no split {split!r}; it has {', '.join(part)}. Give the folder of "
                    "one."
                )
            part = part[split]
        part = part.to_iterable_dataset() if config.streaming else part
        return self._select(part, config, SourceReport(self.path, "saved dataset"))

    def _local(self, config: DataConfig):
        listing = list_files(self.path)
        if config.frame_folders:
            return folders_of_frames(listing, config, self.report)
        kinds = self._media_kinds(listing, config)
        if not kinds:
            return self._documents(listing, config)
        if config.streaming:
            raise ValueError(
                f"{self.path}: pictures, clips and sounds are not streamed; set "
                "data.streaming=false."
            )
        part = MediaFolder(listing, kinds, config, self.report).load()
        for name, kind in ((config.image_column, datasets.Image), ("audio", datasets.Audio)):
            if name in part.column_names:
                # decoded when an item is made, so that a bad file is reported with its record
                part = part.cast_column(name, kind(decode=False))
        if chosen := self.fields or config.fields:
            return self._streams(part, chosen, config)
        return part

    def _media_kinds(self, listing: Listing, config: DataConfig) -> tuple[str, ...]:
        """The kinds of media that are read; none if texts or tables are.

        What the run reads decides. If that is not known, what there is more of does, but
        captions belong to media. Sounds are read where there is nothing to look at.
        """
        side = set(side_files(listing).values())
        # a text file beside a picture of its name is a caption, not a document
        documents = [p for p in listing.of_kind("text") if p not in side]
        documents += set(listing.of_kind("table")) - set(metadata_files(listing))
        media = listing.of_kind(*MEDIA)
        captioned = bool(side) or bool(metadata_files(listing))
        likely = "pictures" if captioned or len(documents) < len(media) else "text"
        wanted = MEDIA_READ[config.kind or likely]
        if not media or (documents and not wanted):
            return ()
        if self.fields or config.fields:
            # several streams may be of any kind of media
            return MEDIA
        wanted = wanted or MEDIA_READ["pictures"]  # texts are asked for, and there are none
        return wanted if listing.of_kind("picture", "clip") or "sound" in wanted else ("sound",)

    def _documents(self, listing: Listing, config: DataConfig):
        """Texts and tables, those of each format on their own, then joined."""
        formats = self._formats(listing, config)
        for path in listing.files:
            if path not in formats:
                listing.leave_out(path, f"{kind_of(path) or 'caption'} beside texts")
        if all(file.stat().st_size == 0 for file in formats):
            raise ValueError(f"{self.path} is empty; give a file with data.")
        parts = {}
        # a set in the order of the files, which decides the order of the records
        for name in dict.fromkeys(formats.values()):
            files = [file for file in formats if formats[file] == name]
            source = SourceReport(self.path, name, listing, used=len(files))
            parts[name] = self._one_format(files, config, source)
            listing = Listing(listing.root)  # whose other files have been told
        if len(parts) == 1:
            return parts[name]
        kinds = {part_kind(part, config): name for name, part in parts.items()}
        if len(kinds) > 1:
            found = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
            raise ValueError(f"{self.path} holds {found}; give the files of one of them as a list.")
        return datasets.concatenate_datasets(alike(list(parts.values()), config))

    def _formats(self, listing: Listing, config: DataConfig) -> dict[Path, str]:
        """Texts and tables by file: text, json, csv or parquet. Of several formats tables that
        hold no text are left out."""
        formats = {path: format_of(path) for path in listing.of_kind("text", "table")}
        if not formats:
            left_out = "; ".join(
                f"{reason}: {', '.join(names[:3])}" for reason, names in listing.left_out.items()
            )
            named = ", ".join(path.name for path in listing.files)
            is_packed = any(map(is_archive, listing.files)) or "archive" in left_out
            remedy = "unpack it and give its files" if is_packed else f"known are {READ}"
            raise ValueError(
                f"{self.path} holds no file that is read ({left_out or named or 'it is empty'}); "
                f"{remedy}."
            )
        if len(set(formats.values())) == 1:
            return formats
        text = self.field or config.text_column
        fitting = {}
        for path, name in formats.items():
            # a folder of texts often has a table of facts about them, which is no text
            columns = [] if name == "text" else columns_of(path, config.encoding)
            # a table whose columns cannot be read is kept: reading it names what is wrong
            if not columns or {text, *DIALOGUES} & set(columns):
                fitting[path] = name
            else:
                listing.leave_out(path, f"table without field {text!r}")
        listing.files = [path for path in listing.files if path in fitting or path not in formats]
        return fitting or formats

    def _one_format(self, files: list[Path], config: DataConfig, source: SourceReport):
        if source.format == "parquet":
            return self._parquet(files, config, source)
        if source.format == "text":
            return self._read(text_records, files, config, source, column=config.text_column)
        return self._table(files, config, source)

    def _table(self, files: list[Path], config: DataConfig, source: SourceReport):
        """JSON and CSV: texts and dialogues are checked while they are read, other records are
        kept as they are."""
        firsts = {file: first_record(file, config.encoding) for file in files}
        for file in (path for path in files if firsts[path] is None):
            source.listing.leave_out(file, "without records")
        files = [file for file in files if firsts[file] is not None]
        if not files:
            raise ValueError(f"{self.path} holds no records, it is empty; give a file with data.")
        source.used = len(files)
        # of all files, since the first may lack a field that others have
        columns = list(dict.fromkeys(name for first in firsts.values() for name in first or ()))
        each = " of each file" if len(files) > 1 else ""
        if (self.fields or config.fields) or holds_pictures(columns, config, self.field):
            return self._select(self._records(files, config), config, source)
        wanted = self._text_columns(columns, config, f"the first record{each} of {self.path} has")
        field = None if wanted[0] in DIALOGUES else wanted[0]
        source.fields = wanted
        return self._read(
            table_records, files, config, source, field=field, column=config.text_column
        )

    def _records(self, files: list[Path], config: DataConfig) -> datasets.Dataset:
        """The records of JSON and CSV files as they are."""
        found = []
        for file in files:
            for where, record in read_rows(file, config.encoding):
                if isinstance(record, dict):
                    found.append((file, where, record))
                else:
                    problem = record if isinstance(record, ValueError) else None
                    self.report.skip(str(problem or f"{where} is {shown(record)}, no object."))
        columns = list(dict.fromkeys(name for _, _, record in found for name in record))
        fields = self.fields or config.fields
        caption = None if fields else find_caption_column(columns, config, self.path)
        needed = list(fields.values()) if fields else [config.image_column, caption]
        return table_of(list(self._checked(found, needed, caption)), columns, needed, self.path)

    def _checked(
        self, found: list[tuple[Path, str, dict]], needed: list[str], caption: str | None
    ) -> Iterator[dict]:
        """Records whose captions are texts; names of files in them are seen from the folder of
        their table, too."""
        for file, where, record in found:
            for name in needed:
                value = record.get(name)
                if names_media(value):
                    beside = file.parent / value
                    record[name] = str(beside) if os.path.isfile(beside) else value
            texts = record.get(caption)
            for text in texts if isinstance(texts, list) else [texts]:
                if text is not None and not isinstance(text, str):
                    self.report.skip(
                        f"{where}: its caption is {shown(text)}, not a text; repair it."
                    )
                    break
            else:
                yield record

    def _read(
        self, generator, files: list[Path], config: DataConfig, source: SourceReport, **arguments
    ):
        """Records of a generator over files, from the cache if it holds them, without those that
        have a problem."""
        dialogues = arguments.get("field", "") is None
        text = config.text_column
        # told beforehand: guessed from the first records, a column of nulls would be of no type
        features = datasets.Features(
            {"messages": TURNS} if dialogues else {text: datasets.Value("string")}
        )
        arguments |= {"files": [str(file) for file in files], "encoding": config.encoding}
        source.fields = source.fields or [text]
        if config.streaming:
            arguments |= {"generator": generator, "max_skipped": config.max_skipped}
            self.report.sources.append(source)
            return datasets.IterableDataset.from_generator(
                good_records, features, gen_kwargs=arguments
            )
        # Everything that the records depend on. By default `datasets` would hash the generator, but
        # not the content of the files that it reads.
        key = datasets.fingerprint.Hasher.hash(
            [READER, generator.__name__, arguments, content_digest(files)]
        )
        features = datasets.Features(features | {PROBLEM: datasets.Value("string")})
        part = datasets.Dataset.from_generator(
            generator, features, gen_kwargs=arguments, fingerprint=key
        )
        problems = {i: text for i, text in enumerate(part[PROBLEM]) if text is not None}
        part = self._without(part.remove_columns(PROBLEM), problems)
        return self._noted(part, source)

    def _without(self, part: datasets.Dataset, problems: dict[int, str]) -> datasets.Dataset:
        """The records without those that have a problem, which the report counts or refuses."""
        for problem in problems.values():
            self.report.skip(problem)
        if not problems:
            return part
        return part.select([i for i in range(len(part)) if i not in problems])

    def _noted(self, part, source: SourceReport):
        source.records = None if isinstance(part, datasets.IterableDataset) else len(part)
        source.fields = source.fields or list(part.column_names or ())
        self.report.sources.append(source)
        return part

    def _parquet(self, files: list[Path], config: DataConfig, source: SourceReport):
        """Files that have other columns than their neighbours are read on their own, then
        joined."""
        schemas = {}
        for file in files:
            try:
                schemas[file] = pyarrow.parquet.read_schema(file)
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise ValueError(
                    f"{file} cannot be read ({first_line(error)}); repair or remove the file."
                ) from error
        for file in [path for path in files if not pyarrow.parquet.read_metadata(path).num_rows]:
            source.listing.leave_out(file, "without records")
            files.remove(file)
        if not files:
            raise ValueError(f"{self.path} holds no records, it is empty; give a file with data.")
        source.used = len(files)
        parts = []
        # neighbours of one schema together: sorting by schema would change the order of the records
        for _, group in groupby(files, lambda file: str(schemas[file])):
            self.group = {file: pyarrow.parquet.read_metadata(file).num_rows for file in group}
            # a name is a pattern to datasets
            names = [glob.escape(str(file)) for file in self.group]
            try:
                part = datasets.load_dataset(
                    "parquet", data_files=names, split="train", streaming=config.streaming
                )
            except datasets.exceptions.DatasetGenerationError as error:
                reason = first_line(error.__cause__ or error)
                raise ValueError(
                    f"{self.path} cannot be read ({reason}); repair or remove the file."
                ) from error
            parts.append(self._select(part, config, source, len(parts)))
        if len(parts) == 1:
            return parts[0]
        source.records = None if config.streaming else sum(map(len, parts))
        return datasets.concatenate_datasets(alike(parts, config))

    # ---- the fields of records ----

    def _select(self, part, config: DataConfig, source: SourceReport, index: int = 0):
        """The fields that training reads; of several groups of files (`index`) the first is
        noted."""
        if chosen := self.fields or config.fields:
            part = self._streams(part, chosen, config)
        else:
            # a stream may not know its columns before its first record is read
            columns = part.column_names or list(next(iter(part), {}))
            if holds_pictures(columns, config, self.field):
                part = self._pictures(part, config, source)
            else:
                part = self._texts(part, columns, config)
        return part if index else self._noted(part, source)

    def _text_columns(
        self, columns: list[str], config: DataConfig, who: str | None = None
    ) -> list[str]:
        """The field of the text, or those of a dialogue; `ValueError` if there is neither. `who`
        begins its message."""
        text = self.field or config.text_column
        if text in columns or not columns:
            return [text]
        if not config.streaming and config.image_column != "image" and not config.wants_text:
            text = config.image_column
        default = text == "text" and not self.field
        wanted = [name for name in (*DIALOGUES, "answer") if name in columns] if default else []
        # a prompt without an answer is no dialogue, and an answer without a prompt neither
        if not wanted or ("prompt" in wanted) != ("answer" in wanted):
            raise ValueError(
                f"{who or f'records of {self.path} have'} no field {text!r} (fields: "
                f"{some(columns, FIELDS)}){near_miss(text, columns)} Set `data.text_column` (or of "
                "pictures `data.image_column`) to one of them, or give dialogues: `prompt` and "
                "`answer`, `messages`, `conversations`."
            )
        return wanted

    def _texts(self, part, columns: list[str], config: DataConfig):
        wanted = self._text_columns(columns, config)
        part = as_stored(part.select_columns(wanted))
        if wanted[0] not in DIALOGUES:
            text = wanted[0]
            feature = (part.features or {}).get(text)
            if feature is not None and getattr(feature, "dtype", None) not in ("string", "null"):
                raise ValueError(
                    f"field {text!r} of {self._place(0)[0]} holds {feature}, not texts; name "
                    "another field."
                )
            if not isinstance(part, datasets.IterableDataset):
                # Arrow knows which values are missing without making a string of each
                nulls = np.flatnonzero(part.data.column(text).is_null().to_numpy())
                part = self._without(part, {int(i): self._null(int(i), text) for i in nulls})
            part = (
                part if text == config.text_column else part.rename_column(text, config.text_column)
            )
        elif not isinstance(part, datasets.IterableDataset):
            part = self._without(part, self._bad_dialogues(part))
        return part

    def _bad_dialogues(self, part: datasets.Dataset) -> dict[int, str]:
        """What is wrong with the dialogues of which something is."""
        problems = {}
        for index, record in enumerate(part):
            try:
                messages_of(record, "{}, record {}".format(*self._place(index)))
            except ValueError as error:
                problems[index] = str(error)
        return problems

    def _place(self, index: int) -> tuple[str, int]:
        """The file of a record of parquet files, and its number there; of others the source."""
        for file, rows in self.group.items():
            if index < rows:
                return str(file), index
            # records of the files before it
            index -= rows
        return self.path, index

    def _null(self, index: int, text: str) -> str:
        path, row = self._place(index)
        return f"{path}, record {row} has no text in field {text!r} but null; repair or remove it."

    def _streams(self, part, fields: dict[str, str], config: DataConfig):
        """The fields of several streams under the names of the streams, undecoded."""
        if config.streaming:
            raise ValueError(
                "records of several streams are not streamed; set data.streaming=false."
            )
        missing = [field for field in fields.values() if field not in part.column_names]
        # Fields of the whole run may be spread over several sources, of which each has some.
        if self.fields and missing or len(missing) == len(fields):
            names = part.column_names
            raise ValueError(
                f"records of {self.path} have no field {missing[0]!r} (fields: {some(names, FIELDS)})"
                f"{near_miss(missing[0], names)} Correct `fields`."
            )
        columns = {stream: field for stream, field in fields.items() if field not in missing}
        part = part.select_columns(list(columns.values()))
        part = part.rename_columns(
            {field: stream for stream, field in columns.items() if field != stream}
        )
        return as_stored(part)

    def _pictures(self, part, config: DataConfig, source: SourceReport):
        """Pictures with their captions; the names of classes serve where there are none."""
        if config.streaming:
            raise ValueError("pictures are not streamed; set data.streaming=false.")
        image = config.image_column
        named = config.captions
        source.format += " with pictures or clips"
        label = part.features.get("label")
        classes = (
            isinstance(label, datasets.ClassLabel)
            and label.num_classes > 1
            and config.caption_column is None
        )
        if classes and not {"caption", "text"} & set(part.column_names):
            names = [label.names[i] for i in part["label"]]
            source.notes.append("captions are the names of the classes in field 'label'")
            return as_stored(part.select_columns([image]).add_column(named, names))
        others = [name for name in part.column_names if name != image]
        caption = find_caption_column(others, config, f"{self.path}")
        if caption is None:
            source.notes.append(f"no captions (other fields: {', '.join(others) or 'none'})")
            return as_stored(part.select_columns([image]))
        part = as_stored(part.select_columns([image, caption]))
        feature = part.features[caption]
        # a list of captions for a picture is allowed
        inner = feature.feature if isinstance(feature, datasets.List) else feature
        if getattr(inner, "dtype", None) not in ("string", "null"):
            raise ValueError(
                f"field {caption!r} of {self.path} holds {feature}, not captions; name another "
                "field."
            )
        source.notes.append(f"captions from field {caption!r}")
        return part if caption == named else part.rename_column(caption, named)

    def _part_of(self, part, streaming: bool):
        if streaming:
            if self.fraction < 1:
                raise ValueError(
                    f"source {self.path}: the length of a stream is unknown, so `fraction` cannot "
                    "be taken; use `max_samples`."
                )
            return part if self.max_samples is None else part.take(self.max_samples)
        count = max(1, round(self.fraction * len(part)))
        count = count if self.max_samples is None else min(count, self.max_samples)
        if count >= len(part):
            return part
        self.report.sources[-1].notes.append(f"a part of it: {several(count, 'record')}")
        # the same part in every run and on every process
        return part.shuffle(seed=0).select(range(count))


def read_sources(source: str | dict | list[str | dict]) -> list[Source]:
    """`data.train`: one source or several, each a path or name, a dictionary of `Source`'s
    fields, or a .yaml list of them."""
    known = [field.name for field in fields(Source)]
    return [Source(**values) for values in read_mixture(source, known)]


def load_documents(
    source: str | dict | list[str | dict],
    config: DataConfig,
    split: str,
    report: Report | None = None,
) -> Iterable[dict]:
    """Records of one or several sources as an iterable that can be iterated again: with field
    `config.text_column`, or if there is none with those of a dialogue, or with pictures and
    captions, or with the fields of several streams.

    Sources follow each other, or if any has a weight are mixed, the smaller ones repeated until
    all are used up. What was found is noted in `report`. Raises `ValueError` when a source has
    no such field and when there is no document.
    """
    shown = report is not None  # else nobody would hear of files that are left out
    report = report or Report(config.max_skipped)
    sources = read_sources(source)
    parts = [item.load(config, split, report) for item in sources]
    for found in () if shown else report.sources:
        if found.listing is not None and found.listing.left_out:
            warnings.warn("\n".join(found.lines()), stacklevel=2)
    kinds = {part_kind(part, config): item.path for item, part in zip(sources, parts)}
    if not any(item.fields for item in sources) and len(kinds) > 1:
        found = ", ".join(f"{path} holds {kind}" for kind, path in kinds.items())
        raise ValueError(f"{found}; sources of one run must hold the same.")
    parts = alike(parts, config)
    joined = joined_parts(parts, [item.weight for item in sources])
    if config.streaming:
        return joined
    first = joined.column_names[0] if joined.column_names else None
    if any(item.fields for item in sources) or config.fields:
        # else each names its own
        shared = split == "train" and any(item.fields is None for item in sources)
        missing = set(config.fields or ()) - set(joined.column_names) if shared else set()
        if missing or not len(joined):
            raise ValueError(
                f"{source} has no record with {sorted(missing) or 'a stream'}; correct "
                f"`data.fields` ({config.fields}), which names "
                "the field of each stream."
            )
        return joined
    is_text = "pictures" not in kinds and "sounds" not in kinds
    if len(joined) == 0 or (is_text and not any(str(row or "").strip() for row in joined[first])):
        raise ValueError(
            f"no text in {source}: the dataset is empty; check the path and `data.text_column`."
        )
    return joined
