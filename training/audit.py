"""Decode every picture, clip and sound once before training begins, as the loader will, and
count what comes out.

What cannot be read is named then, not when its batch is drawn hours later. The outcome is kept
in the cache of `datasets`, so other processes and later runs on the same files do not decode
them again.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import xxhash
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from tokcom.training.report import PartReport, Report

AUDIT = 1  # version of what the cache holds


def cache_folder() -> Path:
    """Where what is found or computed once is kept: beside what `datasets` keeps."""
    folder = datasets.config.HF_DATASETS_CACHE / "tokcom"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Outcomes(Dataset):
    """What was found while an item of a dataset was made, or why it could not be."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            self.dataset[index]
            # with the item, since the dataset of a worker process is a copy
            return {"facts": {name: _plain(value) for name, value in self.dataset.facts.items()}}
        except ValueError as error:
            return {"problem": str(error)}


def _plain(value: Any) -> Any:
    # by its name, numpy's truth value, too, which JSON does not know
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return float(value)


def audit(dataset, part: PartReport, report: Report, setting: Any = None, num_workers: int = 0):
    """The dataset without the records that cannot be decoded, which `report` counts or refuses;
    what the others hold is counted in `part`. `setting` is what their decoding depends on
    besides the records."""
    file = cache_folder() / f"audit-{records_digest(dataset.records, (AUDIT, setting))}.json"
    # several processes of a run ask for the same file: one decodes, and the others read it
    with FileLock(file.with_suffix(".lock")):
        if file.is_file():
            outcomes = json.loads(file.read_text(encoding="utf-8"))
        else:
            outcomes = _decode_all(dataset, part.name, report.max_skipped, num_workers)
            # not with a problem, after which the data are corrected or a package is installed
            if len(outcomes) == len(dataset) and not any("problem" in item for item in outcomes):
                file.with_suffix(".tmp").write_text(json.dumps(outcomes), encoding="utf-8")
                file.with_suffix(".tmp").rename(file)
    good = []
    # in the order of the records, which the loader keeps with several workers, too
    for index, outcome in enumerate(outcomes):
        if "problem" in outcome:
            report.skip(outcome["problem"])
        else:
            good.append(index)
            part.add(outcome["facts"])
    if not good:
        raise ValueError(f"no record of the {part.name} can be read.")
    kept = dataset if len(good) == len(dataset) else dataset.select(good)
    if hasattr(kept, "frame_counts"):
        # saves `encode_once` decoding every film again to count its frames
        kept.frame_counts = [outcomes[index]["facts"].get("frames", 1) for index in good]
    return kept


def _decode_all(dataset, name: str, max_skipped: int, num_workers: int) -> list[dict]:
    """The outcome of every record, or of all up to one problem too many."""
    # a generator of its own: a loader draws from the global one, on which initial weights depend
    generator = torch.Generator()
    loader = DataLoader(
        _Outcomes(dataset), None, num_workers=num_workers, generator=generator, collate_fn=_same
    )
    outcomes = []
    problems = 0
    for outcome in tqdm(loader, desc=f"decoding {name}", unit="record"):
        outcomes.append(outcome)
        problems += "problem" in outcome
        # the run will refuse the data, so the rest need not be decoded
        if problems > max_skipped:
            break
    return outcomes


# a function of the module, since workers cannot be sent a lambda
def _same(item: Any) -> Any:
    return item


def records_digest(records: datasets.Dataset, setting: Any) -> str:
    """A digest of a setting, of records, and of the state of the files that they name."""
    digest = xxhash.xxh3_128(repr((setting, len(records))).encode())
    if records.cache_files and not any(
        _names_files(feature) for feature in records.features.values()
    ):
        # `datasets` derives it from the source files and all that was done to them
        digest.update(records._fingerprint.encode())
        return digest.hexdigest()
    for record in records:
        for name, value in record.items():
            digest.update(f"{name}\0".encode())
            _update(digest, value)
    return digest.hexdigest()


def _names_files(feature: Any) -> bool:
    """Whether a column may hold names of files instead of their content."""
    if isinstance(feature, datasets.List):
        return _names_files(feature.feature)
    return isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)) or (
        isinstance(feature, datasets.Value) and feature.dtype == "string"
    )


def _update(digest: xxhash.xxh3_128, value: Any) -> None:
    if isinstance(value, dict):
        for name in sorted(value):
            _update(digest, value[name])
    elif isinstance(value, list) and value and isinstance(value[0], (str, dict, list)):
        for item in value:
            _update(digest, item)
    elif isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, str):
        # most texts are captions, and one too long for a name would make Path.is_file raise
        state = os.stat(value) if os.path.isfile(value) else None
        digest.update(f"{value}\0{'' if state is None else state.st_mtime_ns}\0".encode())
        if state is not None:
            digest.update(str(state.st_size).encode())
    else:
        digest.update(repr(value).encode())
