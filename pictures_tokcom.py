"""Pictures and films as they lie on disks: one reader for training, pipelines and the command line.

Notable choices:
- What a file is, its first bytes say, not its name; a container that begins with `ftyp` is told
  by its brand, since AVIF and HEIC are pictures.
- Only GIF, WebP, APNG and AVIF are animations: a second picture in a JPEG of a phone, or a page
  of a TIFF, is no frame.
- Frames follow each other at the usual rate of their film, so one that stays longer is there
  several times. Films of different rates are not brought to one.
- What is broken, cut off or damaged is one `ValueError` that names it. Films are read with PyAV,
  and HEIC with pillow-heif, if they are installed.
"""

import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from statistics import median
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
HEAD = 256  # bytes that tell a film from a picture
# bytes of a packet of a transport stream, without and with a time code before it
PACKETS = (188, 192)
QUICK = 20  # ms; browsers show shorter frames for 100 ms
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
# bytes of decoded frames that a film keeps; of a longer one they are decoded again
KEPT_FRAMES = 512 * 2**20
LONGEST_REASON = 200  # characters of what a decoder says


def is_stored(value: Any) -> bool:
    """Whether a value is a file, encoded bytes, or what `datasets` makes of them: a dictionary
    of both."""
    if isinstance(value, dict):
        return value.get("bytes") is not None or value.get("path") is not None
    return isinstance(value, (str, os.PathLike, bytes, bytearray))


def stored(value: Any) -> Any:
    """Bytes or a path: what `datasets` gives as a dictionary of both, as it is."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return bytes(value) if isinstance(value, bytearray) else value


def _first_bytes(value: Any) -> bytes:
    """The beginning of a file or of encoded bytes; nothing of anything else."""
    if isinstance(value, (str, os.PathLike)):
        try:
            with open(value, "rb") as stream:
                return stream.read(HEAD)
        except OSError:
            return b""
    return value[:HEAD] if isinstance(value, bytes) else b""


def is_film(value: Any) -> bool:
    """Whether a record is a film, by its first bytes."""
    start = _first_bytes(stored(value))
    if start[4:8] == b"ftyp":
        return start[8:12] not in PICTURE_BRANDS  # the brand follows `ftyp`
    if start[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime without a brand
        return True
    packets = [start[size - 188 :: size] for size in PACKETS]  # each begins with a G
    transport = any(len(firsts) > 1 and set(firsts) == {ord("G")} for firsts in packets)
    if start.startswith(b"GIF8"):  # it begins with a G, too
        return False
    return start.startswith(FILM_STARTS) or start[8:11] == b"AVI" or transport


def reason_of(error: Exception) -> str:
    """What an exception says, in one line that is not too long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST_REASON]


def open_image(value: Any, name: str = "a record") -> Image.Image:
    """A picture as datasets give it: PIL, encoded bytes, or a dictionary with `bytes` or `path`.

    Raises `ValueError` with the `name` of the record if it cannot be read, EXIF included.
    """
    value = stored(value)
    image = None
    try:
        image = value if isinstance(value, Image.Image) else _opened(value)
        if image.format == "PNG" and image.tile:  # none if the caller has loaded it
            _scale_transparency(image)
        image.load()
        if image.info.get("exif"):  # how the camera was held is not known of a broken one
            Image.Exif().load(image.info["exif"])
        return image
    except Exception as error:  # decoders raise nearly anything for a broken file
        # what the caller opened, the caller closes
        if image is not None and image is not value:
            image.close()
        raise ValueError(
            f"{name} holds no picture that can be read ({_reason(error, value)}); repair or "
            "remove it."
        ) from error


def _scale_transparency(image: Image.Image) -> None:
    """Give the transparent colour or level of a PNG the 8 bits to which Pillow brings its pixels,
    not those of the file."""
    key = image.info.get("transparency")
    depth = image.tile[0][3]  # as Pillow calls it, e.g. "L;4"
    if isinstance(key, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in key)
    elif isinstance(key, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if depth == "L;2" else 17)


def _opened(value: Any) -> Image.Image:
    if not isinstance(value, (str, os.PathLike, bytes)):
        raise ValueError(f"a {type(value).__name__} is neither a file nor its bytes")
    if not value:
        raise ValueError("it is empty")

    def source() -> Any:  # anew for each attempt: the first one moves a stream
        return io.BytesIO(value) if isinstance(value, bytes) else value

    try:
        return Image.open(source())
    except UnidentifiedImageError:
        if is_film(value):
            raise ValueError("it is a film") from None
        if not _register_heif():
            raise
        return Image.open(source())


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
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if not isinstance(error, UnidentifiedImageError):
        return reason_of(error)
    start = _first_bytes(value)
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif"):
        return "HEIC, which needs pillow-heif: pip install pillow-heif"
    return f"its first bytes are {start[:16]!r}" if start else "it is empty"


class Frames:
    """The frames of a picture, an animated picture, a film, or a list of pictures, decoded when
    they are asked for.

    A frame that is shown longer than others is there several times: `steps`, if they are known.
    Raises `ValueError` with the `name` of the record if it cannot be read.
    """

    def __init__(self, value: Any, name: str = "a record", steps: list[int] | None = None):
        self.name = name
        self.source = value
        self.steps: list[int] = []  # of an animation or film, the picture at each step
        if value is None:
            raise ValueError(f"{name} holds nothing; remove it.")
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError(f"{name} has no frames; remove it.")
            self.steps = list(range(len(value)))
            return
        if is_film(value):
            self.source = Film(value, name)
            self.steps = self.source.steps
            return
        self.source = open_image(value, name)
        try:
            self.steps = steps or timeline(self.source)
        except Exception as error:
            raise ValueError(
                f"{name} has a frame that cannot be read ({reason_of(error)}); repair or remove it."
            ) from error

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Image.Image:
        step = self.steps[index]
        if isinstance(self.source, Film):
            return self.source.clip(index, 1)[0]
        if isinstance(self.source, (list, tuple)):
            return upright(open_image(self.source[step], f"{self.name}, frame {step}"), self.name)
        try:
            if len(self) > 1:
                self.source.seek(step)
            return upright(self.source.copy(), self.name)
        except (OSError, EOFError) as error:
            raise ValueError(
                f"{self.name}: frame {index} cannot be read ({reason_of(error)}); repair or "
                "remove it."
            ) from error

    def clip(self, start: int, count: int) -> list[Image.Image]:
        """`count` frames from `start` on; where they end the last one stays."""
        if isinstance(self.source, Film):
            frames = self.source.clip(start, count)
            return frames + [frames[-1]] * (count - len(frames))
        return [self[min(start + i, len(self) - 1)] for i in range(count)]


def upright(image: Image.Image, name: str = "a picture") -> Image.Image:
    """A picture turned as its camera was held, with what is transparent in a mode that has
    alpha."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever a broken EXIF makes Pillow raise
        raise ValueError(
            f"{name} has an EXIF block that cannot be read ({reason_of(error)}); save it without."
        ) from error
    # one colour or level that is transparent, of PNG and GIF without alpha
    key = image.info.get("transparency")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        return image.convert(image.mode.upper())
    if key is not None and image.mode in ("1", "L", "RGB"):
        return image.convert("RGBA")
    if isinstance(key, int) and image.mode.startswith("I;16"):
        levels = np.asarray(image)  # 16 bits a pixel
        alpha = np.where(levels == key, 0, 255).astype(np.uint8)
        return Image.fromarray(np.stack([(levels >> 8).astype(np.uint8), alpha], 2), "LA")
    return image


class Film:
    """The frames of a film as it is shown: turned as its container says, and with square pixels.
    Needs PyAV.

    `steps` says which frame is shown at each step of a constant rate. Raises `ValueError` with
    the `name` of the record if it cannot be read, has no frames, is damaged, or is cut off.
    """

    def __init__(self, value: Any, name: str):
        try:
            import av
        except ImportError as error:
            raise ValueError(
                f"{name} is a film, which needs PyAV to be read: pip install av"
            ) from error
        self.errors = (av.FFmpegError, IndexError, OSError, ValueError)
        self.open = av.open
        self.value = stored(value)
        self.name = name
        self.kept: list[Image.Image] = []
        self.missing = ""
        self.times: list[float] = []  # seconds at which frames begin
        size = 0
        for frame in self._decode():
            size += 3 * frame.width * frame.height  # bytes of RGB
            if size <= KEPT_FRAMES:
                self.kept.append(frame)
        if not self.times:
            raise ValueError(f"{name} holds a film without frames; remove it.")
        if self.missing:
            raise ValueError(f"{name} is cut off: {self.missing}; repair or remove it.")
        self.steps = steps_of(self.times)

    def _decode(self) -> Iterator[Image.Image]:
        """All frames, in order; notes their `times`, and what is `missing` by the container."""
        source = io.BytesIO(self.value) if isinstance(self.value, bytes) else str(self.value)
        self.times = []
        end = 0.0  # seconds of all streams
        packets = 0
        try:
            with self.open(source) as container:
                if not container.streams.video:
                    raise ValueError("it has no pictures")
                # a cover is a video stream of one picture
                stream = next(
                    (s for s in container.streams.video if not _is_cover(s)),
                    container.streams.video[0],
                )
                # all streams are read, since the length of the container is that of the longest
                for packet in container.demux():
                    # a packet without content only empties the decoder
                    if packet.pts is not None and packet.size:
                        last = packet.pts + (packet.duration or 0)
                        end = max(end, float(last * packet.time_base))
                    if packet.stream.index != stream.index:
                        continue
                    packets += bool(packet.size)
                    for frame in packet.decode():
                        if frame.is_corrupt:
                            raise ValueError(f"frame {len(self.times)} is damaged")
                        # an unknown time is -1, with which `steps_of` counts every frame once
                        time = -1.0 if frame.time is None else frame.time
                        self.times.append(time)
                        yield _shown(frame, stream.sample_aspect_ratio)
                self.missing = _missing(container, stream, packets, end)
        except self.errors as error:
            raise ValueError(
                f"{self.name} holds no film that can be read ({reason_of(error)}); repair or "
                "remove it."
            ) from error

    def __len__(self) -> int:
        return len(self.steps)

    def clip(self, start: int, count: int) -> list[Image.Image]:
        """The frames at `count` steps from `start` on, at most up to the end."""
        wanted = self.steps[start : start + count]
        # frames are kept from the first on, as many as there is room for
        if not wanted or wanted[-1] < len(self.kept):
            return [self.kept[i] for i in wanted]
        needed = set(wanted)
        # stops decoding behind the last frame that is wanted
        found = {i: frame for i, frame in zip(range(wanted[-1] + 1), self._again()) if i in needed}
        return [found[i] for i in wanted]

    def _again(self) -> Iterator[Image.Image]:
        # decoding notes the times anew, and ends early here
        times = self.times
        try:
            yield from self._decode()
        finally:
            self.times = times


def _missing(container, stream, packets: int, end: float) -> str:
    """What a container claims but does not hold; empty if nothing is missing. A frame or two may
    be left out by how a film was edited."""
    # half a percent may be missing: edit lists leave out frames that the header counts
    # AVI counts frames that stay on the screen, which have packets without content
    counts = container.format.name != "avi"
    if counts and packets < stream.frames - max(1, stream.frames // 200):
        return f"{packets} of its {stream.frames} frames are there"
    length = (container.duration or 0) / 1_000_000  # FFmpeg counts microseconds
    frame = 1 / float(stream.average_rate or 25)  # seconds; 25 a second if nothing is known
    # the last frame may count or not, and containers round times
    if end < length - 1.5 * frame - 0.02:
        return f"{end:.2f} of its {length:.2f} seconds are there"
    return ""


def steps_of(times: Sequence[float]) -> list[int]:
    """Which frame is shown at each step. A step is the usual time between two frames: cameras and
    screen recorders leave out frames that show nothing new."""
    gaps = [after - before for before, after in zip(times, times[1:])]
    usual = median(gaps) if gaps else 0.0  # seconds from frame to frame
    # times that are unknown or do not grow say nothing, and even ones need nothing
    if usual <= 0 or min(gaps) <= 0 or max(gaps) < 1.5 * usual:
        return list(range(len(times)))
    steps: list[int] = []
    for index, gap in enumerate([*gaps, usual]):  # nothing says how long the last frame stays
        steps += [index] * max(1, round(gap / usual))
    return steps


def _is_cover(stream) -> bool:
    """Whether a video stream is a picture that is attached to a film or a song."""
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


def _shown(frame, aspect: Fraction | None) -> Image.Image:
    image = frame.to_image()
    # anamorphic films store pixels that are shown wider than high
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
    # which an APNG shows where it cannot move
    first = 1 if getattr(image, "default_image", False) else 0
    durations = []
    for index in range(first, image.n_frames):
        image.seek(index)
        image.load()  # the durations of WebP and AVIF are known only then
        durations.append(image.info.get("duration") or 0)  # ms
    steps: list[int] = []
    for index, count in enumerate(repeats(durations), first):
        steps += [index] * count
    return steps


def repeats(durations: Sequence[float]) -> list[int]:
    """For how many steps each frame is shown. A step is the longest time that divides all
    durations, give or take a third of it, since some formats round durations to 10 ms."""
    durations = [duration if duration >= QUICK else 100 for duration in durations]
    shortest = min(durations)
    if max(durations) == shortest:
        return [1] * len(durations)
    # a step is the shortest duration, or a half, a third or a quarter of it
    for parts in (1, 2, 3, 4):
        steps = [duration / shortest * parts for duration in durations]
        if all(abs(step - round(step)) <= 0.34 for step in steps):
            return [max(1, round(step)) for step in steps]
    # no such step: rounded to the shortest duration
    return [max(1, round(duration / shortest)) for duration in durations]


__all__ = ["Film", "Frames", "is_film", "is_stored", "open_image", "upright"]
