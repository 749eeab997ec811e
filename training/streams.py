"""Records with several streams in: a text, a picture, a clip, a sound, any of which may be
missing; batches of all streams out."""

import hashlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.pictures_tokcom import Frames
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    read_sound,
    text_ids,
    text_rows,
)
from tokcom.training.files import MEDIA, kind_of
from tokcom.training.images import captions_of, record_name, row_number

KEPT_SOUNDS = 512 * 2**20  # bytes of features that a dataset keeps, in each process that reads it


def is_text(records: datasets.Dataset, name: str) -> bool:
    """Whether a column holds texts, one or several a record, and not the names of files."""
    feature = records.features[name]
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
        return False
    first = next((texts[0] for texts in map(captions_of, records[name]) if texts), "")
    return kind_of(first) not in MEDIA or not Path(first).is_file()


class OmniDataset(torch.utils.data.Dataset):
    """Records whose columns are streams; None is a stream that a record lacks.

    An item has `streams`, the tensors that the codecs read, zeros where a stream is missing, and
    `present`, which are not; a stream without a column is in neither. A text that is too long
    loses its end; of several texts the first is taken. `fit` says for which composite codec.
    `facts` has what was found while the last item was made.
    """

    def __init__(self, records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None):
        self.records = records
        self.tokenizer = tokenizer
        self.epoch = 0
        self.texts: dict[str, list[str]] = {}  # of a stream of texts, all of them
        self.rows: dict[str, list[list[int]]] = {}  # their ids
        self.first: dict[
            str, np.ndarray
        ] = {}  # the place of the first text of every record, and the end
        self.present: dict[str, np.ndarray] = {}  # which records have a stream
        self.facts: dict[str, float] = {}
        self.codec = None
        for name in records.column_names:
            if is_text(records, name):
                texts = [
                    captions_of(row) or [""]
                    for row in tqdm(records[name], desc=f"reading {name}", unit="text")
                ]
                self.texts[name] = [text for row in texts for text in row]
                self.first[name] = np.cumsum([0, *map(len, texts)])
                self.rows[name] = text_ids(tokenizer, self.texts[name])
                self.present[name] = np.array([any(text.strip() for text in row) for row in texts])
            else:
                tables = records.select_columns([name]).with_format("arrow").iter(1000)
                self.present[name] = np.concatenate(
                    [table.column(0).is_valid().to_numpy() for table in tables]
                )

    def select(self, rows: list[int]) -> "OmniDataset":
        """A dataset of these records, in this order, for the same codec."""
        kept = OmniDataset(self.records.select(rows), self.tokenizer)
        if self.codec is not None:
            kept.fit(self.codec)
        return kept

    def describe(self, index: int) -> str:
        """A record in words: its texts, and the names of its other streams."""
        record = self.records[index]
        there = {name: value for name, value in record.items() if self.present[name][index]}
        shown = {
            name: repr(there[name])
            if name in self.texts
            else record_name(self.records, index, name, there[name])
            for name in there
        }
        return ", ".join(f"{name} {value}" for name, value in shown.items())

    def fit(self, codec) -> "OmniDataset":
        """Give streams as the `TokComCompositeCodec` reads them from now on; raises `ValueError`
        if it has none of these or a column is of another kind."""
        self.codec = codec
        found = set(self.records.column_names)
        wanted = set(codec.names)
        if not found <= wanted:
            raise ValueError(
                f"the data have the streams {sorted(found)} but the codec {sorted(wanted)}; name "
                "them alike in `data.fields`, or "
                "add them to model.codec_config.streams."
            )
        for name in found:
            if (name in self.texts) != codec.streams[name].config.has_tokens:
                raise ValueError(
                    f"stream {name!r} of the data is not of the kind that "
                    f"{type(codec.streams[name]).__name__} reads."
                )
        self.configs = {
            name: module.config for name, module in codec.streams.items() if name in found
        }
        self.lengths = codec.lengths
        self.text_lengths = {
            name: codec.text_length(name)
            for name, config in self.configs.items()
            if config.has_tokens
        }
        # features: of sounds that were read, by stream and samples
        self.processors = {}
        self.features = {}
        for name, config in self.configs.items():
            if config.kind == "audio":
                self.processors[name] = TokComAudioProcessor(config)
            elif not config.has_tokens:
                self.processors[name] = TokComImageProcessor(config.image_size)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Every epoch shows the same records, in the order that `sampler` gives for it."""
        self.epoch = epoch

    def sampler(self, batch_size: int, seed: int) -> "StreamSampler":
        return StreamSampler(self, batch_size, seed)

    def __len__(self) -> int:
        return len(self.records)

    def content(self, index: int) -> dict[str, Any]:
        """What a record holds, as the pipeline takes it: texts, pictures, clips and sounds by
        name."""
        record = self.records[index]
        content = {}
        facts: dict[str, float] = {}
        for name, value in record.items():
            if not self.present[name][index]:
                continue
            config = self.configs[name]
            facts[f"with {name}"] = True
            if name in self.rows:
                place = self._text(name, index)
                facts |= {
                    f"{name} cut at its end": len(self.rows[name][place]) > self.text_lengths[name]
                }
                content[name] = self.cut(
                    self.texts[name][place], self.rows[name][place], self.text_lengths[name]
                )
            elif config.kind == "audio":
                content[name] = self._sound(value, name, index, facts)
            else:
                frames = Frames(value, record_name(self.records, index, name, value))
                if config.kind == "image":
                    content[name] = frames[0]
                else:
                    content[name] = frames.clip(0, config.clip_length)
                    facts[f"{name} padded with its last frame"] = len(frames) < config.clip_length
                    facts[f"{name} longer than a clip"] = len(frames) > config.clip_length
        self.facts = facts
        return content

    def _text(self, name: str, index: int) -> int:
        """The place of the text of a record: of several one is drawn in every epoch."""
        first, end = self.first[name][index : index + 2]
        if end - first == 1:
            return int(first)
        return int(first + np.random.default_rng((self.epoch, index, 2)).integers(end - first))

    def _sound(self, value: Any, name: str, index: int, facts: dict[str, float]) -> np.ndarray:
        config = self.configs[name]
        found: dict[str, float] = {}
        longest = config.num_samples / config.sampling_rate
        sound = read_sound(
            value,
            config.sampling_rate,
            record_name(self.records, index, name, value),
            None,
            longest,
            found,
        )
        seconds = found.pop("seconds")
        found |= {"cut at its end": seconds > longest, "padded with silence": seconds < longest}
        facts |= {f"{name} {what}": value for what, value in found.items()} | {"seconds": seconds}
        return sound[: config.num_samples]

    def cut(self, text: str, ids: list[int], longest: int) -> str:
        """A text, or of a longer one as much as `longest` ids hold; a cut inside a character
        loses it."""
        kept = min(longest, len(ids))
        while len(ids) > longest:
            text = self.tokenizer.decode(ids[:kept]).rstrip("\ufffd")
            kept -= 1
            if len(text_ids(self.tokenizer, text)) <= longest:
                break
        return text

    def sound(self, value: np.ndarray, name: str) -> torch.Tensor:
        """Features of a sound of the stream `name`: they cost more than all else of a record,
        and sources that are mixed repeat their sounds, so each sound's are computed once while
        they fit."""
        key = name, hashlib.sha256(value.tobytes()).digest()
        found = self.features.get(key)
        if found is None:
            found = self.processors[name](value)["input_features"][0]
            if (len(self.features) + 1) * found.nbytes <= KEPT_SOUNDS:
                self.features[key] = found
        return found

    def _pixels(self, name: str, frames: list, index: int) -> torch.Tensor:
        try:
            return self.processors[name](frames)["pixel_values"]
        except ValueError as error:
            number = row_number(self.records, index)
            raise ValueError(f"record {number} ({name}): {error}") from error

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        content = self.content(index)
        streams = {}
        for name, config in self.configs.items():
            value = content.get(name)
            if config.has_tokens:
                rows = [[] if value is None else self.rows[name][self._text(name, index)]]
                streams[name] = text_rows(
                    rows, self.text_lengths[name], self.tokenizer.eos_token_id
                )[0]
            elif config.kind == "audio":
                shape = config.num_channels, config.num_frames
                streams[name] = torch.zeros(shape) if value is None else self.sound(value, name)
            else:
                frames = [] if value is None else value if config.kind == "video" else [value]
                shape = (
                    1 if config.kind == "image" else config.clip_length,
                    3,
                    *self.processors[name]._size,
                )
                pixels = self._pixels(name, frames, index) if frames else torch.zeros(shape)
                streams[name] = pixels[0] if config.kind == "image" else pixels.transpose(0, 1)
        present = {name: torch.tensor(name in content) for name in self.configs}
        if not content:
            raise ValueError(f"record {row_number(self.records, index)} is empty; remove it.")
        return {"streams": streams, "present": present}


class StreamSampler(torch.utils.data.Sampler):
    """Indices in an order in which the records of a batch have the same streams, so that no
    other is computed for it.

    What does not fill a batch of its kind is mixed into batches with the rest of the other
    kinds, so every record is shown. Epoch and `seed` decide the order, alike on all processes.
    """

    def __init__(self, dataset: OmniDataset, batch_size: int, seed: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.kinds = np.unique(
            np.stack(list(dataset.present.values()), 1), axis=0, return_inverse=True
        )[1].reshape(-1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.dataset.epoch))
        size = self.batch_size
        order = rng.permutation(len(self))
        kinds = [order[self.kinds[order] == kind] for kind in range(self.kinds.max() + 1)]
        rest = rng.permutation(np.concatenate([rows[len(rows) // size * size :] for rows in kinds]))
        whole = [rows[: len(rows) // size * size].reshape(-1, size) for rows in (*kinds, rest)]
        yield from rng.permutation(np.concatenate(whole)).flatten().tolist()
        yield from rest[len(rest) // size * size :].tolist()


@torch.no_grad()
def measure_stream_statistics(
    model, dataset: OmniDataset, limit: int = 4096, batch_size: int = 128
) -> None:
    """Set the mean and standard deviation of every stream's latents from up to `limit` records."""
    codec = model.codec.eval()
    for name in dataset.configs:
        part = codec.streams[name]
        if hasattr(part, "latent_mean"):
            part.set_latent_statistics(
                torch.zeros_like(part.latent_mean), torch.ones_like(part.latent_std)
            )
    rows = np.random.default_rng(0).permutation(len(dataset))[:limit]
    found = {name: [] for name in dataset.configs}
    for start in tqdm(range(0, len(rows), batch_size), desc="measuring streams", unit="batch"):
        batch = torch.utils.data.default_collate(
            [dataset[int(i)] for i in rows[start : start + batch_size]]
        )
        device = next(codec.parameters(), torch.empty(0)).device
        streams = {name: value.to(device) for name, value in batch["streams"].items()}
        encoded = codec.encode(streams)
        for name, present in batch["present"].items():
            found[name].append(codec.stream_of(encoded.latents, name)[present].float().cpu())
    for name, parts in found.items():
        part = codec.streams[name]
        latents = torch.cat(parts)
        if not hasattr(part, "latent_mean") or not len(latents):
            continue
        if part.latent_mean.ndim == 1:  # of all places alike
            latents = latents.flatten(0, 1)
        part.set_latent_statistics(
            latents.mean(0).to(part.latent_mean), latents.std(0, correction=0).to(part.latent_mean)
        )
