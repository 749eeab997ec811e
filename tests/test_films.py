"""Films and animations as they lie on people's disks: which frames are read, and what is named
instead."""

import io
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import encoded, shades
from PIL import Image

from tokcom.codec_video_tokcom import encode_clips
from tokcom.configuration_media_tokcom import TokComVideoCodecConfig
from tokcom.pictures_tokcom import Film, Frames, is_film, repeats, steps_of, timeline
from tokcom.processing_tokcom import write_wav
from tokcom.training.audit import audit
from tokcom.training.config import DataConfig
from tokcom.training.films import write_film
from tokcom.training.images import ImageDataset, clip_starts
from tokcom.training.report import PartReport, Report
from tokcom.training.sources import load_documents

av = pytest.importorskip("av")


def noise(count: int) -> list[Image.Image]:
    levels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in levels]


def film(path, frames, rate=8, rotation=None, codec="libx264", **options):
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def turned(path, quarter_turns: int):
    """Set the display matrix in the track header of an mp4."""
    content = path.read_bytes()
    place = content.index(b"tkhd") + 4 + 40
    cos, sin = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}[quarter_turns]
    fixed = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    path.write_bytes(content[:place] + struct.pack(">9i", *fixed) + content[place + 36 :])
    return path


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_a_clip_is_turned_as_its_container_says(quarter_turns, tmp_path):
    image = Image.new("RGB", (64, 48), "black")
    image.paste(
        "white", (0, 0, 20, 20)
    )  # at the top left, and after a quarter turn clockwise at the top right
    path = turned(film(tmp_path / "a.mp4", [image] * 3), quarter_turns)
    (frame,) = Frames(str(path)).clip(0, 1)
    assert frame.size == ((64, 48), (48, 64))[quarter_turns % 2]
    corner = [(5, 5), (-6, 5), (-6, -6), (5, -6)][quarter_turns]
    assert frame.getpixel((corner[0] % frame.width, corner[1] % frame.height))[0] > 200


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "webm", "mpg", "ts", "m4v", "flv"])
def test_containers_are_told_by_their_content_whatever_their_name(suffix, tmp_path):
    codec = {"webm": "libvpx", "mpg": "mpeg2video", "avi": "mpeg4", "flv": "flv"}.get(
        suffix, "libx264"
    )
    path = film(tmp_path / f"a.{suffix}", shades(6), 25, codec=codec)
    (tmp_path / "a.gif").write_bytes(path.read_bytes())
    for value in (str(path), path.read_bytes(), {"bytes": None, "path": str(tmp_path / "a.gif")}):
        assert is_film(value) and len(Frames(value)) == 6


@pytest.mark.parametrize("brand", [b"avif", b"avis", b"heic", b"mif1"])
def test_pictures_in_a_container_of_films_are_pictures(brand):
    assert not is_film(b"\0\0\0\x20ftyp" + brand + bytes(20))
    content = encoded(Image.new("RGB", (16, 16), "red"), "AVIF")
    assert content[4:8] == b"ftyp" and len(Frames(content)) == 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "mp4"])
@pytest.mark.parametrize("fps", [8, 12.5, 29.97])
def test_still_frames_that_are_written_are_read_again(suffix, fps, tmp_path):
    noise = Image.effect_noise((32, 32), 80).convert("RGB")
    frames = [noise] * 4 + [Image.new("RGB", (32, 32), (200, 10, 10))] * 4
    write_film(frames, tmp_path / f"a.{suffix}", fps)
    read = Frames(str(tmp_path / f"a.{suffix}"))
    assert len(read) == 8
    for i, frame in enumerate(read.clip(0, 8)):
        error = np.abs(np.asarray(frame.convert("RGB"), float) - np.asarray(frames[i], float))
        assert error.mean() < (0.5 if suffix != "mp4" else 12)
    if suffix == "mp4":
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert abs(float(container.streams.video[0].average_rate) - fps) < 0.001
    else:
        with Image.open(tmp_path / f"a.{suffix}") as image:
            assert abs(seconds(image) - 8 / fps) < 0.011


def seconds(image) -> float:
    total = 0
    for i in range(image.n_frames):
        image.seek(i)
        image.load()
        total += image.info["duration"]
    return total / 1000


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_a_frame_that_stays_longer_is_there_several_times(kind):
    images = [Image.effect_noise((32, 32), 20 * i + 20).convert("RGB") for i in range(3)]
    content = encoded(
        images[0], kind, save_all=True, append_images=images[1:], duration=[100, 300, 100]
    )
    with Image.open(io.BytesIO(content)) as image:
        assert timeline(image) == [0, 1, 1, 1, 2]
    clip = Frames(content).clip(0, 6)
    assert [clip[1].tobytes() == frame.tobytes() for frame in clip] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "durations, wanted",
    [
        ([125] * 8, [1] * 8),
        ([500, 500], [1, 1]),
        ([500, 125, 500], [4, 1, 4]),
        ([30, 30, 40, 30], [1, 1, 1, 1]),  # 30 a second in steps of 10 ms
        ([100, 150], [2, 3]),
        ([0, 0, 0], [1, 1, 1]),
        ([10, 100], [1, 1]),
        ([40, 40, 2000], [1, 1, 50]),
    ],
)
def test_durations_become_steps_of_one_rate(durations, wanted):
    assert repeats(durations) == wanted


def test_cut_and_empty_films_are_named_and_long_ones_are_not_kept(tmp_path, monkeypatch):
    frames = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(30)]
    path = film(tmp_path / "a.mkv", frames)
    monkeypatch.setattr("tokcom.pictures_tokcom.KEPT_FRAMES", 5 * 64 * 64 * 3)
    long = Frames(str(path))
    assert len(long) == 30 and len(long.source.kept) == 5 and len(long.clip(20, 12)) == 12
    monkeypatch.undo()
    whole = Frames(str(path)).clip(20, 12)
    assert all(np.array_equal(a, b) for a, b in zip(long.clip(20, 12), whole))
    fast = film(tmp_path / "fast.mp4", frames, options={"movflags": "faststart"})
    fast.write_bytes(fast.read_bytes()[: fast.stat().st_size // 2])
    with pytest.raises(ValueError, match="record 7 (is cut off: .* of its 30|holds no film)"):
        Frames(str(fast), "record 7")
    for content in (
        path.read_bytes()[:60],
        b"\0\0\0\x20ftypisom" + bytes(100),
        b"\x1a\x45\xdf\xa3",
    ):
        with pytest.raises(ValueError, match="record 7"):
            Frames(content, "record 7")
    write_wav(np.zeros(800), tmp_path / "a.wav", 8000)
    with pytest.raises(ValueError, match="x holds no film"):
        Film(str(tmp_path / "a.wav"), "x")


def test_clips_that_are_too_short_end_with_their_last_frame_and_are_counted(tmp_path):
    for name, count in (("short", 3), ("long", 12), ("right", 8)):
        write_film(shades(count), tmp_path / f"{name}.gif")
    report, part = Report(), PartReport("training data")
    records = load_documents(str(tmp_path), DataConfig(train="x"), "train", report)
    dataset = ImageDataset(records, "image", "", None, 0, True).fit(
        TokComVideoCodecConfig(num_frames=8)
    )
    audit(dataset, part, report, "8 frames")
    assert part.counts["padded with their last frame"] == 1 == part.counts["longer than a clip"]
    assert sorted(part.sizes["frames"]) == [3, 8, 12] and "23 in all" in "\n".join(part.lines())
    short = dataset[
        [i for i, row in enumerate(records["image"]) if row["path"].endswith("short.gif")][0]
    ]["pixel_values"]
    assert torch.equal(short[:, 2], short[:, 7]) and not torch.equal(short[:, 1], short[:, 2])


CONTAINERS = {
    "mkv": "libx264",
    "webm": "libvpx",
    "avi": "mpeg4",
    "flv": "flv",
    "mp4": "libx264",
    "mov": "libx264",
    "mpg": "mpeg2video",
}


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "flv", "mp4", "mov"])
def test_a_film_that_is_cut_off_is_named_in_every_container_that_says_its_length(
    suffix, share, tmp_path
):
    path = film(tmp_path / f"a.{suffix}", noise(24), 25, codec=CONTAINERS[suffix])
    assert len(Frames(str(path))) == 24
    content = path.read_bytes()
    with pytest.raises(ValueError, match="record 7 (is cut off|holds no film that can be)"):
        Frames(content[: int(share * len(content))], "record 7")


@pytest.mark.parametrize("suffix", ["mkv", "flv", "mp4"])
def test_damage_that_a_decoder_notices_is_named(suffix, tmp_path):
    path = film(tmp_path / f"a.{suffix}", noise(24), 25, codec=CONTAINERS[suffix])
    content = bytearray(path.read_bytes())
    quarter = len(content) // 4
    content[2 * quarter : 3 * quarter] = bytes(quarter)
    with pytest.raises(ValueError, match="record 7 (is cut off|holds no film that can be)"):
        Frames(bytes(content), "record 7")


def test_a_film_with_sound_alone_and_a_stream_of_a_camera_are_told(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="record 7 holds no film .*it has no pictures"):
        Frames(str(tmp_path / "a.mp4"), "record 7")
    path = film(tmp_path / "a.m2ts", shades(6), 25, format="mpegts")
    assert path.read_bytes()[4:5] == b"G" and len(Frames(str(path))) == 6
    assert not is_film(b"GIF89a" + bytes(182) + b"G" + bytes(100))


def test_an_avi_whose_header_counts_frames_that_stay_is_whole(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for image, place in zip(shades(6), (0, 1, 2, 8, 9, 10)):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = place, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert Frames(str(tmp_path / "a.avi")).steps == [0, 1, 2, 2, 2, 2, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_frame_that_a_film_shows_longer_is_there_several_times(suffix, tmp_path):
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(shades(6), (0, 125, 250, 375, 1000, 1125)):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = Frames(str(tmp_path / f"a.{suffix}"))
    assert frames.steps == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5]
    levels = [frame.getpixel((9, 9))[0] for frame in frames.clip(2, 6)]
    assert len(set(levels[1:])) == 1 and levels[0] < levels[1]


def test_times_that_waver_are_of_one_rate():
    assert steps_of([0, 0.033, 0.067, 0.1]) == [0, 1, 2, 3]
    assert steps_of([0.0]) == [0] and steps_of([]) == []
    assert steps_of([0, -1.0, 0.1]) == [0, 1, 2]  # a container without times
    assert steps_of([0, 0.1, 0.2, 0.5]) == [0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_rate_that_a_format_cannot_show_is_refused(suffix, tmp_path):
    with pytest.raises(ValueError, match=r"`fps` \(60\) is more than the 50"):
        write_film(shades(3), tmp_path / f"a.{suffix}", 60)
    write_film(shades(3), tmp_path / f"b.{suffix}", 50)
    assert len(Frames(str(tmp_path / f"b.{suffix}"))) == 3
    write_film(shades(6), tmp_path / "a.mp4", 60)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 60


def test_films_are_encoded_once_in_batches_as_the_clips_that_follow_each_other(
    tmp_path, monkeypatch
):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(8,), latent_channels=4, norm_num_groups=4
    ).eval()
    for name, count in (("a", 3), ("b", 4), ("c", 9)):
        write_film(
            [Image.effect_noise((32, 32), 9 * i + 9) for i in range(count)],
            tmp_path / f"{name}.gif",
        )
    records = load_documents(str(tmp_path), DataConfig(train="x"), "train", Report())

    def dataset():
        return ImageDataset(records, "image", "", None, 0, True).fit(
            TokComVideoCodecConfig(num_frames=4), vae
        )

    data = dataset()
    plain = [encode_clips(vae, data._pixels(data.frames(i), 0)[None])[0] for i in (0, 1)]
    starts = (0, 4, 5)  # of clips of 4 in 9 frames
    long = [encode_clips(vae, data._pixels(data.frames(2), i)[None])[0] for i in starts]
    data.encode_once(torch.device("cpu"), batch_size=2)
    monkeypatch.setattr(
        "tokcom.training.images.encode_clips", lambda *a: pytest.fail("encoded again")
    )
    again = dataset()
    again.encode_once(torch.device("cpu"))
    drawn = set()
    for epoch in range(12):
        again.set_epoch(epoch)
        for index in (0, 1):
            torch.testing.assert_close(again[index]["pixel_values"], plain[index])
        found = again[2]["pixel_values"]
        drawn |= {i for i in range(3) if torch.allclose(found, long[i], atol=1e-5)}
    assert drawn == {0, 1, 2}


def test_clips_follow_each_other_and_the_last_one_ends_the_film():
    assert [clip_starts(count, 4) for count in (1, 4, 5, 8, 9)] == [
        [0],
        [0],
        [0, 1],
        [0, 4],
        [0, 4, 5],
    ]
