"""Records with several streams in: a text, a picture, a clip, a sound, any of which may be missing; batches of all streams out."""

import hashlib
import io
from math import gcd
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.processing_tokcom import TokComAudioProcessor, TokComImageProcessor, text_ids, text_rows
from tokcom.training.images import Frames

KEPT_SOUNDS = 512 * 2**20  # bytes of features that a dataset keeps, in each process that reads it


def read_sound(value: Any, sampling_rate: int, name: str = "a record") -> np.ndarray:
    """Samples `(n,)` at `sampling_rate` of a sound as datasets gives it: encoded bytes or a path in a dictionary, or samples with
    their rate; `ValueError` with the `name` of the record if it cannot be read."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError("sounds are read with soundfile: pip install soundfile") from error
    value = value if isinstance(value, dict) else {"path": value}
    try:
        if value.get("array") is not None:
            sound, rate = np.asarray(value["array"], dtype=np.float32), value["sampling_rate"]
        else:
            source = value["path"] if value.get("bytes") is None else io.BytesIO(value["bytes"])
            sound, rate = soundfile.read(source, dtype="float32")
    except (soundfile.SoundFileError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"{name} holds no sound that can be read ({error}); repair or remove it."
        ) from error
    sound = sound.mean(1) if sound.ndim == 2 else sound
    if rate != sampling_rate:
        from scipy.signal import resample_poly

        common = gcd(int(rate), sampling_rate)
        sound = resample_poly(sound, sampling_rate // common, int(rate) // common).astype(
            np.float32
        )
    return sound


def is_text(feature) -> bool:
    """Whether a column of a dataset holds texts."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


class OmniDataset(torch.utils.data.Dataset):
    """Records whose columns are streams; None is a stream that a record lacks.

    An item has `streams`, the tensors that the codecs read, zeros where a stream is missing, and `present`, which are not; a stream
    without a column is in neither. A text that is too long loses its end. `fit` says for which composite codec.
    """

    def __init__(self, records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None):
        self.records, self.tokenizer, self.epoch = records, tokenizer, 0
        self.rows, self.present = {}, {}  # ids of the texts of a stream; which records have it
        for name, feature in records.features.items():
            if is_text(feature):
                texts = [
                    text or "" for text in tqdm(records[name], desc=f"reading {name}", unit="text")
                ]
                self.rows[name] = text_ids(tokenizer, texts)
                self.present[name] = np.array([bool(text.strip()) for text in texts])
            else:
                tables = records.select_columns([name]).with_format("arrow").iter(1000)
                self.present[name] = np.concatenate(
                    [table.column(0).is_valid().to_numpy() for table in tables]
                )

    def fit(self, codec) -> "OmniDataset":
        """Give streams as the `TokComCompositeCodec` reads them from now on; raises `ValueError` if it has none of these or a column
        is of another kind."""
        found, wanted = set(self.records.column_names), set(codec.names)
        if not found <= wanted:
            raise ValueError(
                f"the data have the streams {sorted(found)} but the codec {sorted(wanted)}; name them alike in `data.fields`, or "
                "add them to model.codec_config.streams."
            )
        for name in found:
            if is_text(self.records.features[name]) != codec.streams[name].config.has_tokens:
                raise ValueError(
                    f"stream {name!r} of the data is not of the kind that {type(codec.streams[name]).__name__} reads."
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
        self.processors, self.features = (
            {},
            {},
        )  # features: of sounds that were read, by stream and samples
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
        """What a record holds, as the pipeline takes it: texts, pictures, clips and sounds by name."""
        record, content = self.records[index], {}
        for name, value in record.items():
            if not self.present[name][index]:
                continue
            config, where = self.configs[name], f"record {index} ({name})"
            if config.kind == "audio":
                value = read_sound(value, config.sampling_rate, where)
            elif name in self.rows:
                value = self.cut(value, self.rows[name][index], self.text_lengths[name])
            else:
                frames = Frames(value, where)
                value = frames[0] if config.kind == "image" else frames.clip(0, config.clip_length)
            content[name] = value
        return content

    def cut(self, text: str, ids: list[int], longest: int) -> str:
        """A text, or of a longer one as much as `longest` ids hold; a cut inside a character loses it."""
        kept = min(longest, len(ids))
        while len(ids) > longest:
            text = self.tokenizer.decode(ids[:kept]).rstrip("\ufffd")
            kept -= 1
            if len(text_ids(self.tokenizer, text)) <= longest:
                break
        return text

    def sound(self, value: np.ndarray, name: str) -> torch.Tensor:
        """Features of a sound of the stream `name`: they cost more than all else of a record, and sources that are mixed repeat
        their sounds, so each sound's are computed once while they fit."""
        key = name, hashlib.sha256(value.tobytes()).digest()
        found = self.features.get(key)
        if found is None:
            found = self.processors[name](value)["input_features"][0]
            if (len(self.features) + 1) * found.nbytes <= KEPT_SOUNDS:
                self.features[key] = found
        return found

    def __getitem__(self, index: int) -> dict[str, dict[str, torch.Tensor]]:
        content, streams = self.content(index), {}
        for name, config in self.configs.items():
            value = content.get(name)
            if config.has_tokens:
                rows = [[] if value is None else self.rows[name][index]]
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
                pixels = (
                    self.processors[name](frames)["pixel_values"] if frames else torch.zeros(shape)
                )
                streams[name] = pixels[0] if config.kind == "image" else pixels.transpose(0, 1)
        present = {name: torch.tensor(name in content) for name in self.configs}
        if not content:
            raise ValueError(f"record {index} is empty; remove it.")
        return {"streams": streams, "present": present}


class StreamSampler(torch.utils.data.Sampler):
    """Indices in an order in which the records of a batch have the same streams, so that no other is computed for it.

    What does not fill a batch of its kind is mixed into batches with the rest of the other kinds, so every record is shown. Epoch and
    `seed` decide the order, alike on all processes.
    """

    def __init__(self, dataset: OmniDataset, batch_size: int, seed: int):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.kinds = np.unique(
            np.stack(list(dataset.present.values()), 1), axis=0, return_inverse=True
        )[1].reshape(-1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self):
        rng, size = np.random.default_rng((self.seed, self.dataset.epoch)), self.batch_size
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
    rows, found = (
        np.random.default_rng(0).permutation(len(dataset))[:limit],
        {name: [] for name in dataset.configs},
    )
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
        part, latents = codec.streams[name], torch.cat(parts)
        if not hasattr(part, "latent_mean") or not len(latents):
            continue
        if part.latent_mean.ndim == 1:  # of all places alike
            latents = latents.flatten(0, 1)
        part.set_latent_statistics(
            latents.mean(0).to(part.latent_mean), latents.std(0, correction=0).to(part.latent_mean)
        )
