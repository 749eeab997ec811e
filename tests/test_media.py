"""Pictures, clips and sounds as they lie on people's disks: what is read of them, and what is named
instead."""

import io
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from helpers import encoded, shades
from PIL import Image, PngImagePlugin

from tokcom.configuration_media_tokcom import TokComStyleCodecConfig
from tokcom.pictures_tokcom import Frames, is_film, open_image
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    read_sound,
    read_wav,
    write_wav,
)
from tokcom.training.audit import audit
from tokcom.training.config import DataConfig
from tokcom.training.images import ImageDataset
from tokcom.training.presets import preset_config
from tokcom.training.report import PartReport, Report
from tokcom.training.sources import load_documents

av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")


# ---- pictures ----


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA", "ICO", "JPEG2000"]
)
def test_every_format_of_pictures_is_read_from_bytes_and_from_a_file(kind, tmp_path):
    content = encoded(Image.new("RGB", (32, 32), (200, 30, 40)), kind)
    (tmp_path / "picture").write_bytes(content)
    for value in (
        content,
        str(tmp_path / "picture"),
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(tmp_path / "picture")},
    ):
        frames = Frames(value)
        assert len(frames) == 1
        assert (
            np.abs(np.asarray(frames[0].convert("RGB"))[16, 16].astype(int) - (200, 30, 40)).max()
            < 12
        )


def test_heic_is_read_with_pillow_heif():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(buffer)
    assert buffer.getvalue()[4:8] == b"ftyp" and not is_film(buffer.getvalue())
    frames = Frames(buffer.getvalue())
    assert len(frames) == 1 and frames[0].size == (64, 48)
    assert abs(frames[0].getpixel((20, 20))[0] - 200) < 20


@pytest.mark.parametrize("kind", ["MPO", "TIFF", "ICO", "PDF"])
def test_further_pictures_in_a_still_are_no_frames(kind):
    first, second = shades(2)
    if kind == "ICO":
        content = encoded(first, "ICO", sizes=[(16, 16), (32, 32)])
    elif kind == "PDF":
        with pytest.raises(ValueError, match="holds no picture"):
            Frames(encoded(first, "PDF"))
        return
    else:
        content = encoded(first, kind, save_all=True, append_images=[second])
    assert len(Frames(content)) == 1
    assert Frames(content).clip(0, 3)[2].getpixel((5, 5))[1] > 240


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_sequences_of_the_four_animated_formats_are_animations(kind):
    images = [Image.effect_noise((32, 32), 20 * i + 20).convert("RGB") for i in range(4)]
    content = encoded(images[0], kind, save_all=True, append_images=images[1:], duration=100)
    assert not is_film(content) and len(Frames(content)) == 4


def test_the_default_picture_of_an_apng_is_no_frame():
    first, *rest = shades(4)
    content = encoded(
        first, "PNG", save_all=True, append_images=rest, default_image=True, duration=100
    )
    frames = Frames(content)
    assert len(frames) == 3 and frames[0].getpixel((0, 0))[:3] == rest[0].getpixel((0, 0))
    assert frames[2].getpixel((0, 0))[:3] == rest[2].getpixel((0, 0))


def transparent(mode: str) -> bytes:
    """A picture of a mode all of which is transparent, black underneath."""
    if mode in ("LA", "RGBA"):
        return encoded(Image.new(mode, (32, 32), 0), "PNG")
    if mode == "P":
        return encoded(Image.new("P", (32, 32), 0), "PNG", transparency=bytes([0]))
    if mode == "GIF":
        return encoded(Image.new("P", (32, 32), 0), "GIF", transparency=0)
    if mode == "I;16":
        return encoded(Image.fromarray(np.full((32, 32), 7, np.uint16)), "PNG", transparency=7)
    if mode in ("RGB;16", "L;4", "L;2"):  # which Pillow does not write
        depth, kind = int(mode.split(";")[1]), 2 if mode == "RGB;16" else 0
        level = (
            b"\x12\x34" * 3 if kind else bytes([0x11 if depth == 4 else 0x55])
        )  # 1 in all pixels
        key = level if kind else b"\x00\x01"
        row = b"\x00" + (32 * level if kind else level * (4 * depth))
        head = struct.pack(">IIBBBBB", 32, 32, depth, kind, 0, 0, 0)
        chunks = {b"IHDR": head, b"tRNS": key, b"IDAT": zlib.compress(32 * row), b"IEND": b""}
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks.items()
        )
    if mode in ("WEBP", "AVIF"):
        return encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 0)), mode, lossless=True, quality=100)
    return encoded(
        Image.new(mode, (32, 32), 0), "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0
    )


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "L;2", "L;4", "LA", "P", "GIF", "RGB", "RGB;16", "RGBA", "I;16", "WEBP", "AVIF"],
)
def test_what_is_transparent_becomes_white_in_every_mode(mode):
    records = datasets.Dataset.from_dict({"image": [transparent(mode)]})
    item = ImageDataset(records, "image", "", None, 0, False).fit(TokComStyleCodecConfig())[0][
        "pixel_values"
    ]
    assert float(item.min()) > 0.97


def test_modes_without_a_known_range_are_named_with_their_record():
    content = encoded(Image.new("F", (8, 8)), "TIFF")
    records = datasets.Dataset.from_dict({"image": [content]})
    with pytest.raises(ValueError, match=r"record 0 \(image\).*mode 'F'"):
        audit(
            ImageDataset(records, "image", "", None, 0, False).fit(TokComStyleCodecConfig()),
            PartReport("x"),
            Report(),
            0,
        )


def broken_exif(block: bytes) -> bytes:
    return encoded(Image.new("RGB", (32, 32)), "JPEG", exif=b"Exif\0\0" + block)


def large_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10), zip=True)
    return encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)


def bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    content = encoded(Image.new("L", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


NOISE = Image.effect_noise((64, 64), 50).convert("RGB")
BROKEN = {
    "EXIF of garbage": lambda: broken_exif(b"garbage"),
    "EXIF that is cut": lambda: broken_exif(b"II*\0"),
    "EXIF of nothing but zeros": lambda: broken_exif(bytes(20)),
    "bomb": bomb,
    "text chunk": large_text,
    "cut JPEG": lambda: encoded(NOISE, "JPEG")[:-900],
    "cut PNG": lambda: encoded(NOISE, "PNG")[:-900],
    "cut WebP": lambda: encoded(NOISE, "WEBP")[:-300],
    "cut GIF": lambda: encoded(
        NOISE, "GIF", save_all=True, append_images=[Image.effect_noise((64, 64), 90)]
    )[:-900],
    "cut AVIF": lambda: encoded(NOISE, "AVIF")[:-300],
    "cut TIFF": lambda: encoded(NOISE, "TIFF")[:-3000],
    "text": lambda: b"not a picture at all",
    "nothing": lambda: b"",
    "HTML": lambda: b"<html>404 Not Found</html>",
    "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_read_is_one_error_or_left_out_and_counted(name):
    good = encoded(Image.new("RGB", (8, 8), "white"), "PNG")
    records = datasets.Dataset.from_dict({"image": [good, BROKEN[name](), good]})
    dataset = ImageDataset(records, "image", "", None, 0, True).fit(TokComStyleCodecConfig())
    with pytest.raises(ValueError, match=r"record 1 \(image\).*data.max_skipped=1"):
        audit(dataset, PartReport("training data"), Report(), name)
    report, part = Report(1), PartReport("training data")
    kept = audit(dataset, part, report, name)
    assert len(kept) == 2 and len(report.problems) == 1 and part.counts["resized"] == 2
    assert "record 1" in str(report)
    assert torch.equal(kept[1]["pixel_values"], torch.ones_like(kept[1]["pixel_values"]))


def test_everything_is_decoded_once_also_by_a_second_run(tmp_path, monkeypatch):
    codec = TokComStyleCodecConfig()
    for i, image in enumerate(shades(3, (codec.image_size, codec.image_size))):
        image.save(tmp_path / f"{i}.png")

    def run(report):
        records = load_documents(str(tmp_path), DataConfig(train="x"), "train", report)
        dataset = ImageDataset(records, "image", "", None, 0, True).fit(codec)
        part = PartReport("training data")
        return audit(dataset, part, report, "32"), part

    state = torch.get_rng_state()
    assert run(Report())[1].counts["resized"] == 0
    assert torch.equal(state, torch.get_rng_state())  # initial weights depend on it
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "__getitem__", lambda *a: pytest.fail("decoded again"))
        assert run(Report())[1].sizes["width"] == [codec.image_size] * 3
    (tmp_path / "1.png").write_bytes(b"broken now")
    with pytest.raises(ValueError, match=r"1\.png"):
        run(Report())


def test_a_picture_is_read_as_its_camera_was_held():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (32, 16)), "JPEG", exif=exif)
    assert Frames(content)[0].size == (16, 32)
    assert open_image(encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0")).size == (4, 4)


# ---- sounds ----


def tone(pitch: float, rate: int = 8000, length: int = 8000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(length) / rate)).astype(np.float32)


def same(found, wanted, error=0.02):
    assert found.dtype == np.float32 and found.ndim == 1 and abs(len(found) - len(wanted)) <= 1
    inner = slice(200, min(len(found), len(wanted)) - 200)
    assert np.abs(found[inner] - wanted[inner]).max() < error


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(
    "suffix, subtype",
    [
        ("wav", "PCM_16"),
        ("wav", "PCM_U8"),
        ("wav", "PCM_24"),
        ("wav", "PCM_32"),
        ("wav", "FLOAT"),
        ("wav", "DOUBLE"),
    ]
    + [("flac", "PCM_16"), ("flac", "PCM_24"), ("aiff", "PCM_16"), ("wav", "ULAW")],
)
def test_any_width_and_any_number_of_channels_is_read(suffix, subtype, channels, tmp_path):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(440)] * channels, 1), 8000, subtype)
    for value in (
        path,
        str(path),
        path.read_bytes(),
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    ):
        same(read_sound(value, 8000), tone(440), 0.03)


@pytest.mark.parametrize("rate", [11025, 16000, 22050, 44100, 48000, 8000.0])
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_any_rate_and_compression_is_resampled(suffix, rate, tmp_path):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(440, rate, int(rate)), int(rate))
    found = read_sound(path, 8000)
    spectrum = np.abs(np.fft.rfft(found[:8000] * np.hanning(len(found[:8000]))))
    assert abs(len(found) - 8000) < 1200 and abs(int(spectrum.argmax()) - 440) < 3
    config = preset_config("omni-tiny").codec_config.stream_configs()["audio"]
    assert (
        TokComAudioProcessor(config)([str(path), {"path": str(path)}])["input_features"].shape[0]
        == 2
    )


def test_an_mp3_that_does_not_say_its_length_is_read_to_its_end(tmp_path):
    """Its length can only be estimated: from its first frames, which here are noise or silence."""
    noise = np.random.default_rng(0).normal(0, 0.3, 16000 * 8).astype(np.float32)
    for silent in (slice(0, len(noise) // 2), slice(len(noise) // 2, None)):
        sound = noise.copy()
        sound[silent] = 0
        options = {"write_xing": "0"}
        with av.open(str(tmp_path / "a.mp3"), "w", options=options) as container:
            stream = container.add_stream("libmp3lame", rate=16000, layout="mono")
            stream.options = {"q": "4"}
            frame = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        found = read_sound(tmp_path / "a.mp3", 16000)
        assert abs(len(found) - len(sound)) < 4000
        power = [np.square(half).mean() for half in np.array_split(found, 2)]
        assert max(power) > 100 * min(power)


@pytest.mark.parametrize("name, kind", [("a.m4a", None), ("a.aac", "adts")])
def test_sounds_of_telephones_are_read(name, kind, tmp_path):
    with av.open(str(tmp_path / name), "w", format=kind) as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = tone(440, 16000, 16384)
        for start in range(0, 16384, 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    soundfile.write(
        tmp_path / "a.opus", tone(440, 48000, 48000), 48000, format="OGG", subtype="OPUS"
    )
    for file in (name, "a.opus"):
        found = read_sound(tmp_path / file, 8000)
        spectrum = np.abs(np.fft.rfft(found[:8000] * np.hanning(8000)))
        assert abs(int(spectrum.argmax()) - 440) < 3


STEREO = np.stack([tone(440), 0 * tone(440)])


@pytest.mark.parametrize(
    "value",
    [
        STEREO,
        STEREO.T,
        STEREO.tolist(),
        STEREO.T.tolist(),
        torch.from_numpy(STEREO),
        STEREO.astype(np.float64),
        torch.from_numpy(STEREO).bfloat16(),
    ]
    + [
        (STEREO * 32767).astype(np.int16),
        (STEREO.T * 32767).astype(np.int16),
        (STEREO * 127 + 128).astype(np.uint8),
    ],
)
def test_channels_are_mixed_in_either_layout(value):
    for form in (value, {"array": value, "sampling_rate": 8000}):
        same(read_sound(form, 8000), tone(440) / 2)
    half = {"array": value, "sampling_rate": 16000}
    assert len(read_sound(half, 8000)) == 4000


def test_a_list_of_numbers_is_one_sound_and_a_list_of_arrays_are_several():
    config = preset_config("omni-tiny").codec_config.stream_configs()["audio"]
    processor = TokComAudioProcessor(config)
    one, two = (
        processor(tone(440).tolist())["input_features"],
        processor([tone(440), tone(880)])["input_features"],
    )
    assert len(one) == 1 and len(two) == 2 and torch.equal(one[0], two[0])


def claims(content: bytes, samples: int) -> bytes:
    """A .wav of 44 bytes of header that claims other samples."""
    return (
        content[:4]
        + struct.pack("<I", 36 + samples)
        + content[8:40]
        + struct.pack("<I", samples)
        + content[44:]
    )


def broken_sounds(folder) -> dict[str, bytes]:
    write_wav(tone(440), folder / "a.wav", 8000)
    wav = (folder / "a.wav").read_bytes()
    soundfile.write(folder / "a.flac", tone(440), 8000)
    flac = (folder / "a.flac").read_bytes()
    info = int.from_bytes(flac[18:26], "big")  # rate, channels, bits, and in 36 bits the samples
    huge = flac[:18] + ((info & ~((1 << 36) - 1)) | (1 << 35)).to_bytes(8, "big") + flac[26:]
    write_wav(np.zeros(0), folder / "b.wav", 8000)
    nan = io.BytesIO()
    soundfile.write(nan, np.array([0.1, np.nan]), 8000, "FLOAT", format="WAV")
    return {
        "cut .wav": wav[:-999],
        "odd .wav": wav[:-1],
        "gigabytes": claims(wav, 2**31 - 100),
        "gigabytes of FLAC": huge,
        "cut FLAC": flac[: len(flac) // 2],
        "no samples": (folder / "b.wav").read_bytes(),
        "no header": wav[:30],
        "text": b"no sound",
        "nothing": b"",
        "not finite": nan.getvalue(),
    }


NAMES = [
    "cut .wav",
    "odd .wav",
    "gigabytes",
    "gigabytes of FLAC",
    "cut FLAC",
    "no samples",
    "no header",
]


@pytest.mark.parametrize("name", [*NAMES, "text", "nothing", "not finite"])
def test_empty_cut_and_lying_sounds_are_named(name, tmp_path):
    content = broken_sounds(tmp_path)[name]
    (tmp_path / "c.wav").write_bytes(content)
    for value in (content, str(tmp_path / "c.wav")):
        with pytest.raises(
            ValueError,
            match="record 3 .*(cut off|claims|without samples|no sound|empty|not finite)",
        ):
            read_sound(value, 8000, "record 3 (audio)")
    with pytest.raises(ValueError, match="c.wav"):
        read_wav(tmp_path / "c.wav")


def test_a_wav_that_was_written_to_a_pipe_is_read_to_its_end(tmp_path):
    write_wav(tone(440), tmp_path / "a.wav", 8000)
    wav = (tmp_path / "a.wav").read_bytes()
    piped = wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:]
    assert len(read_sound(piped, 8000)) == len(tone(440))


@pytest.mark.parametrize("kind", [("VORBIS", "ogg"), ("OPUS", "ogg"), ("mp3", "mp3")])
def test_compressed_sounds_that_are_cut_off_are_named(kind, tmp_path):
    codec, suffix = kind
    file = tmp_path / f"a.{suffix}"
    sound = np.random.default_rng(0).normal(0, 0.3, 16000 * 4).astype(np.float32)
    if suffix == "ogg":
        soundfile.write(file, sound, 16000, codec, format="OGG")
    else:
        soundfile.write(file, sound, 16000, format="MP3")
    content = file.read_bytes()
    assert abs(len(read_sound(content, 16000)) - len(sound)) < 4000
    file.write_bytes(content[: len(content) // 2])
    for value in (file, file.read_bytes()):
        with pytest.raises(ValueError, match="record 3 is cut off"):
            read_sound(value, 16000, "record 3")


@pytest.mark.parametrize(
    "value",
    [5, None, np.zeros((2, 3, 4)), np.array(["a"]), [[1.0], [1.0, 2.0]], np.zeros(0), object()],
)
def test_what_is_no_sound_gets_one_sentence(value):
    with pytest.raises(ValueError, match="record 3"):
        read_sound(value, 8000, "record 3")
    for number in ({}, {"sampling_rate": 0}, {"sampling_rate": None}):
        with pytest.raises(ValueError, match="record 3 is an array without `sampling_rate`"):
            read_sound({"array": tone(440), **number}, 8000, "record 3")
    facts = {}
    assert len(read_sound(tone(440).tolist(), 8000, facts=facts)) == 8000
    assert facts["of no known rate, taken as the model's"]


def test_a_long_sound_is_read_only_as_far_as_it_is_used_and_what_was_done_is_told(tmp_path):
    long = np.stack([tone(440, 44100, 60 * 44100)] * 2, 1)
    soundfile.write(tmp_path / "a.wav", long, 44100)
    facts = {}
    found = read_sound(tmp_path / "a.wav", 8000, seconds=2, facts=facts)
    assert 2 * 8000 <= len(found) <= 3.1 * 8000
    assert facts == {"mixed to one channel": True, "resampled": True, "seconds": 60.0}
    whole = read_sound(tmp_path / "a.wav", 8000)
    assert np.array_equal(found[: 2 * 8000], whole[: 2 * 8000])


def test_pictures_of_the_processor_and_of_training_are_the_same():
    content = encoded(Image.effect_noise((50, 40), 60).convert("RGB"), "PNG")
    records = datasets.Dataset.from_dict({"image": [content]})
    codec = TokComStyleCodecConfig()
    item = ImageDataset(records, "image", "", None, 0, False).fit(codec)[0]
    wanted = TokComImageProcessor(codec.image_size)(open_image(content))["pixel_values"][0]
    assert torch.equal(item["pixel_values"], wanted)
