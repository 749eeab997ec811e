"""Pictures and their captions in, batches of `pixel_values` and caption ids out."""

import io
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from image_processing_tokcom import TokComImageProcessor
from training.config import DataConfig
from training.data import load_documents


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
        raise ValueError(f"{name} holds no picture that can be read ({error}); repair or remove it.") from error


class ImageDataset(torch.utils.data.Dataset):
    """One picture and the ids of its caption; of an animated picture one frame, another one in every epoch.

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
        self.records, self.image_column, self.processor = records, image_column, TokComImageProcessor()
        self.seed, self.training, self.epoch, self.captions = seed, training, 0, None
        if tokenizer is not None:
            rows = [row or "" for row in tqdm(records[caption_column], desc="reading captions", unit="caption")]
            ids = tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"]
            self.captions = pad_captions(ids, len(tokenizer))

    def fit(self, codec_config) -> "ImageDataset":
        """Give pictures of the size that a codec sees from now on."""
        self.processor = TokComImageProcessor(codec_config.image_size)
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = open_image(self.records[index][self.image_column], f"record {index} ({self.image_column})")
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            words = (self.seed, self.epoch if self.training else 0, index)
            image.seek(int(np.random.default_rng(words).integers(frames)))
        item = {"pixel_values": self.processor(image)["pixel_values"][0]}
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
) -> ImageDataset:
    """The first `limit` pictures of a source, for a codec; their captions, if there are any, are a column of `.records`.

    Raises `ValueError` if the source has no pictures in `image_column`.
    """
    config = DataConfig(train=source, image_column=image_column, caption_column=caption_column)
    records = load_documents(source, config, "train")
    if image_column not in records.column_names:
        raise ValueError(f"{source} has no pictures in the field {image_column!r}; name the field that holds them.")
    records = records if limit is None else records.select(range(min(limit, len(records))))
    return ImageDataset(records, image_column, caption_column, None, seed, training=False).fit(codec_config)


def pad_captions(rows: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of ids -> `input_ids (B, L)` and `attention_mask (B, L)`, padded on the right."""
    length = max([1, *map(len, rows)])
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], attention_mask[i, : len(row)] = torch.tensor(row, dtype=torch.long), 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def encode_all(model, dataset, rows: np.ndarray | None = None, batch_size: int = 256) -> torch.Tensor:
    """Standardised latents `(M, N, C)` of the pictures of a dataset, in its order, or of those at `rows (M,)`."""
    rows, parts = np.arange(len(dataset)) if rows is None else rows, []
    for start in tqdm(range(0, len(rows), batch_size), desc="encoding pictures", unit="batch"):
        pixels = [dataset[int(i)]["pixel_values"] for i in rows[start : start + batch_size]]
        parts.append(model.encode(pixel_values=torch.stack(pixels).to(model.device)).latents.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def measure_image_statistics(model, dataset: ImageDataset, limit: int = 8192) -> None:
    """Set the codec's mean and standard deviation of every token and channel from up to `limit` pictures."""
    codec = model.codec.eval()
    codec.set_latent_statistics(torch.zeros_like(codec.latent_mean), torch.ones_like(codec.latent_std))
    rows = np.random.default_rng(0).permutation(len(dataset))[:limit]
    latents = encode_all(model, dataset, rows).to(codec.latent_mean.device)
    codec.set_latent_statistics(latents.mean(0), latents.std(0))


def picture_grid(rows: list[list[Image.Image]], scale: int = 1, gap: int = 2) -> Image.Image:
    """Rows of pictures of one size as one, on white; each `scale` times as large."""
    width, height = (scale * side for side in rows[0][0].size)
    longest = max(map(len, rows))
    grid = Image.new("RGB", (longest * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(
                image.resize((width, height), Image.Resampling.NEAREST), (x * (width + gap), y * (height + gap))
            )
    return grid
