"""Records with several streams in: a text, a picture, a clip, a sound, any of which may be
missing; batches of all streams out."""

import hashlib
import os
from collections.abc import Collection, Iterable
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.configuration_codec_tokcom import TokComCodecConfig
from tokcom.pictures_tokcom import Frames
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    read_sound,
    text_ids,
    text_rows,
)
from tokcom.training.files import names_media
from tokcom.training.images import captions_of, record_name, row_number

KEPT_SOUNDS = 512 * 2**20  # bytes of features that a stream keeps, in each process that reads it


def is_text(records: datasets.Dataset, name: str) -> bool:
    """Whether a column holds texts, one or several a record, and not the names of files."""
    feature = records.features[name]
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
        return False
    first = next((texts[0] for texts in map(captions_of, records[name]) if texts), "")
    return not names_media(first) or not os.path.isfile(first)


class Stream:
    """One stream of a dataset for its codec: what records hold, and the tensors the codec reads.

    Args:
        dataset (`OmniDataset`): whose records are read.
        config: of the stream's codec.
    """

    kind: str  # of the codec's configuration

    def __init__(self, dataset: "OmniDataset", name: str, config: TokComCodecConfig):
        self.dataset = dataset
        self.name = name
        self.config = config

    def read(self, value: Any, index: int, facts: dict[str, float]) -> Any:
        """The `value` of a record as the pipeline takes it; notes in `facts` what was found."""
        raise NotImplementedError

    def tensor(self, content: Any, index: int) -> torch.Tensor:
        """What the codec reads of what `read` has returned."""
        raise NotImplementedError

    def missing(self) -> torch.Tensor:
        """What stands for the stream in a record that lacks it."""
        raise NotImplementedError

    def record_name(self, index: int, value: Any) -> str:
        return record_name(self.dataset.records, index, self.name, value)


class TextStream(Stream):
    """A text that is too long loses its end; of several texts one is drawn in every epoch."""

    kind = "text"

    def __init__(self, dataset, name, config):
        super().__init__(dataset, name, config)
        self.length = dataset.codec.text_length(name)

    def read(self, value: Any, index: int, facts: dict[str, float]) -> str:
        place = self._place(index)
        text = self.dataset.texts[self.name][place]
        ids = self.dataset.rows[self.name][place]
        facts[f"{self.name} cut at its end"] = len(ids) > self.length
        return self._cut(text, ids)

    def tensor(self, content: str, index: int) -> torch.Tensor:
        return self._row(self.dataset.rows[self.name][self._place(index)])

    def missing(self) -> torch.Tensor:
        return self._row([])

    def _row(self, ids: list[int]) -> torch.Tensor:
        return text_rows([ids], self.length, self.dataset.tokenizer.eos_token_id)[0]

    def _place(self, index: int) -> int:
        """The place of the text of a record."""
        first, end = self.dataset.first[self.name][index : index + 2]
        if end - first == 1:
            return int(first)
        # the same text for `read` and `tensor` of an epoch, which ask one after the other
        generator = np.random.default_rng((self.dataset.epoch, index, 2))
        return int(first + generator.integers(end - first))

    def _cut(self, text: str, ids: list[int]) -> str:
        """A text, or of a longer one as much as `length` ids hold; a cut inside a character
        loses it."""
        tokenizer = self.dataset.tokenizer
        kept = min(self.length, len(ids))
        while len(ids) > self.length:
            # half a character of several bytes decodes to replacement characters
            text = tokenizer.decode(ids[:kept]).rstrip("\ufffd")
            kept -= 1
            # a cut text may be tokenized in another way, into more ids than were kept
            if len(text_ids(tokenizer, text)) <= self.length:
                break
        return text


class PictureStream(Stream):
    """A picture; of an animation its first frame."""

    kind = "image"

    def __init__(self, dataset, name, config):
        super().__init__(dataset, name, config)
        self.processor = TokComImageProcessor(config.image_size)

    def read(self, value: Any, index: int, facts: dict[str, float]) -> Any:
        return Frames(value, self.record_name(index, value))[0]

    def tensor(self, content: Any, index: int) -> torch.Tensor:
        return self._pixels([content], index)[0]  # (3, H, W)

    def missing(self) -> torch.Tensor:
        return torch.zeros(3, *self.processor._size)

    def _pixels(self, frames: list, index: int) -> torch.Tensor:
        """Frames as `(F, 3, H, W)`."""
        try:
            return self.processor(frames)["pixel_values"]
        except ValueError as error:
            number = row_number(self.dataset.records, index)
            raise ValueError(f"record {number} ({self.name}): {error}") from error


class ClipStream(PictureStream):
    """The beginning of a film; where it ends its last frame stays."""

    kind = "video"

    def read(self, value: Any, index: int, facts: dict[str, float]) -> list:
        frames = Frames(value, self.record_name(index, value))
        length = self.config.clip_length
        facts[f"{self.name} padded with its last frame"] = len(frames) < length
        facts[f"{self.name} longer than a clip"] = len(frames) > length
        return frames.clip(0, length)

    def tensor(self, content: list, index: int) -> torch.Tensor:
        return self._pixels(content, index).transpose(0, 1)  # (3, F, H, W)

    def missing(self) -> torch.Tensor:
        return torch.zeros(3, self.config.clip_length, *self.processor._size)


class SoundStream(Stream):
    """A sound that is too long loses its end, and a shorter one ends in silence.

    Its features cost more than all else of a record, and sources that are mixed repeat their
    sounds, so each sound's are computed once while they fit.
    """

    kind = "audio"

    def __init__(self, dataset, name, config):
        super().__init__(dataset, name, config)
        self.processor = TokComAudioProcessor(config)
        self.features: dict[bytes, torch.Tensor] = {}  # of sounds that were read, by their samples

    def read(self, value: Any, index: int, facts: dict[str, float]) -> np.ndarray:
        rate = self.config.sampling_rate
        longest = self.config.num_samples / rate  # seconds
        found: dict[str, float] = {}
        sound = read_sound(value, rate, self.record_name(index, value), None, longest, found)
        seconds = found.pop("seconds")
        found |= {"cut at its end": seconds > longest, "padded with silence": seconds < longest}
        facts |= {f"{self.name} {what}": value for what, value in found.items()}
        facts["seconds"] = seconds
        return sound[: self.config.num_samples]

    def tensor(self, content: np.ndarray, index: int) -> torch.Tensor:
        # by content: sources that are mixed by weight repeat their sounds under other row numbers
        key = hashlib.sha256(content.tobytes()).digest()
        found = self.features.get(key)
        if found is None:
            found = self.processor(content)["input_features"][0]  # (bands, F)
            # all features have one size
            if (len(self.features) + 1) * found.nbytes <= KEPT_SOUNDS:
                self.features[key] = found
        return found

    def missing(self) -> torch.Tensor:
        return torch.zeros(self.config.num_channels, self.config.num_frames)


STREAMS: dict[str, type[Stream]] = {
    stream.kind: stream for stream in (TextStream, PictureStream, ClipStream, SoundStream)
}


class OmniDataset(torch.utils.data.Dataset):
    """Records whose columns are streams; None is a stream that a record lacks.

    An item has `streams`, the tensors that the codecs read, zeros where a stream is missing, and
    `present`, which are not; a stream without a column is in neither. `fit` says for which
    composite codec.
    `facts` has what was found while the last item was made.
    """

    def __init__(self, records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None):
        self.records = records
        self.tokenizer = tokenizer
        self.epoch = 0
        self.texts: dict[str, list[str]] = {}  # of a stream of texts, all of them
        self.rows: dict[str, list[list[int]]] = {}  # their ids
        # the place of the first text of every record, and the end
        self.first: dict[str, np.ndarray] = {}
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
                # all texts lie in one list; first[i] is where those of record i begin
                self.first[name] = np.cumsum([0, *map(len, texts)])
                self.rows[name] = text_ids(tokenizer, self.texts[name])
                self.present[name] = np.array([any(text.strip() for text in row) for row in texts])
            else:
                # as Arrow, which knows missing values without decoding a picture or a sound
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
                "them alike in `data.fields`, or add them to model.codec_config.streams."
            )
        for name in found:
            if (name in self.texts) != (name in codec.text_names):
                raise ValueError(
                    f"stream {name!r} of the data is not of the kind that "
                    f"{type(codec.streams[name]).__name__} reads."
                )
        self.lengths = codec.lengths
        self.streams = {}
        for name, module in codec.streams.items():
            if name in found:
                self.streams[name] = STREAMS[module.config.kind](self, name, module.config)
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
            if self.present[name][index]:
                facts[f"with {name}"] = True
                content[name] = self.streams[name].read(value, index, facts)
        self.facts = facts
        return content

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        content = self.content(index)
        if not content:
            raise ValueError(f"record {row_number(self.records, index)} is empty; remove it.")
        tensors = {}
        present = {}
        for name, stream in self.streams.items():
            there = name in content
            tensors[name] = stream.tensor(content[name], index) if there else stream.missing()
            present[name] = torch.tensor(there)
        return {"streams": tensors, "present": present}


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
        # each combination of streams gets a number, (records,)
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
        # what is left over of each combination, fewer than `size` rows
        rest = rng.permutation(np.concatenate([rows[len(rows) // size * size :] for rows in kinds]))
        whole = [rows[: len(rows) // size * size].reshape(-1, size) for rows in (*kinds, rest)]
        # batches are shuffled as wholes, so combinations alternate but do not mix
        yield from rng.permutation(np.concatenate(whole)).flatten().tolist()
        # fewer than a batch, which the loader drops
        yield from rest[len(rest) // size * size :].tolist()


def unmeasured_streams(codec, names: Iterable[str]) -> list[str]:
    """The streams among `names` whose codec has nothing to learn and whose latents were never
    measured."""
    found = []
    for name in names:
        part = codec.streams[name]
        if hasattr(part, "latent_mean") and not list(part.parameters()):
            is_new = not part.latent_mean.any() and bool((part.latent_std == 1).all())
            found += [name] if is_new else []
    return found


@torch.no_grad()
def measure_stream_statistics(
    model,
    dataset: OmniDataset,
    limit: int = 4096,
    batch_size: int = 128,
    names: Collection[str] | None = None,
) -> None:
    """Set the mean and standard deviation of every stream's latents, or of those of `names`, from
    up to `limit` records."""
    codec = model.codec.eval()
    names = dataset.streams if names is None else names
    for name in names:
        part = codec.streams[name]
        if hasattr(part, "latent_mean"):
            # with mean 0 and deviation 1 `encode` returns raw latents
            part.set_latent_statistics(
                torch.zeros_like(part.latent_mean), torch.ones_like(part.latent_std)
            )
    # the same records whatever the seed of the run
    rows = np.random.default_rng(0).permutation(len(dataset))[:limit]
    found = {name: [] for name in names}
    for start in tqdm(range(0, len(rows), batch_size), desc="measuring streams", unit="batch"):
        batch = torch.utils.data.default_collate(
            [dataset[int(i)] for i in rows[start : start + batch_size]]
        )
        # a codec without parameters is on the CPU
        device = next(codec.parameters(), torch.empty(0)).device
        streams = {name: batch["streams"][name].to(device) for name in names}  # (B, ...)
        encoded = codec.encode(streams)
        for name, parts in found.items():
            # records that lack a stream hold zeros in its place, which would pull its mean to 0
            present = batch["present"][name]
            parts.append(codec.stream_of(encoded.latents, name)[present].float().cpu())
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
