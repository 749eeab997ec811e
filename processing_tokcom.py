"""Pictures and sounds as models read them, and back.

Notable choices:
- Pictures follow transformers' convention, `AutoImageProcessor.from_pretrained(...)(images)`. Transparent ones are laid on
  white, and sides are cut off before scaling, so that nothing is stretched; -1 is black and 1 is white.
- Sounds become log-mel features with transformers' analysis. The way back, bands to a spectrum and phases by Griffin and
  Lim 1984, is librosa's, which is only needed to hear something. All sounds are brought to one loudness.
"""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .configuration_codec_tokcom import TokComAudioCodecConfig

FLOOR = 1e-3  # power of a band that counts as silence, at a peak of 1
ITERATIONS = 60


class TokComAudioProcessor:
    """Sounds `(samples,)` in [-1, 1] -> `input_features (B, mel bands, F)`, log10 of the power, and back."""

    def __init__(self, config: TokComAudioCodecConfig):
        self.config = config
        bins, rate = 1 + config.fft_length // 2, config.sampling_rate
        self.filters = mel_filter_bank(
            bins, config.num_channels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
        )
        self.window = window_function(config.fft_length, "hann")

    def __call__(self, sounds: Any, sampling_rate: int | None = None) -> dict[str, torch.Tensor]:
        """One sound or a list of them: arrays, tensors or paths of .wav files; `sampling_rate` is that of arrays.

        Raises `ValueError` for another rate than the codec's, or a sound without samples.
        """
        sounds = list(sounds) if isinstance(sounds, (list, tuple)) else [sounds]
        if not sounds:
            raise ValueError("`audio` is an empty list; give at least one sound.")
        features = [self._features(sound, sampling_rate) for sound in sounds]
        return {"input_features": torch.from_numpy(np.stack(features))}

    def _features(self, sound: Any, rate: int | None) -> np.ndarray:
        config = self.config
        if isinstance(sound, (str, Path)):
            sound, rate = read_wav(sound)
        sound = np.asarray(sound, dtype=np.float32)
        if sound.ndim != 1 or not sound.size or not np.isfinite(sound).all():
            raise ValueError(
                f"a sound must be finite samples (n,) of one channel, not an array of shape {sound.shape}; mix channels first."
            )
        if rate not in (None, config.sampling_rate):
            raise ValueError(
                f"a sound has {rate} samples a second, the model {config.sampling_rate} (`sampling_rate`); resample it, for "
                "example with librosa.resample."
            )
        sound = sound[: config.num_samples]
        sound = sound / max(np.abs(sound).max(), 1e-4)
        sound = np.pad(sound, (0, config.num_samples - len(sound)))
        bands = spectrogram(
            sound,
            self.window,
            config.fft_length,
            config.hop_length,
            power=2.0,
            mel_filters=self.filters,
            mel_floor=FLOOR,
        )
        return np.log10(bands).astype(np.float32)

    def postprocess(self, input_features: torch.Tensor) -> list[np.ndarray]:
        """`input_features (B, mel bands, F)` -> sounds `(samples,)` with a peak of 0.95; needs librosa."""
        try:
            import librosa
        except ImportError as error:
            raise ValueError("to hear log-mel features librosa is needed: pip install librosa") from error
        options = {"hop_length": self.config.hop_length, "win_length": self.config.fft_length, "random_state": 0}
        sounds = []
        for features in input_features.float().cpu().numpy():
            bands = np.maximum(10.0 ** np.minimum(features, 6), FLOOR) - FLOOR
            spectrum = librosa.util.nnls(self.filters.T, bands) ** 0.5  # magnitudes
            sound = librosa.griffinlim(
                spectrum, n_iter=ITERATIONS, n_fft=self.config.fft_length, length=self.config.num_samples, **options
            )
            sounds.append((0.95 * sound / max(np.abs(sound).max(), 1e-4)).astype(np.float32))
        return sounds


def read_wav(file: str | Path) -> tuple[np.ndarray, int]:
    """A .wav file of 16 bits -> samples `(n,)` in [-1, 1], the mean of its channels, and their rate."""
    try:
        with wave.open(str(file)) as stream:
            if stream.getsampwidth() != 2:
                raise ValueError(f"{file} has {8 * stream.getsampwidth()} bits a sample; 16 are read.")
            samples = np.frombuffer(stream.readframes(stream.getnframes()), dtype="<i2")
            return samples.reshape(-1, stream.getnchannels()).mean(1) / 32768, stream.getframerate()
    except (wave.Error, EOFError, OSError) as error:
        raise ValueError(f"{file} is no .wav file that can be read ({error}).") from error


def write_wav(sound: np.ndarray, file: str | Path, sampling_rate: int) -> None:
    """Write samples `(n,)` in [-1, 1] as a .wav file of 16 bits."""
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(sampling_rate)
        stream.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())


class TokComImageProcessor(BaseImageProcessor):
    """Prepare pictures for a TokCom model of images.

    Args:
        image_size (`int` or `list[int]`): pixels of a side of what the model sees, or height and width.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int | list[int] = 64, **kwargs):
        super().__init__(**kwargs)
        self.image_size = image_size
        if min(self._size) < 1:
            raise ValueError(f"`image_size` ({image_size}) must be at least 1 pixel.")

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """One picture or a list of them (PIL, or arrays `(H, W)`, `(H, W, 3)`, `(H, W, 4)` of uint8) -> `pixel_values
        (B, 3, height, width)`, float32 in [-1, 1]."""
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("`images` is an empty list; give at least one picture.")
        pixels = torch.stack([self._prepare(image) for image in images])
        return BatchFeature({"pixel_values": pixels.numpy()}, tensor_type=return_tensors)

    def _prepare(self, image: Any) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if (
                array.dtype != np.uint8
                or array.ndim not in (2, 3)
                or (array.ndim == 3 and array.shape[2] not in (3, 4))
            ):
                raise ValueError(
                    f"a picture must be a PIL image or an array (H, W, 3) of uint8, not {array.dtype} of shape {array.shape}."
                )
            image = Image.fromarray(array)
        image = ImageOps.exif_transpose(image)  # cameras store how they were held
        if min(image.size) < 1:
            raise ValueError(f"a picture of {image.width} x {image.height} pixels shows nothing; leave it out.")
        if image.mode.startswith("I;16"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"a picture of mode {image.mode!r} has no known range; convert it to 8 bits first.")
        if image.mode != "RGB":  # what is transparent becomes white
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image).convert("RGB")
        height, width = self._size
        scale = min(image.height / height, image.width / width)
        cut = max(1, round(height * scale)), max(1, round(width * scale))
        left, top = (image.width - cut[1]) // 2, (image.height - cut[0]) // 2
        image = image.crop((left, top, left + cut[1], top + cut[0]))
        if image.size != (width, height):
            resample = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
            image = image.resize((width, height), resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """`pixel_values (B, 3, H, W)` -> pictures."""
        pixels = ((pixel_values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]


TokComImageProcessor.register_for_auto_class("AutoImageProcessor")


__all__ = ["TokComAudioProcessor", "TokComImageProcessor", "read_wav", "write_wav"]
