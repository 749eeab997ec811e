"""Pictures or clips and their captions in, batches of `pixel_values` and caption ids out."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
import xxhash
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.codec_video_tokcom import encode_clips
from tokcom.processing_tokcom import TokComImageProcessor, text_ids, vocabulary_size
from tokcom.training.audit import cache_folder, records_digest
from tokcom.training.checkpoints import first_line
from tokcom.training.config import DataConfig
from tokcom.training.films import HEAD, Film, is_film, stored, timeline
from tokcom.training.sources import load_documents

PREPARED_BYTES = (
    512 * 2**20
)  # of the pixels that a dataset keeps, so that small ones are decoded once


def open_image(value: Any, name: str = "a record") -> Image.Image:
    """A picture as datasets give it: PIL, encoded bytes, or a dictionary with `bytes` or `path`; turned as its camera was held.

    Raises `ValueError` with the `name` of the record if it cannot be read, EXIF included.
    """
    value = stored(value)
    try:
        image = value if isinstance(value, Image.Image) else _opened(value)
        image.load()
        return image
    except Exception as error:  # decoders raise nearly anything for a broken file
        raise ValueError(
            f"{name} holds no picture that can be read ({_reason(error, value)}); repair or remove it."
        ) from error


def _opened(value: Any) -> Image.Image:
    if isinstance(value, bytes) and not value:
        raise ValueError("it is empty")
    try:
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    except UnidentifiedImageError:
        if is_film(value):
            raise ValueError("it is a film") from None
        if not _register_heif():
            raise
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if image.info.get("exif"):
        Image.Exif().load(
            image.info["exif"]
        )  # how the camera was held is not known of a broken one
    return image


def _register_heif() -> bool:
    """Let Pillow read HEIC with pillow-heif, if that is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _reason(error: Exception, value: Any) -> str:
    """What is wrong with a picture, without the address of the buffer that Pillow names."""
    if isinstance(error, UnidentifiedImageError):
        start = value[:HEAD] if isinstance(value, bytes) else b""
        if isinstance(value, (str, Path)):
            with open(value, "rb") as stream:
                start = stream.read(HEAD)
        if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif"):
            return "HEIC, which needs pillow-heif: pip install pillow-heif"
        return f"its first bytes are {start!r}" if start else "it is empty"
    return first_line(error)


class Frames:
    """The frames of a picture, an animated picture, a film, or a list of pictures, decoded when they are asked for.

    A frame that is shown longer than others is there several times: `steps`, if they are known. Raises `ValueError` with the `name` of the record if it cannot
    be read.
    """

    def __init__(self, value: Any, name: str = "a record", steps: list[int] | None = None):
        self.name = name
        self.source = value
        self.steps: list[int] = []  # of an animation, the picture at each step
        if value is None:
            raise ValueError(f"{name} holds nothing; remove it.")
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError(f"{name} has no frames; remove it.")
            self.steps = list(range(len(value)))
            return
        if is_film(value):
            self.source = Film(value, name)
            self.steps = list(range(len(self.source)))
            return
        self.source = open_image(value, name)
        try:
            self.steps = steps or timeline(self.source)
        except Exception as error:
            raise ValueError(
                f"{name} has a frame that cannot be read ({first_line(error)}); repair or remove it."
            ) from error

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Image.Image:
        step = self.steps[index]
        if isinstance(self.source, Film):
            return self.source.clip(step, 1)[0]
        if isinstance(self.source, (list, tuple)):
            return _upright(open_image(self.source[step], f"{self.name}, frame {step}"), self.name)
        try:
            if len(self) > 1:
                self.source.seek(step)
            return _upright(self.source.copy(), self.name)
        except (OSError, EOFError) as error:
            raise ValueError(
                f"{self.name}: frame {index} cannot be read ({error}); repair or remove it."
            ) from error

    def clip(self, start: int, count: int) -> list[Image.Image]:
        """`count` frames from `start` on; where they end the last one stays."""
        if isinstance(self.source, Film):
            frames = self.source.clip(start, count)
            return frames + [frames[-1]] * (count - len(frames))
        return [self[min(start + i, len(self) - 1)] for i in range(count)]


def _upright(image: Image.Image, name: str) -> Image.Image:
    """A picture turned as its camera was held, with what is transparent in a mode that has alpha."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a broken EXIF makes Pillow raise
        raise ValueError(
            f"{name} has an EXIF block that cannot be read ({first_line(error)}); save it without."
        ) from error
    key = image.info.get("transparency")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        return image.convert(image.mode.upper())
    if key is not None and image.mode in ("1", "L", "RGB"):
        return image.convert("RGBA")
    if isinstance(key, int) and image.mode.startswith("I;16"):
        levels = np.asarray(image)
        alpha = np.where(levels == key, 0, 255).astype(np.uint8)
        return Image.fromarray(np.stack([(levels >> 8).astype(np.uint8), alpha], 2), "LA")
    return image


class ImageDataset(torch.utils.data.Dataset):
    """One picture or clip and the ids of its caption; of a longer film another part, and of several captions another one, in every
    epoch.

    Args:
        records: rows with `image_column`, and `caption_column` if there is a tokenizer: a caption or a list of them.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the captions, which are padded to the longest.

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
        self.records, self.image_column, self.processor = (
            records,
            image_column,
            TokComImageProcessor(),
        )
        self.seed = seed
        self.training = training
        self.epoch = 0
        self.captions = None
        self.clip_length = None
        self.autoencoder = None
        self.steps: dict[
            int, list[int]
        ] = {}  # of the animations that were decoded, the picture at each step
        self.frame_counts: list[float] | None = (
            None  # frames of every record, once all have been decoded
        )
        self.latents: np.ndarray | None = (
            None  # of the records that give the same clip in every epoch
        )
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
            self.letters = set().union(*flat)

    def fit(self, codec_config, autoencoder=None) -> "ImageDataset":
        """Give pictures, or clips, of the size that a codec sees from now on; clips as the latents of a frozen `autoencoder` of
        diffusers, if there is one."""
        self.processor = TokComImageProcessor(codec_config.image_size)
        self.autoencoder = autoencoder
        self.clip_length = codec_config.clip_length if codec_config.modality == "video" else None
        self.latents = None
        self.flip = 0.0
        self.shift = 0
        self.forget()
        return self

    def augment(self, flip: float, shift: int) -> None:
        """From now on mirror a share `flip` of the training rows, and move each by up to `shift` pixels, in every epoch anew.

        Raises `ValueError` for a share that is none, and for clips of an autoencoder, which are encoded once.
        """
        if not 0 <= flip <= 1 or shift < 0:
            raise ValueError(
                f"`flip` ({flip}) must be a share in [0, 1], and `shift` ({shift}) not negative."
            )
        if (flip or shift) and self.autoencoder is not None:
            raise ValueError(
                f"clips of an autoencoder are encoded once; set flip ({flip}) and shift ({shift}) to 0."
            )
        self.flip = flip
        self.shift = shift

    def forget(self) -> None:
        """Read pictures from their records again."""
        self.prepared = {}
        self.prepared_bytes = 0

    @torch.no_grad()
    def encode_once(self, device: torch.device, batch_size: int = 16) -> None:
        """Encode with the autoencoder all clips that are the same in every epoch, those of films that are no longer than a clip, in
        batches on `device`, into a file of the cache of `datasets`. Other films are encoded when they are drawn."""
        if self.frame_counts is None:
            self.frame_counts = [len(self.frames(index)) for index in range(len(self))]
        rows = [
            index for index, length in enumerate(self.frame_counts) if length <= self.clip_length
        ]
        if not rows:
            return
        setting = rows, self.clip_length, self.processor._size, autoencoder_digest(self.autoencoder)
        file = cache_folder() / f"latents-{records_digest(self.records, setting)}.npy"
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                self._encode(rows, file.with_suffix(".tmp"), device, batch_size)
                file.with_suffix(".tmp").rename(file)
        self.places = dict(zip(rows, range(len(rows))))
        self.latents = np.load(file, mmap_mode="r")

    def _encode(self, rows: list[int], file: Path, device: torch.device, batch_size: int) -> None:
        home = next(self.autoencoder.parameters()).device
        self.autoencoder.to(device)
        written = None
        for start in tqdm(range(0, len(rows), batch_size), desc="encoding clips", unit="batch"):
            clips = [self._clip(index)[0] for index in rows[start : start + batch_size]]
            latents = encode_clips(self.autoencoder, torch.stack(clips)).cpu().numpy()
            if written is None:
                shape = len(rows), *latents.shape[1:]
                written = np.lib.format.open_memmap(file, "w+", np.float32, shape)
            written[start : start + len(latents)] = latents
        written.flush()
        self.autoencoder.to(home)

    def select(self, rows: list[int]) -> "ImageDataset":
        """Only these records from now on, in this order."""
        self.records = self.records.select(rows)
        self.steps = {}
        self.forget()
        self.frame_counts = None
        if self.captions is not None:
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
        frames = Frames(value, record_name(index, self.image_column, value), self.steps.get(index))
        if isinstance(frames.source, Image.Image) and len(frames) > 1:
            self.steps[index] = frames.steps  # all frames are decoded to know them
        return frames

    def describe(self, index: int) -> str:
        """A record in words."""
        record = self.records[index]
        name = record_name(index, self.image_column, record[self.image_column])
        if self.caption_column is None:
            return name
        return f"{name}: {captions_of(record[self.caption_column])}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.latents is not None and index in self.places:
            pixels = torch.from_numpy(self.latents[self.places[index]].copy())
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
        """Pixels `(..., H, W)` as this epoch mirrors and moves them; what comes into view repeats the border."""
        generator = np.random.default_rng((self.seed, self.epoch, index, 3))
        if generator.random() < self.flip:
            pixels = pixels.flip(-1)
        if not self.shift:
            return pixels
        y, x = (int(place) for place in generator.integers(2 * self.shift + 1, size=2))
        height, width = pixels.shape[-2:]
        flat = pixels.reshape(1, -1, height, width)
        padded = torch.nn.functional.pad(flat, [self.shift] * 4, mode="replicate")
        return padded[..., y : y + height, x : x + width].reshape(pixels.shape).clone()

    def _clip(self, index: int) -> tuple[torch.Tensor, dict[str, float]]:
        """What `_read_clip` gives; rows that are the same in every epoch are kept, up to `PREPARED_BYTES` of them."""
        if index in self.prepared:
            pixels, facts = self.prepared[index]
            return pixels.clone(), facts
        pixels, facts = self._read_clip(index)
        same_always = not facts.get("longer than a clip") and not facts.get("animated")
        if same_always and self.prepared_bytes + pixels.nbytes <= PREPARED_BYTES:
            self.prepared[index] = pixels.clone(), facts
            self.prepared_bytes += pixels.nbytes
        return pixels, facts

    def _read_clip(self, index: int) -> tuple[torch.Tensor, dict[str, float]]:
        """A picture `(3, H, W)`, or a clip `(3, F, H, W)`, of a record in this epoch, and what was found."""
        frames = self.frames(index)
        length = self.clip_length or 1
        start = 0
        if len(frames) > length:
            generator = np.random.default_rng(
                (self.seed, self.epoch if self.training else 0, index)
            )
            start = int(generator.integers(len(frames) + 1 - length))
        clip = frames.clip(start, length)
        try:
            pixels = self.processor(clip)["pixel_values"]  # (F, 3, H, W)
        except ValueError as error:
            raise ValueError(f"{frames.name}: {error}") from error
        return pixels[0] if self.clip_length is None else pixels.transpose(0, 1), self._facts(
            frames, clip[0], index
        )

    def _caption(self, index: int, epoch: int) -> int:
        """The place of the caption of a record: of several one is drawn in every epoch, and the first is held out."""
        first, end = self.first_caption[index : index + 2]
        if end - first == 1 or not self.training:
            return int(first)
        return int(
            first + np.random.default_rng((self.seed, epoch, index, 2)).integers(end - first)
        )

    def _facts(self, frames: Frames, image: Image.Image, index: int) -> dict[str, float]:
        height, width = self.processor._size
        facts = {
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


def record_name(index: int, column: str, value: Any) -> str:
    """A record as messages name it, with its file if it has one."""
    path = (
        value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
    )
    return f"record {index} ({column}{f', {path}' if path else ''})"


def captions_of(row: str | list[str] | None) -> list[str]:
    """The captions of a record, whether it has none, one or several."""
    rows = row if isinstance(row, list) else [row]
    return [text for text in rows if text]


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


def autoencoder_digest(autoencoder: torch.nn.Module) -> str:
    """A digest of the configuration and of the weights."""
    config = sorted(
        (name, value) for name, value in autoencoder.config.items() if not name.startswith("_")
    )
    digest = xxhash.xxh3_128(repr(config).encode())
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    return digest.hexdigest()


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
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def encode_parts(model, dataset, rows: np.ndarray, batch_size: int = 256) -> Iterator[torch.Tensor]:
    """Standardised latents `(batch_size, N, C)` of the pictures of a dataset at `rows (M,)`, part after part."""
    for start in tqdm(range(0, len(rows), batch_size), desc="encoding pictures", unit="batch"):
        pixels = [dataset[int(i)]["pixel_values"] for i in rows[start : start + batch_size]]
        yield model.encode(pixel_values=torch.stack(pixels).to(model.device)).latents.float().cpu()


def encode_all(model, dataset, rows: np.ndarray | None = None) -> torch.Tensor:
    """Standardised latents `(M, N, C)` of the pictures of a dataset, in its order, or of those at `rows (M,)`."""
    rows = np.arange(len(dataset)) if rows is None else rows
    return torch.cat(list(encode_parts(model, dataset, rows)))


class FiledLatents:
    """The latents of `encode_all` in a file, read part after part, again and again: only a part is in memory."""

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
