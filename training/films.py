"""Films: clips as mp4, GIF or WebP files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ANIMATED = (".gif", ".webp")


def write_film(frames: Sequence[Image.Image], file: str | Path, fps: float = 8) -> None:
    """Write frames of one size to a `.gif` or `.webp` that is shown again and again, or to an `.mp4`, which needs PyAV.

    Raises `ValueError` for another ending.
    """
    suffix = Path(file).suffix.lower()
    if suffix in ANIMATED:
        options = {"lossless": True} if suffix == ".webp" else {"disposal": 2}
        options |= {
            "save_all": True,
            "append_images": list(frames[1:]),
            "duration": round(1000 / fps),
            "loop": 0,
        }
        frames[0].save(file, **options)
        return
    if suffix != ".mp4":
        raise ValueError(
            f"{file}: films are written as .mp4, {' or '.join(ANIMATED)}, not as {suffix!r}."
        )
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "an .mp4 needs PyAV to be written: pip install av; or give a .gif"
        ) from error
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.width, stream.height = (
            frames[0].width // 2 * 2,
            frames[0].height // 2 * 2,
        )  # of which the format wants even ones
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "15"}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))[: stream.height, : stream.width]
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                )
            )
        container.mux(stream.encode())
