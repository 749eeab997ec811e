"""Pictures or clips and their captions in, batches of `pixel_values` and caption ids out."""

import io
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.codec_video_tokcom import encode_clips
from tokcom.processing_tokcom import TokComImageProcessor, text_ids, vocabulary_size
from tokcom.training.checkpoints import first_line
from tokcom.training.config import DataConfig
from tokcom.training.data import FILMS, load_documents


def open_image(value: Any, name: str = "a record") -> Image.Image:
    """A picture as datasets give it: PIL, encoded bytes, or a dictionary with `bytes` or `path`; `ValueError` with the `name` of the
    record if it cannot be read."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray)):
        value = io.BytesIO(value)
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        image.load()
        return image
    except (OSError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"{name} holds no picture that can be read ({error}); repair or remove it."
        ) from error


def read_film(value: Any, name: str) -> list[Image.Image]:
    """All frames of an mp4, webm, mov, avi or mkv file or of its bytes; needs PyAV. `ValueError` if there are none."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"{name} is a film, which needs PyAV to be read: pip install av"
        ) from error
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    try:
        with av.open(
            io.BytesIO(value) if isinstance(value, (bytes, bytearray)) else str(value)
        ) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(
            f"{name} holds no film that can be read ({error}); repair or remove it."
        ) from error
    if not frames:
        raise ValueError(f"{name} holds a film without frames; remove it.")
    return frames


class Frames:
    """The frames of a picture, an animated picture, a film, or a list of pictures, decoded when they are asked for.

    Raises `ValueError` with the `name` of the record if it cannot be read.
    """

    def __init__(self, value: Any, name: str = "a record"):
        self.name, self.source = name, value
        if not isinstance(value, (list, tuple)):
            self.source = read_film(value, name) if is_film(value) else open_image(value, name)
        elif not value:
            raise ValueError(f"{name} has no frames; remove it.")

    def __len__(self) -> int:
        return (
            len(self.source)
            if isinstance(self.source, (list, tuple))
            else getattr(self.source, "n_frames", 1)
        )

    def __getitem__(self, index: int) -> Image.Image:
        if isinstance(self.source, (list, tuple)):
            return open_image(self.source[index], self.name)
        try:
            if len(self) > 1:
                self.source.seek(index)
            return self.source.copy()
        except (OSError, EOFError) as error:
            raise ValueError(
                f"{self.name}: frame {index} cannot be read ({error}); repair or remove it."
            ) from error

    def clip(self, start: int, count: int) -> list[Image.Image]:
        """`count` frames from `start` on; where they end the last one stays."""
        return [self[min(start + i, len(self) - 1)] for i in range(count)]


def is_film(value: Any) -> bool:
    """Whether a record is a film, by the name of its file or by its first bytes."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray)):
        return value[4:8] == b"ftyp" or value[:4] == b"\x1a\x45\xdf\xa3" or value[8:11] == b"AVI"
    return isinstance(value, (str, Path)) and Path(value).suffix.lower() in FILMS


class ImageDataset(torch.utils.data.Dataset):
    """One picture or clip and the ids of its caption; of a longer film another part in every epoch.

    Args:
        records: rows with `image_column`, and `caption_column` if there is a tokenizer.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the captions, which are padded to the longest.

    `fit` says for which codec.
    """

    def __init__(
        self,
        records: datasets.Dataset,
        image_column: str,
        caption_column: str,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        training: bool,
    ):
        self.records, self.image_column, self.processor = (
            records,
            image_column,
            TokComImageProcessor(),
        )
        self.seed, self.training, self.epoch, self.captions = seed, training, 0, None
        self.clip_length, self.autoencoder = None, None
        if tokenizer is not None:
            rows = [
                row or ""
                for row in tqdm(records[caption_column], desc="reading captions", unit="caption")
            ]
            self.captions = pad_captions(text_ids(tokenizer, rows), vocabulary_size(tokenizer))

    def fit(self, codec_config, autoencoder=None) -> "ImageDataset":
        """Give pictures, or clips, of the size that a codec sees from now on; clips as the latents of a frozen `autoencoder` of
        diffusers, if there is one."""
        self.processor, self.autoencoder = (
            TokComImageProcessor(codec_config.image_size),
            autoencoder,
        )
        self.clip_length = codec_config.clip_length if codec_config.modality == "video" else None
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def frames(self, index: int) -> Frames:
        """All frames of a record."""
        return Frames(
            self.records[index][self.image_column], f"record {index} ({self.image_column})"
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        frames = self.frames(index)
        start = 0
        if len(frames) > (self.clip_length or 1):
            words = (self.seed, self.epoch if self.training else 0, index)
            start = int(
                np.random.default_rng(words).integers(len(frames) + 1 - (self.clip_length or 1))
            )
        pixels = self.processor(frames.clip(start, self.clip_length or 1))[
            "pixel_values"
        ]  # (F, 3, H, W)
        item = {"pixel_values": pixels[0] if self.clip_length is None else pixels.transpose(0, 1)}
        if self.autoencoder is not None:
            item["pixel_values"] = encode_clips(self.autoencoder, item["pixel_values"][None])[0]
        if self.captions is not None:
            item |= {name: value[index] for name, value in self.captions.items()}
        return item


def read_pictures(
    source: str,
    codec_config,
    image_column: str = "image",
    caption_column: str = "caption",
    limit: int | None = None,
    seed: int = 0,
    autoencoder: torch.nn.Module | None = None,
) -> ImageDataset:
    """The first `limit` pictures of a source, for a codec, clips of an `autoencoder` as its latents; their captions, if there are any, are a column of `.records`.

    Raises `ValueError` if the source has no pictures in `image_column`.
    """
    config = DataConfig(train=source, image_column=image_column, caption_column=caption_column)
    records = load_documents(source, config, "train")
    if image_column not in records.column_names:
        raise ValueError(
            f"{source} has no pictures in the field {image_column!r}; name the field that holds them."
        )
    records = records if limit is None else records.select(range(min(limit, len(records))))
    return ImageDataset(records, image_column, caption_column, None, seed, training=False).fit(
        codec_config, autoencoder
    )


def load_autoencoder(name: str) -> torch.nn.Module:
    """A frozen `AutoencoderKL*` or `AutoencoderTiny` of diffusers, of which `name` is the directory or the Hub id."""
    try:
        return diffusers.AutoModel.from_pretrained(name).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} holds no autoencoder of diffusers ({first_line(error)})."
        ) from error


def check_autoencoder(autoencoder: torch.nn.Module, codec_config) -> None:
    """Raise `ValueError` unless its latents are of the shape that a video codec reads."""
    height, width = codec_config.image_size
    found = tuple(
        encode_clips(autoencoder, torch.zeros(1, 3, codec_config.clip_length, height, width)).shape[
            1:
        ]
    )
    wanted = (
        codec_config.num_channels,
        codec_config.num_frames,
        codec_config.height,
        codec_config.width,
    )
    if found != wanted:
        raise ValueError(
            f"the autoencoder turns {codec_config.clip_length} frames of {height} x {width} pixels into latents of shape {found}, but "
            f"the codec reads {wanted}; set num_channels, num_frames, height, width, spatial_compression and "
            "temporal_compression of model.codec_config to what it makes."
        )


def pad_captions(rows: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of ids -> `input_ids (B, L)` and `attention_mask (B, L)`, padded on the right."""
    length = max([1, *map(len, rows)])
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], attention_mask[i, : len(row)] = (
            torch.tensor(row, dtype=torch.long),
            1,
        )
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def encode_all(
    model, dataset, rows: np.ndarray | None = None, batch_size: int = 256
) -> torch.Tensor:
    """Standardised latents `(M, N, C)` of the pictures of a dataset, in its order, or of those at `rows (M,)`."""
    rows, parts = np.arange(len(dataset)) if rows is None else rows, []
    for start in tqdm(range(0, len(rows), batch_size), desc="encoding pictures", unit="batch"):
        pixels = [dataset[int(i)]["pixel_values"] for i in rows[start : start + batch_size]]
        parts.append(
            model.encode(pixel_values=torch.stack(pixels).to(model.device)).latents.float().cpu()
        )
    return torch.cat(parts)


@torch.no_grad()
def measure_image_statistics(model, dataset: ImageDataset, limit: int = 8192) -> None:
    """Set the codec's mean and standard deviation of every token and channel from up to `limit` pictures."""
    codec = model.codec.eval()
    codec.set_latent_statistics(
        torch.zeros_like(codec.latent_mean), torch.ones_like(codec.latent_std)
    )
    rows = np.random.default_rng(0).permutation(len(dataset))[:limit]
    latents = encode_all(model, dataset, rows).to(codec.latent_mean.device)
    codec.set_latent_statistics(latents.mean(0), latents.std(0))


def picture_grid(rows: list[list[Image.Image]], scale: int = 1, gap: int = 2) -> Image.Image:
    """Rows of pictures of one size as one, on white; each `scale` times as large."""
    width, height = (scale * side for side in rows[0][0].size)
    longest = max(map(len, rows))
    grid = Image.new(
        "RGB", (longest * (width + gap) - gap, len(rows) * (height + gap) - gap), "white"
    )
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(
                image.resize((width, height), Image.Resampling.NEAREST),
                (x * (width + gap), y * (height + gap)),
            )
    return grid
