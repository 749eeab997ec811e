"""Pictures or clips and their captions in, batches of `pixel_values` and caption ids out."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
import xxhash
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.codec_video_tokcom import encode_clips
from tokcom.pictures_tokcom import Frames
from tokcom.processing_tokcom import TokComImageProcessor, text_ids, vocabulary_size
from tokcom.training.audit import cache_folder, records_digest
from tokcom.training.checkpoints import first_line
from tokcom.training.config import DataConfig
from tokcom.training.sources import load_documents

CLIPS = 2  # version of what the cache holds
LONGEST_NAME = 200  # characters of the path of a record in a message
# of the pixels that a dataset keeps, so that small ones are decoded once
PREPARED_BYTES = 512 * 2**20


class ImageDataset(torch.utils.data.Dataset):
    """One picture or clip and the ids of its caption; of a longer film another part, and of
    several captions another one, in every epoch.

    Args:
        records: rows with `image_column`, and `caption_column` if there is a tokenizer: a
            caption or a list of them.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the captions, which are padded to
            the longest.

    `fit` says for which codec. `facts` has what was found while the last item was made.
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
        self.records = records
        self.image_column = image_column
        self.processor = TokComImageProcessor()
        self.seed = seed
        self.training = training
        self.epoch = 0
        self.captions = None
        self.clip_length = None
        self.autoencoder = None
        # of the animations that were decoded, the picture at each step
        self.steps: dict[int, list[int]] = {}
        # frames of every record, once all have been decoded
        self.frame_counts: list[float] | None = None
        # of the clips of all records, once they have been encoded
        self.latents: np.ndarray | None = None
        self.flip = 0.0
        self.shift = 0
        self.prepared: dict[int, tuple[torch.Tensor, dict[str, float]]] = {}  # see `_clip`
        self.prepared_bytes = 0
        self.facts: dict[str, float] = {}
        self.caption_column = None if tokenizer is None else caption_column
        if tokenizer is not None:
            rows = tqdm(records[caption_column], desc="reading captions", unit="caption")
            texts = [captions_of(row) or [""] for row in rows]
            flat = [text for row in texts for text in row]
            self.first_caption = np.cumsum([0, *map(len, texts)])  # of every record, and the end
            self.captioned = np.array([any(text.strip() for text in row) for row in texts])
            self.captions = pad_captions(text_ids(tokenizer, flat), vocabulary_size(tokenizer))
            # characters of the captions, of which the tokenizer keeps a list
            self.letters = set().union(*flat)

    def fit(self, codec_config, autoencoder=None) -> "ImageDataset":
        """Give pictures, or clips, of the size that a codec sees from now on; clips as the
        latents of a frozen `autoencoder` of diffusers, if there is one."""
        self.processor = TokComImageProcessor(codec_config.image_size)
        self.autoencoder = autoencoder
        self.clip_length = codec_config.clip_length
        self.latents = None
        # augmenting belongs to a stage, and every stage asks for it anew
        self.flip = 0.0
        self.shift = 0
        self.forget()
        return self

    def augment(self, flip: float, shift: int) -> None:
        """From now on mirror a share `flip` of the training rows, and move each by up to `shift`
        pixels, in every epoch anew.

        Raises `ValueError` for a share that is none, and for clips of an autoencoder, which are
        encoded once.
        """
        if not 0 <= flip <= 1 or shift < 0:
            raise ValueError(
                f"`flip` ({flip}) must be a share in [0, 1], and `shift` ({shift}) not negative."
            )
        if (flip or shift) and self.autoencoder is not None:
            raise ValueError(
                f"clips of an autoencoder are encoded once; set flip ({flip}) and shift ({shift}) "
                "to 0."
            )
        self.flip = flip
        self.shift = shift

    def forget(self) -> None:
        """Read pictures from their records again."""
        self.prepared = {}
        self.prepared_bytes = 0

    @torch.no_grad()
    def encode_once(self, device: torch.device, batch_size: int = 16) -> None:
        """Encode with the autoencoder, in batches on `device`, into a file of the cache of
        `datasets`: each film as the clips that follow each other in it, and the one that ends
        it. Which of them is shown is drawn in every epoch."""
        if self.frame_counts is None:
            self.frame_counts = [len(self.frames(index)) for index in range(len(self))]
        starts = [clip_starts(int(count), self.clip_length) for count in self.frame_counts]
        self.first_clip = np.cumsum([0, *map(len, starts)])  # of every record, and the end
        setting = self.clip_length, self.processor._size, autoencoder_digest(self.autoencoder)
        file = cache_folder() / f"latents-{records_digest(self.records, (CLIPS, setting))}.npy"
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                self._encode(starts, file.with_suffix(".tmp"), device, batch_size)
                file.with_suffix(".tmp").rename(file)
        # mapped: workers share the pages, and a data set may be larger than memory
        self.latents = np.load(file, mmap_mode="r")

    def _encode(
        self, starts: list[list[int]], file: Path, device: torch.device, batch_size: int
    ) -> None:
        home = next(self.autoencoder.parameters()).device
        self.autoencoder.to(device)
        written = None
        done = 0
        clips: list[torch.Tensor] = []
        for index in tqdm(range(len(self)), desc="encoding clips", unit="film"):
            frames = self.frames(index)
            clips += [self._pixels(frames, start) for start in starts[index]]
            # clips of several films share a batch; the last film empties the list
            while len(clips) >= batch_size or (clips and index + 1 == len(self)):
                latents = encode_clips(self.autoencoder, torch.stack(clips[:batch_size]))
                clips = clips[batch_size:]
                if written is None:
                    shape = int(self.first_clip[-1]), *latents.shape[1:]
                    # the shape of its latents is known once the autoencoder has made the first
                    written = np.lib.format.open_memmap(file, "w+", np.float32, shape)
                written[done : done + len(latents)] = latents.cpu().numpy()
                done += len(latents)
        written.flush()
        self.autoencoder.to(home)

    def select(self, rows: list[int]) -> "ImageDataset":
        """Only these records from now on, in this order."""
        self.records = self.records.select(rows)
        self.steps = {}
        self.forget()
        self.frame_counts = None
        if self.captions is not None:
            # a record may have several captions
            places = [np.arange(self.first_caption[i], self.first_caption[i + 1]) for i in rows]
            kept = np.concatenate(places)
            self.captions = {name: value[kept] for name, value in self.captions.items()}
            self.first_caption = np.cumsum([0, *map(len, places)])
            self.captioned = self.captioned[rows]
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def frames(self, index: int) -> Frames:
        """All frames of a record."""
        value = self.records[index][self.image_column]
        name = record_name(self.records, index, self.image_column, value)
        frames = Frames(value, name, self.steps.get(index))
        if isinstance(frames.source, Image.Image) and len(frames) > 1:
            self.steps[index] = frames.steps  # all frames are decoded to know them
        return frames

    def describe(self, index: int) -> str:
        """A record in words."""
        record = self.records[index]
        name = record_name(self.records, index, self.image_column, record[self.image_column])
        if self.caption_column is None:
            return name
        return f"{name}: {captions_of(record[self.caption_column])}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.latents is not None:
            first, end = self.first_clip[index : index + 2]
            place = first + self._draw(index, int(end - first))
            # a copy, because the mapped file cannot be written and torch warns of that
            pixels = torch.from_numpy(self.latents[place].copy())
        else:
            pixels, self.facts = self._clip(index)
            if self.autoencoder is not None:
                pixels = encode_clips(self.autoencoder, pixels[None])[0]
            elif self.training and (self.flip or self.shift):
                pixels = self._moved(pixels, index)
        item = {"pixel_values": pixels}
        if self.captions is not None:
            place = self._caption(index, self.epoch if self.training else 0)
            item |= {name: value[place] for name, value in self.captions.items()}
        return item

    def _moved(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        """Pixels `(..., H, W)` as this epoch mirrors and moves them; what comes into view repeats
        the border."""
        # the 3 keeps these draws apart from those of the frame (none) and of the caption (2)
        generator = np.random.default_rng((self.seed, self.epoch, index, 3))
        if generator.random() < self.flip:
            pixels = pixels.flip(-1)
        if not self.shift:
            return pixels
        # `shift` is no movement, 0 and twice as much are the farthest to either side
        y, x = (int(place) for place in generator.integers(2 * self.shift + 1, size=2))
        height, width = pixels.shape[-2:]
        flat = pixels.reshape(1, -1, height, width)  # (1, channels x frames, H, W)
        padded = torch.nn.functional.pad(flat, [self.shift] * 4, mode="replicate")
        return padded[..., y : y + height, x : x + width].reshape(pixels.shape).clone()

    def _clip(self, index: int) -> tuple[torch.Tensor, dict[str, float]]:
        """What `_read_clip` gives; rows that are the same in every epoch are kept, up to
        `PREPARED_BYTES` of them."""
        if index in self.prepared:
            pixels, facts = self.prepared[index]
            # callers may write into what they get
            return pixels.clone(), facts
        pixels, facts = self._read_clip(index)
        # of others each epoch shows another part
        same_always = not facts.get("longer than a clip") and not facts.get("animated")
        if same_always and self.prepared_bytes + pixels.nbytes <= PREPARED_BYTES:
            self.prepared[index] = pixels.clone(), facts
            self.prepared_bytes += pixels.nbytes
        return pixels, facts

    def _read_clip(self, index: int) -> tuple[torch.Tensor, dict[str, float]]:
        """A picture `(3, H, W)`, or a clip `(3, F, H, W)`, of a record in this epoch, and what was
        found."""
        frames = self.frames(index)
        length = self.clip_length or 1
        # frames at which a clip can begin; in a film that is too short only the first
        start = self._draw(index, max(1, len(frames) + 1 - length))
        pixels = self._pixels(frames, start)
        return pixels, self._facts(frames, frames[start], index)

    def _draw(self, index: int, count: int) -> int:
        """One of `count` parts of a record, another one in every epoch of training."""
        if count == 1:
            return 0
        generator = np.random.default_rng((self.seed, self.epoch if self.training else 0, index))
        return int(generator.integers(count))

    def _pixels(self, frames: Frames, start: int) -> torch.Tensor:
        """A picture `(3, H, W)`, or a clip `(3, F, H, W)`, from a frame on."""
        try:
            pixels = self.processor(frames.clip(start, self.clip_length or 1))["pixel_values"]
        except ValueError as error:
            if frames.name in str(error):
                raise
            raise ValueError(f"{frames.name}: {error}") from error
        return pixels[0] if self.clip_length is None else pixels.transpose(0, 1)

    def _caption(self, index: int, epoch: int) -> int:
        """The place of the caption of a record: of several one is drawn in every epoch, and the
        first is held out."""
        first, end = self.first_caption[index : index + 2]
        if end - first == 1 or not self.training:
            return int(first)
        return int(
            first + np.random.default_rng((self.seed, epoch, index, 2)).integers(end - first)
        )

    def _facts(self, frames: Frames, image: Image.Image, index: int) -> dict[str, float]:
        height, width = self.processor._size
        facts = {
            # the shorter side fits, and what is too much of the longer one is cut off
            "resized": min(image.height / height, image.width / width) != 1,
            "with sides cut off": image.height * width != image.width * height,
        }
        if self.captions is not None:
            facts["with a caption"] = bool(self.captioned[index])
        if self.clip_length is not None:
            facts["longer than a clip"] = len(frames) > self.clip_length
            facts["padded with their last frame"] = len(frames) < self.clip_length
            facts["frames"] = len(frames)
        elif len(frames) > 1:
            facts["animated"] = True
        return facts | {"width": image.width, "height": image.height}


def clip_starts(count: int, length: int) -> list[int]:
    """Where clips of `length` begin that follow each other in a film of `count` frames, the last
    one at its end."""
    if count <= length:
        return [0]
    # a set, since the last one may be among those that follow each other
    return sorted({*range(0, count - length + 1, length), count - length})


def row_number(records: datasets.Dataset, index: int) -> int:
    """The number that a record has in its source, where it may have another place: held-out
    records are drawn."""
    # `datasets` has no public way to ask which rows a selection is of
    indices = records._indices
    return index if indices is None else indices.column(0)[index].as_py()


def record_name(records: datasets.Dataset, index: int, column: str, value: Any) -> str:
    """A record as messages name it, with its file if it has one."""
    index = row_number(records, index)
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        return f"record {index} ({column})"
    return f"record {index} ({column}, {path[:LONGEST_NAME]})"


def captions_of(row: str | list[str] | None) -> list[str]:
    """The captions of a record, whether it has none, one or several."""
    rows = row if isinstance(row, list) else [row]
    return [text for text in rows if text]


def first_captions(records: Any, source: str) -> list[str]:
    """The first caption of each record of `read_pictures`, or an empty one; raises `ValueError` if
    the source has none at all."""
    if "caption" not in records.column_names:
        raise ValueError(
            f"{source} has no captions but {sorted(records.column_names)}; name their column "
            "`caption`."
        )
    return [(captions_of(row) or [""])[0] for row in records["caption"]]


def read_pictures(
    source: str,
    codec_config,
    image_column: str = "image",
    caption_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    autoencoder: torch.nn.Module | None = None,
) -> ImageDataset:
    """The first `limit` pictures of a source, for a codec, clips of an `autoencoder` as its
    latents; their captions, if there are any, are the column `caption` of `.records`, or
    `caption_column`.

    Raises `ValueError` if the source has no pictures in `image_column`.
    """
    config = DataConfig(train=source, image_column=image_column, caption_column=caption_column)
    records = load_documents(source, config, "train")
    if image_column not in records.column_names:
        raise ValueError(
            f"{source} has no pictures in the field {image_column!r}; name the field that holds "
            "them."
        )
    records = records if limit is None else records.select(range(min(limit, len(records))))
    # no tokenizer: whoever evaluates wants captions as texts
    return ImageDataset(records, image_column, config.captions, None, seed, training=False).fit(
        codec_config, autoencoder
    )


def load_autoencoder(name: str) -> torch.nn.Module:
    """A frozen `AutoencoderKL*` or `AutoencoderTiny` of diffusers, of which `name` is the
    directory or the Hub id."""
    try:
        return diffusers.AutoModel.from_pretrained(name).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} holds no autoencoder of diffusers ({first_line(error)})."
        ) from error


def autoencoder_digest(autoencoder: torch.nn.Module) -> str:
    """A digest of the configuration and of the weights."""
    config = sorted(
        (name, value) for name, value in autoencoder.config.items() if not name.startswith("_")
    )
    digest = xxhash.xxh3_128(repr(config).encode())
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def check_autoencoder(autoencoder: torch.nn.Module | None, codec_config) -> None:
    """Raise `ValueError` unless its latents, or without one pixels, are what a codec reads."""
    if autoencoder is None:
        if not codec_config.reads_pixels:
            raise ValueError(
                f"the codec reads clips of {codec_config.num_channels} channels, the latents of an "
                "autoencoder; give its directory as `autoencoder`, or set "
                "model.codec_config.num_channels=3 and spatial_compression=1 for pixels."
            )
        return
    if codec_config.clip_length is None:
        raise ValueError(
            f"`autoencoder` is for clips, not for the codec {codec_config.model_type!r}; remove it."
        )
    height, width = codec_config.image_size
    # shapes alone are compared, so a black clip will do
    clip = torch.zeros(1, 3, codec_config.clip_length, height, width)
    found = tuple(encode_clips(autoencoder, clip).shape[1:])  # (c, F, H, W)
    wanted = (
        codec_config.num_channels,
        codec_config.num_frames,
        codec_config.height,
        codec_config.width,
    )
    if found != wanted:
        raise ValueError(
            f"the autoencoder turns {codec_config.clip_length} frames of {height} x {width} pixels "
            f"into latents of shape {found}, but the codec reads {wanted}; set num_channels, "
            "num_frames, height, width, spatial_compression and temporal_compression of "
            "model.codec_config to what it makes."
        )


def pad_captions(rows: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of ids -> `input_ids (B, L)` and `attention_mask (B, L)`, padded on the right."""
    length = max([1, *map(len, rows)])
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def device_of(model) -> torch.device:
    """Where a model's codec computes. Other parameters are on `meta` until they are sharded, but a
    codec that works by then has none, only buffers."""
    tensors = chain(model.codec.parameters(), model.codec.buffers())
    return next(tensors, torch.empty(0)).device


@torch.no_grad()
def encode_parts(model, dataset, rows: np.ndarray, batch_size: int = 256) -> Iterator[torch.Tensor]:
    """Standardised latents `(batch_size, N, C)` of the pictures of a dataset at `rows (M,)`, part
    after part."""
    device = device_of(model)
    for start in tqdm(range(0, len(rows), batch_size), desc="encoding pictures", unit="batch"):
        pixels = [dataset[int(i)]["pixel_values"] for i in rows[start : start + batch_size]]
        yield model.encode(pixel_values=torch.stack(pixels).to(device)).latents.float().cpu()


def encode_all(model, dataset, rows: np.ndarray | None = None) -> torch.Tensor:
    """Standardised latents `(M, N, C)` of the pictures of a dataset, in its order, or of those at
    `rows (M,)`."""
    rows = np.arange(len(dataset)) if rows is None else rows
    return torch.cat(list(encode_parts(model, dataset, rows)))


class FiledLatents:
    """The latents of `encode_all` in a file, read part after part, again and again: only a part is
    in memory."""

    def __init__(self, file: Path, model, dataset, rows: np.ndarray):
        self.file = file
        self.shapes = []
        with file.open("wb") as stream:
            for part in encode_parts(model, dataset, rows):
                self.shapes.append(part.shape)
                stream.write(part.numpy().tobytes())

    def __iter__(self) -> Iterator[torch.Tensor]:
        with self.file.open("rb") as stream:
            for shape in self.shapes:
                values = np.fromfile(stream, np.float32, shape.numel())
                yield torch.from_numpy(values).view(shape)


@torch.no_grad()
def measure_image_statistics(model, dataset: ImageDataset, limit: int = 8192) -> None:
    """Set the codec's mean and standard deviation of every token and channel from up to `limit`
    pictures."""
    codec = model.codec.eval()
    # with mean 0 and deviation 1 `encode` returns raw latents
    codec.set_latent_statistics(
        torch.zeros_like(codec.latent_mean), torch.ones_like(codec.latent_std)
    )
    # at random, since folders come class by class
    rows = np.random.default_rng(0).permutation(len(dataset))[:limit]
    latents = encode_all(model, dataset, rows).to(codec.latent_mean.device)  # (rows, N, C)
    # over pictures, so every place has statistics of its own, (N, C)
    # one picture has a deviation of 0, not of NaN
    codec.set_latent_statistics(latents.mean(0), latents.std(0, correction=0))


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
