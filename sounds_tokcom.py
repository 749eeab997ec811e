"""Sounds as models read them, and back.

Notable choices:
- Sounds become log-mel features with transformers' analysis. The way back ends in phases by Griffin
  and Lim 1984, which are librosa's, which is only needed to hear something. All sounds are brought
  to one loudness.
- Training, the pipeline and the command line read sounds with the same function, `read_sound`. It
  needs soundfile, and scipy for other rates, which librosa brings along.
"""

import io
import warnings
import wave
from math import gcd
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

FLOOR = 1e-3  # power of a band that counts as silence, at a peak of 1
ITERATIONS = 60  # of phases
UPDATES = 50  # of powers
PAGE = 1 << 17  # bytes, more than the longest page of an Ogg file
UNKNOWN = 0xFFFFFFFF  # length of a .wav that was not known when its header was written
HEAD = 1 << 16  # bytes of a sound file in which the header of its samples lies
BLOCK = 1 << 20  # samples that are decoded at a time
MAX_EXPANSION = 20_000  # samples for a byte: silence in FLAC has some thousand


class TokComAudioProcessor:
    """Sounds `(samples,)` in [-1, 1] -> `input_features (B, mel bands, F)`, log10 of the power, and
    back.

    Args:
        config (`TokComAudioCodecConfig`): rates, bands and length.
    """

    # typed by its base, since an import for a type alone lengthens every chain that leads here
    def __init__(self, config: PreTrainedConfig):
        self.config = config
        bins = 1 + config.fft_length // 2  # frequencies from 0 to half the rate
        rate = config.sampling_rate
        self.filters = mel_filter_bank(
            bins, config.num_channels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
        )
        self.window = window_function(config.fft_length, "hann")

    def __call__(self, sounds: Any, sampling_rate: int | None = None) -> dict[str, torch.Tensor]:
        """One sound or a list of them, whatever `read_sound` takes; `sampling_rate` is that of
        arrays, by default the codec's.

        Raises `ValueError` for a sound without samples or one that cannot be read.
        """
        is_list = isinstance(sounds, (list, tuple)) and not is_samples(sounds)
        sounds = list(sounds) if is_list else [sounds]
        if not sounds:
            raise ValueError("`audio` is an empty list; give at least one sound.")
        features = [self._features(sound, sampling_rate) for sound in sounds]
        return {"input_features": torch.from_numpy(np.stack(features))}

    def _features(self, sound: Any, rate: int | None) -> np.ndarray:
        config = self.config
        longest = config.num_samples / config.sampling_rate
        name = f"sound {str(sound)!r}" if isinstance(sound, (str, Path)) else "a sound"
        facts: dict[str, Any] = {}
        sound = read_sound(sound, config.sampling_rate, name, rate, longest, facts)
        # rounding of a rate may add a few samples, which nobody misses
        if facts["seconds"] > longest + 0.01:
            warnings.warn(
                f"{name} of {facts['seconds']:.1f} s is cut to the {longest:.1f} s that the model "
                "hears.",
                stacklevel=4,
            )
        sound = sound[: config.num_samples]
        # one loudness for all; near silence is not blown up to noise
        sound = sound / max(np.abs(sound).max(), 1e-4)
        sound = np.pad(sound, (0, config.num_samples - len(sound)))  # ends in silence
        bands = spectrogram(
            sound,
            self.window,
            config.fft_length,
            config.hop_length,
            power=2.0,
            mel_filters=self.filters,
            mel_floor=FLOOR,
        )
        return np.log10(bands).astype(np.float32)  # (mel bands, F)

    def _powers(self, bands: np.ndarray) -> np.ndarray:
        """Powers `(bins, F)`, not negative, whose mel bands are `bands (mel bands, F)`.

        Multiplicative updates (Lee and Seung 1999): in a fiftieth of the time of
        `librosa.util.nnls`, and closer.
        """
        filters = self.filters.astype(np.float32)  # (bins, mel bands)
        wanted = filters @ bands  # (bins, F)
        squared = filters @ filters.T  # (bins, bins)
        powers = wanted.copy()
        for _ in range(UPDATES):
            # min |filters^T p - bands|^2 for p >= 0: a positive factor never changes a sign
            powers *= wanted / np.maximum(squared @ powers, 1e-9)
        return powers

    def postprocess(self, input_features: torch.Tensor) -> list[np.ndarray]:
        """`input_features (B, mel bands, F)` -> sounds `(samples,)` with a peak of 0.95; needs
        librosa."""
        try:
            import librosa
        except ImportError as error:
            raise ValueError(
                "to hear log-mel features librosa is needed: pip install librosa"
            ) from error
        options = {
            "hop_length": self.config.hop_length,
            "win_length": self.config.fft_length,
            "random_state": 0,  # phases start random, but always the same
        }
        sounds = []
        for features in input_features.float().cpu().numpy():
            # an estimate far outside the data must not overflow, and the floor stands for silence
            bands = np.maximum(10.0 ** np.minimum(features, 6), FLOOR) - FLOOR
            spectrum = self._powers(bands) ** 0.5  # magnitudes
            sound = librosa.griffinlim(
                spectrum,
                n_iter=ITERATIONS,
                n_fft=self.config.fft_length,
                length=self.config.num_samples,
                **options,
            )
            sounds.append((0.95 * sound / max(np.abs(sound).max(), 1e-4)).astype(np.float32))
        return sounds


def is_samples(value: Any) -> bool:
    """Whether a list holds the samples of one sound, and not several sounds."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and isinstance(value[0], (int, float, np.number))
    )


def read_sound(
    value: Any,
    sampling_rate: int,
    name: str = "a sound",
    rate: int | None = None,
    seconds: float | None = None,
    facts: dict[str, float] | None = None,
) -> np.ndarray:
    """Samples `(n,)`, float32, at `sampling_rate` of any sound: a path or encoded bytes of wav,
    flac, mp3 or ogg, an array or tensor `(n,)`, `(channels, n)` or `(n, channels)` of `rate`
    samples a second, or a dictionary as datasets gives it, with `bytes` or `path`, or with `array`
    and `sampling_rate`. Channels are mixed, and other rates resampled.

    Of a longer sound at least the first `seconds` are read. `facts`, if given, is told what was
    done. Raises `ValueError` with `name` for what is no sound, is empty, cut off or not finite, or
    whose header claims more than its file can hold.
    """
    value, rate = _unwrap(value, rate, name)
    length = None
    unknown = False
    if isinstance(value, (str, Path, bytes, bytearray)):
        sound, rate, length = _decode_sound(value, name, seconds)
    else:
        sound = _samples(value, name)
        unknown = rate is None
        rate = sampling_rate if rate is None else rate
    if not isinstance(rate, (int, float, np.number)) or not 0 < rate < 10**7:
        raise ValueError(f"{name} has a `sampling_rate` of {rate!r}; give samples a second.")
    _check_samples(sound, name)
    length = len(sound) if length is None else length
    if facts is not None:
        facts |= {
            "mixed to one channel": sound.ndim == 2 and sound.shape[1] > 1,
            "resampled": rate != sampling_rate,
        }
        if unknown:
            facts["of no known rate, taken as the model's"] = True
        facts["seconds"] = length / rate
    if seconds is not None:
        # a second more for what the filter of another rate sees behind the end
        sound = sound[: int((seconds + 1) * rate) + 1]
    sound = sound.mean(1) if sound.ndim == 2 else sound  # (n,)
    if rate != sampling_rate:
        sound = _resample(sound, int(rate), sampling_rate)
    return sound.astype(np.float32)


def _unwrap(value: Any, rate: int | None, name: str) -> tuple[Any, int | None]:
    """What a column of datasets holds as a path, bytes or an array, and the array's rate."""
    if hasattr(value, "get_all_samples"):  # a decoder
        samples = value.get_all_samples()
        value = {"array": samples.data, "sampling_rate": samples.sample_rate}
    if not isinstance(value, dict):
        return value, rate
    if value.get("array") is not None:
        # what the record says goes before what the caller assumes
        rate = value.get("sampling_rate") or rate
        if rate is None:
            raise ValueError(f"{name} is an array without `sampling_rate`; give samples a second.")
        return value["array"], rate
    found = value.get("path") if value.get("bytes") is None else value["bytes"]
    if found is None:
        raise ValueError(
            f"{name} is a dictionary with {sorted(value)}; it needs `bytes`, `path`, or `array` "
            "and `sampling_rate`."
        )
    return found, rate


def _resample(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ValueError("other rates need scipy to be resampled: pip install scipy") from error
    common = gcd(rate, wanted)
    # up by one whole number and down by another, the smallest that give the ratio
    return resample_poly(sound, wanted // common, rate // common)


def _check_samples(sound: np.ndarray, name: str) -> None:
    if not sound.size:
        raise ValueError(f"{name} is without samples; remove it.")
    if not np.isfinite(sound).all():
        raise ValueError(f"{name} has samples that are not finite; repair or remove it.")


def _samples(value: Any, name: str) -> np.ndarray:
    """An array, tensor or list as float32 `(n,)` or `(n, channels)`; whole numbers are divided by
    the largest of their type."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            if value.is_floating_point():  # numpy has no bfloat16
                value = value.float()
            value = value.numpy()
        else:
            value = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} has channels of unlike lengths ({error}); repair it.") from error
    kind = type(value).__name__
    if value.dtype.kind not in "iuf" or value.ndim not in (1, 2):
        raise ValueError(
            f"{name} must be a path, encoded bytes, or samples (n,) or (channels, n), not {kind} "
            f"of {value.dtype} and shape {value.shape}."
        )
    # there are fewer channels than samples
    if value.ndim == 2 and value.shape[0] <= value.shape[1]:
        value = value.T  # (n, channels)
    if value.dtype == np.uint8:
        return (value.astype(np.float32) - 128) / 128  # 8 bits are stored without a sign
    # other whole numbers have no known range, and floats are in [-1, 1] already
    scale = np.iinfo(value.dtype).max if value.dtype in (np.int16, np.int32) else 1
    return value.astype(np.float32) / scale


def _decode_sound(value: Any, name: str, seconds: float | None) -> tuple[np.ndarray, int, int]:
    """Samples `(n, channels)` of an encoded sound, at least the first `seconds`, their rate, and
    how many there are in all."""
    try:
        size = Path(value).stat().st_size if isinstance(value, (str, Path)) else len(value)
        head = _bytes_of(value, 0, HEAD)
    except OSError as error:
        raise ValueError(
            f"{name} holds no sound that can be read ({error}); repair or remove it."
        ) from error
    if not size:
        raise ValueError(f"{name} is an empty file; remove it.")
    # a decoder may read a file that is cut off as if it were short
    if head[:4] == b"OggS" and not _has_last_page(_bytes_of(value, max(0, size - PAGE), PAGE)):
        raise ValueError(f"{name} is cut off: its last page is missing; repair or remove it.")
    claimed = _claimed_bytes(head)
    if claimed > size:
        raise ValueError(
            f"{name} is cut off, or its header is wrong: it claims {claimed:,} bytes, the file has "
            f"{size:,}; repair or remove it."
        )
    try:
        import soundfile
    except ImportError as error:
        raise ValueError("sounds are read with soundfile: pip install soundfile") from error
    source = str(value) if isinstance(value, (str, Path)) else io.BytesIO(value)
    try:
        with soundfile.SoundFile(source) as stream:
            # libsndfile estimates the length of an mp3 that does not say it
            is_estimate = stream.format == "MP3"
            if is_estimate and (found := _decode_with_av(value, name)) is not None:
                return found
            frames = stream.frames
            rate = stream.samplerate
            channels = stream.channels
            # a header of some bytes could ask for any amount of memory
            if frames * channels > MAX_EXPANSION * size:
                raise ValueError(
                    f"{name} claims {frames:,} samples of {channels} channels, more than {size:,} "
                    "bytes can hold; remove it."
                )
            wanted = frames if seconds is None else min(frames, int((seconds + 1) * rate) + 1)
            blocks: list[np.ndarray] = []
            # never more room than the file has filled
            while (left := wanted - sum(len(block) for block in blocks)) > 0:
                blocks.append(stream.read(min(left, BLOCK), dtype="float32", always_2d=True))
                if len(blocks[-1]) < min(left, BLOCK):  # the file ends before its header says
                    break
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        if (found := _decode_with_av(value, name)) is not None:
            return found
        raise ValueError(
            f"{name} holds no sound that can be read ({error}); repair or remove it."
        ) from error
    sound = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.float32)
    if len(sound) < wanted and not is_estimate:
        raise ValueError(
            f"{name} is cut off: {len(sound):,} of {frames:,} samples are there; repair or remove "
            "it."
        )
    return sound, rate, frames


def _bytes_of(value: Any, start: int, count: int) -> bytes:
    """Some bytes of a file or of encoded bytes."""
    if not isinstance(value, (str, Path)):
        return bytes(value[start : start + count])
    with open(value, "rb") as stream:
        stream.seek(start)
        return stream.read(count)


def _has_last_page(end: bytes) -> bool:
    """Whether the last page in the `end` of an Ogg file says that the stream ends there."""
    page = end.rfind(b"OggS")
    return page >= 0 and len(end) > page + 5 and bool(end[page + 5] & 4)


def _says_its_length(value: Any) -> bool:
    """Whether an MP3 has the header that says how many frames it has (Xing or LAME)."""
    head = _bytes_of(value, 0, 10)
    start = 0
    if head[:3] == b"ID3":  # tags come first, whose size has 7 bits a byte
        for byte in head[6:10]:
            start = start << 7 | byte & 127
        start += 10
    first = _bytes_of(value, start, 256)
    return b"Xing" in first or b"Info" in first


def _decode_with_av(value: Any, name: str) -> tuple[np.ndarray, int, int] | None:
    """Decode with PyAV what soundfile cannot read, such as .m4a; None if PyAV is missing or cannot
    read it either. Raises `ValueError` with the `name` for an MP3 that is cut off."""
    try:
        import av
    except ImportError:
        return None
    try:
        source = str(value) if isinstance(value, (str, Path)) else io.BytesIO(value)
        with av.open(source) as container:
            stream = container.streams.audio[0]
            to_floats = av.AudioResampler(format="fltp")  # planar, as many channels as there are
            frames = []
            for frame in container.decode(stream):
                frames += to_floats.resample(frame)
            rate = stream.rate
            length = (container.duration or 0) / 1_000_000  # FFmpeg counts microseconds
            is_mp3 = container.format.name == "mp3"
    except (av.FFmpegError, IndexError, OSError, ValueError):
        return None
    if not frames:
        return None
    sound = np.concatenate([frame.to_ndarray().T for frame in frames])  # (n, channels)
    # without its header FFmpeg guesses the length; a tenth of a second is what encoders fill up
    if is_mp3 and len(sound) / rate < length - 0.1 and _says_its_length(value):
        raise ValueError(
            f"{name} is cut off: {len(sound) / rate:.2f} of its {length:.2f} seconds are there; "
            "repair or remove it."
        )
    return sound, rate, len(sound)


def _claimed_bytes(head: bytes) -> int:
    """How many bytes a .wav or .aiff file must have by the header of its samples; 0 for others."""
    order: Literal["little", "big"]
    if head[:4] == b"RIFF":
        order = "little"
        wanted = b"data"
    elif head[:4] == b"FORM":
        order = "big"
        wanted = b"SSND"
    else:
        return 0
    # behind name and length of the file and its kind come chunks: name, length and content,
    # of which an odd number of bytes is filled up by one
    place = 12
    while place + 8 <= len(head):
        length = int.from_bytes(head[place + 4 : place + 8], order)
        if head[place : place + 4] == wanted:
            # written to a pipe, whose header could not be corrected at the end
            return 0 if length == UNKNOWN else place + 8 + length
        place += 8 + length + length % 2
    return 0


def read_wav(file: str | Path) -> tuple[np.ndarray, int]:
    """Any sound file -> samples `(n,)` in [-1, 1], the mean of its channels, and their rate."""
    sound, rate, _ = _decode_sound(file, str(file), None)
    _check_samples(sound, str(file))
    return sound.mean(1), rate


def write_wav(sound: np.ndarray, file: str | Path, sampling_rate: int) -> None:
    """Write samples `(n,)` in [-1, 1] as a .wav file of 16 bits."""
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)  # bytes
        stream.setframerate(sampling_rate)
        stream.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())


__all__ = ["TokComAudioProcessor", "is_samples", "read_sound", "read_wav", "write_wav"]
