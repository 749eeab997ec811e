"""Films: clips as mp4, GIF or WebP files, and the frames of films and of animated pictures.

Notable choices:
- What a file is, its first bytes say, not its name; a container that begins with `ftyp` is told by its brand, since AVIF and HEIC
  are pictures.
- Only GIF, WebP, APNG and AVIF are animations: a second picture in a JPEG of a phone, or a page of a TIFF, is no frame.
- A model sees frames at one rate, so a frame of an animation that stays longer is there several times.
- What is written is read again frame for frame: encoders join equal neighbours, so they are kept apart.
"""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import GifImagePlugin, Image

ANIMATED = (".gif", ".webp")
ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")  # formats of Pillow whose further pictures are frames
PICTURE_BRANDS = (
    b"avif",
    b"avis",
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"mif1",
    b"msf1",
    b"miaf",
)
FILM_STARTS = (
    b"\x1a\x45\xdf\xa3",  # WebM and Matroska
    b"FLV\x01",
    b"OggS",
    b"\x30\x26\xb2\x75",  # WMV
    b"\x00\x00\x01\xba",  # MPEG
    b"\x00\x00\x01\xb3",
)
HEAD = 16  # bytes that tell a film from a picture
QUICK = 20  # ms; browsers show shorter frames for 100 ms
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
KEPT_FRAMES = (
    512 * 2**20
)  # bytes of decoded frames that a film keeps; of a longer one they are decoded again


def stored(value: Any) -> Any:
    """Bytes or a path: what `datasets` gives as a dictionary of both, as it is."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return bytes(value) if isinstance(value, bytearray) else value


def is_film(value: Any) -> bool:
    """Whether a record is a film, by its first bytes."""
    value = stored(value)
    if isinstance(value, (str, Path)):
        try:
            with open(value, "rb") as stream:
                value = stream.read(HEAD)
        except OSError:
            return False
    if not isinstance(value, bytes):
        return False
    if value[4:8] == b"ftyp":
        return value[8:12] not in PICTURE_BRANDS
    if value[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime without a brand
        return True
    transport = value[:1] == b"\x47" and not value.startswith(b"GIF")
    return value.startswith(FILM_STARTS) or value[8:11] == b"AVI" or transport


class Film:
    """The frames of a film as it is shown: turned as its container says, and with square pixels. Needs PyAV.

    Raises `ValueError` with the `name` of the record if it cannot be read, has no frames, or is cut off.
    """

    def __init__(self, value: Any, name: str):
        try:
            import av
        except ImportError as error:
            raise ValueError(
                f"{name} is a film, which needs PyAV to be read: pip install av"
            ) from error
        self.errors = (av.FFmpegError, IndexError, OSError, ValueError)
        self.open, self.value, self.name = av.open, stored(value), name
        self.kept: list[Image.Image] = []
        self.count = 0
        size = 0
        for frame in self._decode():
            self.count += 1
            size += 3 * frame.width * frame.height
            if size <= KEPT_FRAMES:
                self.kept.append(frame)
        if not self.count:
            raise ValueError(f"{name} holds a film without frames; remove it.")
        if self.claimed and self.count < 0.9 * self.claimed - 1:
            raise ValueError(
                f"{name} is cut off: {self.count} of its {self.claimed} frames are there; repair or remove it."
            )

    def _decode(self) -> Iterator[Image.Image]:
        source = io.BytesIO(self.value) if isinstance(self.value, bytes) else str(self.value)
        try:
            with self.open(source) as container:
                stream = next(
                    (s for s in container.streams.video if not _is_cover(s)),
                    container.streams.video[0],
                )
                self.claimed = stream.frames
                for frame in container.decode(stream):
                    yield _shown(frame, stream.sample_aspect_ratio)
        except self.errors as error:
            raise ValueError(
                f"{self.name} holds no film that can be read ({error}); repair or remove it."
            ) from error

    def __len__(self) -> int:
        return self.count

    def clip(self, start: int, count: int) -> list[Image.Image]:
        """`count` frames from `start` on, at most up to the end."""
        if start + count <= len(self.kept) or len(self.kept) == self.count:
            return self.kept[start : start + count]
        return [frame for i, frame in zip(range(start + count), self._decode()) if i >= start]


def _is_cover(stream) -> bool:
    """Whether a video stream is a picture that is attached to a film or a song."""
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


def _shown(frame, aspect: Fraction | None) -> Image.Image:
    image = frame.to_image()
    if aspect and aspect != 1:
        image = image.resize(
            (max(1, round(image.width * aspect)), image.height), Image.Resampling.BICUBIC
        )
    turn = TURNS.get(round(frame.rotation) % 360)  # counterclockwise, as Pillow's
    return image if turn is None else image.transpose(turn)


def timeline(image: Image.Image) -> list[int]:
    """Which picture of an animation is shown at each step of a constant rate; `[0]` of a still."""
    if image.format not in ANIMATIONS or getattr(image, "n_frames", 1) < 2:
        return [0]
    first = (
        1 if getattr(image, "default_image", False) else 0
    )  # which an APNG shows where it cannot move
    durations = []
    for index in range(first, image.n_frames):
        image.seek(index)
        image.load()  # the durations of WebP and AVIF are known only then
        durations.append(image.info.get("duration") or 0)
    return [first + i for i, times in enumerate(repeats(durations)) for _ in range(times)]


def repeats(durations: Sequence[float]) -> list[int]:
    """How many steps each frame is shown, for the longest step by which all durations are whole, with a third of a step to spare for
    formats that round them to 10 ms."""
    durations = [duration if duration >= QUICK else 100 for duration in durations]
    shortest = min(durations)
    if max(durations) == shortest:
        return [1] * len(durations)
    for parts in (1, 2, 3, 4):
        steps = [duration / shortest * parts for duration in durations]
        if all(abs(step - round(step)) <= 0.34 for step in steps):
            return [max(1, round(step)) for step in steps]
    return [max(1, round(duration / shortest)) for duration in durations]


def write_film(frames: Sequence[Image.Image], file: str | Path, fps: float = 8) -> None:
    """Write frames of one size to a `.gif` or `.webp` that is shown again and again, or to an `.mp4`, which needs PyAV.

    Raises `ValueError` for another ending, or a rate that is not positive.
    """
    suffix = Path(file).suffix.lower()
    if not fps > 0:
        raise ValueError(f"`fps` ({fps}) must be positive.")
    if suffix == ".gif":
        _write_gif(frames, Path(file), fps)
    elif suffix == ".webp":
        frames = _kept_apart(frames)
        options = {
            "append_images": frames[1:],
            "duration": _durations(len(frames), fps, 1),
            "loop": 0,
        }
        frames[0].save(file, save_all=True, lossless=True, exact=True, **options)
    elif suffix == ".mp4":
        _write_mp4(frames, str(file), fps)
    else:
        raise ValueError(
            f"{file}: films are written as .mp4, {' or '.join(ANIMATED)}, not as {suffix!r}."
        )


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of every frame, multiples of `unit`, that together keep a rate which is no multiple itself."""
    ends = [round(1000 * i / (fps * unit)) * unit for i in range(count + 1)]
    return [max(QUICK, end - start) for start, end in zip(ends, ends[1:])]


def _write_gif(frames: Sequence[Image.Image], file: Path, fps: float) -> None:
    """Every frame whole, with colours of its own: Pillow's `save_all` would join equal neighbours."""
    options = {"include_color_table": True, "disposal": 1}
    with file.open("wb") as stream:
        for index, (frame, duration) in enumerate(zip(frames, _durations(len(frames), fps, 10))):
            frame = frame if frame.mode in ("L", "P") else frame.convert("RGB").quantize(256)
            if index == 0:
                header = GifImagePlugin.getheader(frame, info={"loop": 0, "duration": duration})[0]
                stream.write(b"".join(header))
            stream.write(b"".join(GifImagePlugin.getdata(frame, duration=duration, **options)))
        stream.write(b";")


def _kept_apart(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames of which no two neighbours are equal to an encoder: every second of a run of equals has a corner of opacity 254."""
    apart = [frames[0]]
    for before, frame in zip(frames, frames[1:]):
        if (
            frame.size == before.size
            and frame.convert("RGBA").tobytes() == before.convert("RGBA").tobytes()
        ):
            if apart[-1] is before:
                frame = frame.convert("RGBA")
                red, green, blue, _ = frame.getpixel((0, 0))
                frame.putpixel((0, 0), (red, green, blue, 254))
        apart.append(frame)
    return apart


def _write_mp4(frames: Sequence[Image.Image], file: str, fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "an .mp4 needs PyAV to be written: pip install av; or give a .gif"
        ) from error
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width = frames[0].width // 2 * 2  # of which the format wants even ones
        stream.height = frames[0].height // 2 * 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "15"}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))[: stream.height, : stream.width]
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                )
            )
        container.mux(stream.encode())
