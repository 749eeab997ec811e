"""Films are written here, as mp4, GIF or WebP files. How they are read is in `pictures_tokcom.py`.

What is written is read again frame for frame: encoders join equal neighbours, so they are kept
apart.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import GifImagePlugin, Image

from tokcom.pictures_tokcom import QUICK

ANIMATED = (".gif", ".webp")  # what Pillow writes; .mp4 needs PyAV


def write_film(frames: Sequence[Image.Image], file: str | Path, fps: float = 8) -> None:
    """Write frames of one size to a `.gif` or `.webp` that is shown again and again, or to an
    `.mp4`, which needs PyAV.

    Raises `ValueError` for another ending, or a rate that is not positive.
    """
    suffix = check_film_file(file)
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
        # `exact` keeps the colours of transparent pixels, which are otherwise free to change
        frames[0].save(file, save_all=True, lossless=True, exact=True, **options)
    else:
        _write_mp4(frames, str(file), fps)


def check_film_file(file: str | Path) -> str:
    """The ending of a film to write; raises `ValueError` for one that names no format."""
    suffix = Path(file).suffix.lower()
    if suffix not in (".mp4", *ANIMATED):
        raise ValueError(
            f"{file}: films are written as .mp4, {' or '.join(ANIMATED)}, not as {suffix!r}."
        )
    return suffix


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds of every frame, multiples of `unit`, that together keep a rate which is no
    multiple itself.

    Browsers show frames of less than 20 ms for 100 ms, so rates above 50 cannot be kept, which
    is an error.
    """
    if 1000 / fps < QUICK:
        raise ValueError(
            f"`fps` ({fps:g}) is more than the {1000 // QUICK} that a .gif or .webp can show; "
            "write an .mp4."
        )
    # Ends are rounded, not durations, so that errors do not add up: 30 frames a second take 30, 40,
    # 30 ms and so on, three of them together 100.
    ends = [round(1000 * i / (fps * unit)) * unit for i in range(count + 1)]
    return [end - start for start, end in zip(ends, ends[1:])]


def _write_gif(frames: Sequence[Image.Image], file: Path, fps: float) -> None:
    """Every frame whole, with colours of its own: Pillow's `save_all` would join equal
    neighbours."""
    options = {"include_color_table": True, "disposal": 1}
    with file.open("wb") as stream:
        for index, (frame, duration) in enumerate(zip(frames, _durations(len(frames), fps, 10))):
            frame = frame if frame.mode in ("L", "P") else frame.convert("RGB").quantize(256)
            if index == 0:
                header = GifImagePlugin.getheader(frame, info={"loop": 0, "duration": duration})[0]
                stream.write(b"".join(header))
            stream.write(b"".join(GifImagePlugin.getdata(frame, duration=duration, **options)))
        # the trailer that ends a GIF
        stream.write(b";")


def _kept_apart(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames of which no two neighbours are equal to an encoder: every second of a run of equals
    has a corner of opacity 254."""
    apart = [frames[0]]
    for before, frame in zip(frames, frames[1:]):
        if (
            frame.size == before.size
            and frame.convert("RGBA").tobytes() == before.convert("RGBA").tobytes()
        ):
            # the one before is unchanged, so this one has to differ
            if apart[-1] is before:
                frame = frame.convert("RGBA")
                red, green, blue, _ = frame.getpixel((0, 0))
                # invisible, and exact only because the file is lossless
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
        # nearly lossless to the eye, 0 being lossless and 23 the default of x264
        stream.options = {"crf": "15"}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))[: stream.height, : stream.width]
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                )
            )
        # the frames that the encoder still holds back
        container.mux(stream.encode())
