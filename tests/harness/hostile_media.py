"""Read 100 damaged or hostile pictures, films and sounds, each in a fork with little memory and
time.

    python tests/harness/hostile_media.py                             # this checkout
    python tests/harness/hostile_media.py --package_parent /elsewhere # /elsewhere/tokcom

What happens is one of

    clear    refused in one sentence that names the file
    raw      an exception of a library
    silent   a picture or a sound is made of a file that holds none, or less than it claims
    read     a file that is odd but whole is read
    hang     no answer within 20 seconds
    crash    the process died, of memory or of a signal
"""

import argparse
import io
import os
import random
import resource
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve()
SECONDS = 20
MEMORY = 6 * 2**30  # of address space more than the process has already
LONGEST = 500
PICTURES = ("png", "jpeg", "gif", "webp", "bmp", "tiff")
FILMS = ("gif", "mp4")
SOUNDS = ("wav", "flac")


# ---- whole files ----


def picture(kind: str) -> bytes:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind)
    return target.getvalue()


def film(kind: str) -> bytes:
    import numpy as np
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    target = io.BytesIO()
    if kind == "gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(target, "gif", save_all=True, append_images=images[1:], duration=100)
        return target.getvalue()
    import av

    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return target.getvalue()


def sound(kind: str) -> bytes:
    import numpy as np
    import soundfile

    samples = np.sin(np.arange(8000) / 10).astype(np.float32) / 2
    target = io.BytesIO()
    soundfile.write(target, samples, 8000, format=kind.upper())
    return target.getvalue()


# ---- damages: bytes in, bytes out; whether what comes out may be read ----


def flipped(data: bytes) -> bytes:
    """A few bits behind the header are others."""
    damaged = bytearray(data)
    draws = random.Random(0)
    for _ in range(3):
        damaged[draws.randrange(len(data) // 2, len(data))] ^= 1 << draws.randrange(8)
    return bytes(damaged)


def zeroed(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + b"\0" * third + data[2 * third :]


def enormous(data: bytes) -> bytes:
    """The header claims more than any machine can hold, where it is known where the header says
    so."""
    if data[:4] == b"\x89PNG":
        import zlib

        header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data[:3] == b"GIF":
        return data[:6] + b"\xff\xff\xff\xff" + data[10:]
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + data[26:]
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        place = data.index(b"data") + 4
        return data[:place] + struct.pack("<I", 2**32 - 2) + data[place + 4 :]
    return data[:20] + b"\xff" * 8 + data[28:]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "empty": (lambda data: b"", False),
    "one byte": (lambda data: data[:1], False),
    "header alone": (lambda data: data[:16], False),
    "half": (lambda data: data[: len(data) // 2], False),
    "noise": (lambda data: random.Random(1).randbytes(len(data)), False),
    "text": (lambda data: b"this is no picture and no sound\n" * 20, False),
    "enormous": (enormous, False),
    "zeros inside": (zeroed, True),
    "flipped bits": (flipped, True),
    "garbage behind": (lambda data: data + b"garbage" * 99, True),
}


def cases() -> Iterator[tuple[str, str, str, bytes, bool]]:
    """Reader, kind, damage, bytes, and whether reading them is right: 6 x 10 + 2 x 10 + 2 x 10."""
    for reader, kinds, make in (
        ("picture", PICTURES, picture),
        ("film", FILMS, film),
        ("sound", SOUNDS, sound),
    ):
        for kind in kinds:
            whole = make(kind)
            for name, (damage, may_be_read) in DAMAGES.items():
                yield reader, kind, name, damage(whole), may_be_read


def read(reader: str, file: Path) -> None:
    from tokcom.processing_tokcom import TokComImageProcessor

    if reader == "picture":
        TokComImageProcessor(16)(str(file))
        return
    if reader == "film":
        try:
            from tokcom.processing_tokcom import read_clips
        except ImportError:
            from tokcom.codec_video_tokcom import read_clips
        read_clips(str(file), [16, 16], "videos")
        return
    from tokcom.sounds_tokcom import read_sound

    read_sound(str(file), 8000, str(file))


def judge(reader: str, file: Path, may_be_read: bool) -> str:
    """What comes of a file, in a fork of this process."""
    from tokcom.cli.errors import explain

    result = file.with_suffix(".result")
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        warnings.simplefilter("ignore")
        try:
            read(reader, file)
            said = "read" if may_be_read else "silent"
        except Exception as error:
            message = explain(error)
            is_sentence = "\n" not in message and len(message) <= LONGEST
            clear = is_sentence and not message.startswith("unexpected ") and file.name in message
            said = "clear" if clear else f"raw: {type(error).__name__}: {message[:150]}"
        result.write_text(said)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and result.is_file():
        return result.read_text()
    return "hang" if code in (-24, -9) else f"crash: {code}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--package_parent", help="folder that holds the checkout `tokcom`")
    parser.add_argument("--show", action="store_true", help="one line for each file")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(args.package_parent or HERE.parents[3]).resolve()))
    import tokcom.codec_video_tokcom
    import tokcom.sounds_tokcom  # noqa: F401  imported once, for all forks

    found: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, (reader, kind, damage, data, may_be_read) in enumerate(cases()):
            file = Path(folder) / f"{number}.{kind}"
            file.write_bytes(data)
            result = judge(reader, file, may_be_read)
            found[result.split(":")[0]] += 1
            if args.show or result.split(":")[0] not in ("clear", "read"):
                print(f"{reader:8} {kind:5} {damage:15} {result}", flush=True)
    print(
        f"{found.total()} files: " + ", ".join(f"{n} {word}" for word, n in sorted(found.items()))
    )


if __name__ == "__main__":
    main()
