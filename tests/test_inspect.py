"""`tokcom inspect`: the report of what a preset reads, counted from what its loader yields, and a
contact sheet."""

import io
import json
import re

import datasets
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from tokcom.cli.inspect import main
from tokcom.processing_tokcom import write_wav
from tokcom.training.config import load_train_config
from tokcom.training.corpora import read_data
from tokcom.training.films import write_film

# with which a preset reads the few records of a test
SMALL = ("codec.batch_size=1", "flow.batch_size=1")


def inspect(capsys, *arguments) -> str:
    main([*map(str, arguments), *SMALL])
    return capsys.readouterr().out


def everything(folder):
    """A folder of all kinds at once, as people have them."""
    write_film([Image.new("RGB", (40, 30), (i, 9, 9)) for i in range(12)], folder / "film.mp4")
    write_film([Image.new("RGB", (32, 32), (i, 9, 9)) for i in range(5)], folder / "moving.gif")
    for i, suffix in enumerate(("png", "JPG", "tif", "avif", "webp")):
        Image.new("RGB", (40 + i, 30), (50 * i, 0, 0)).save(folder / f"{i}.{suffix}")
    (folder / "0.txt").write_text("a black picture")
    (folder / "README.md").write_text("# My data")
    (folder / "notes.txt").write_text("some notes\n")
    (folder / "more").mkdir()
    (folder / "more/.DS_Store").write_bytes(b"x")
    write_wav(np.sin(np.arange(8000)), folder / "more/sound.wav", 8000)
    return folder


def test_a_folder_of_all_kinds_at_once_is_reported(tmp_path, capsys):
    folder = everything(tmp_path)
    report = inspect(capsys, folder, "--preset", "style-tiny", "--sheet", tmp_path / "sheet.PNG")
    for line in (
        "6 pictures, 1 clip",
        "12 files found, 8 used, 4 left out",
        "left out (no kind of file that is read): README.md",
        "left out (hidden): more/.DS_Store",
        "left out (text beside picture and clip files): notes.txt",
        "left out (sound beside picture and clip files): more/sound.wav",
        "captions from text files of the same name: 1 of 7",
        "7 records, 6 resized, 6 with sides cut off, 1 with a caption, 2 animated",
        "['a black picture']",
    ):
        assert line in report, report
    assert Image.open(tmp_path / "sheet.PNG").size[0] > 300


def test_the_same_folder_is_read_as_another_preset_asks(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    folder = everything(tmp_path / "data")
    sheet = ("--sheet", tmp_path / "sheet.png")
    report = inspect(capsys, folder, "--preset", "debug", *sheet)
    assert (
        "picture beside texts" in report
        and "notes.txt" not in report.split("training text")[0].split("fields")[0]
    )
    report = inspect(capsys, folder, "--preset", "video-tiny", *sheet)
    assert (
        "7 records" in report
        and "6 padded with their last frame" in report
        and "1 longer than a clip" in report
    )
    (folder / "table.csv").write_text("id;text\n1;a text of a table\n")
    for kind in ([], ["data.kind=text"]):
        report = inspect(capsys, folder, "--preset", "tiny", *kind, *sheet)
        for line in (
            "left out (clip beside texts): film.mp4",
            "left out (sound beside texts): more/sound.wav",
            "2 records, fields text",
            "3 documents, ",
            "example 3: 'a text of a table'",
        ):
            assert line in report, report
    fields = "data.fields={text: caption, image: image, audio: audio}"
    (folder / "film.mp4").unlink()
    report = inspect(capsys, folder, "--preset", "omni-tiny", fields, *sheet)
    assert (
        "7 records" in report
        and "1 with audio" in report
        and "1 with text" in report
        and "6 with image" in report
    )


def test_records_of_several_streams_of_which_one_cannot_be_read_are_counted(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "1.png").write_bytes(b"broken")
    given = tmp_path, "--preset", "omni-tiny", "data.fields={text: caption, image: image}"
    sheet = ("--sheet", tmp_path / "sheet.jpg")
    with pytest.raises(SystemExit, match="record 1 .*1.png.* holds no picture.*data.max_skipped=1"):
        inspect(capsys, *given, *sheet)
    report = inspect(capsys, *given, *sheet, "data.max_skipped=1")
    assert "2 records, 2 with text, 2 with image" in report and "1 record left out" in report
    with pytest.raises(SystemExit, match="several streams, which the preset does not read"):
        inspect(capsys, tmp_path, "--preset", "debug", given[3], *sheet)


@pytest.mark.parametrize(
    "preset, data, wanted",
    [
        ("style-tiny", "emoji_validation.parquet", "8 records, 8 resized, 8 with a caption"),
        ("video-tiny", "clips_validation.parquet", "frames: 8 to 8, median 8, 128 in all"),
        ("omni-tiny", "streams_validation.parquet", "18 with image, 10 with audio"),
        ("debug", "stories_validation.jsonl", "8 documents, "),
    ],
)
def test_shipped_data_are_reported_with_three_examples(preset, data, wanted, tmp_path, capsys):
    report = inspect(
        capsys, ROOT / "sample_data" / data, "--preset", preset, "--sheet", tmp_path / "a.png"
    )
    assert (
        wanted in report
        and "example 3:" in report
        and "example 4:" not in report
        and "validation" not in report.split("training")[1]
    )
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    "preset, data, refusal",
    [
        ("style-tiny", "text", "'tokcom_style_codec' reads pictures but the data are texts"),
        ("debug", "pictures", "'tokcom_chunk_codec' reads texts but the data are pictures"),
        ("debug", "short", "fewer than one batch"),
        ("style-tiny", "one batch", "31 pictures, fewer than one batch of 32"),
        ("debug", "stream", "a stream has no last documents to hold out"),
    ],
)
def test_data_that_a_preset_would_refuse_are_reported_and_then_refused(
    preset, data, refusal, tmp_path, capsys
):
    settings = []
    if data in ("pictures", "one batch"):
        for i in range(3 if data == "pictures" else 32):
            Image.new("RGB", (8, 8), (7 * i, 0, 0)).save(tmp_path / f"{i}.png")
        settings = ["codec.batch_size=32", "flow.batch_size=32"]
    else:
        text = "hi" if data == "short" else "once upon a time. " * 5000
        (tmp_path / "a.txt").write_text(text)
    if data == "stream":
        settings = ["data.streaming=true"]
    sheet = ["--sheet", str(tmp_path / "sheet" / "a.jpg")]
    (tmp_path / "sheet").mkdir()
    with pytest.raises(SystemExit, match=refusal):
        main([str(tmp_path), "--preset", preset, *sheet, *settings])
    assert "data that were read" in capsys.readouterr().out
    # nobody has said which model they are for
    if preset == "debug":
        main([str(tmp_path), *sheet, *settings])


def test_what_training_reads_is_printed_before_the_first_stage_and_counts_what_is_held_out(
    tmp_path, capsys
):
    lines = [json.dumps({"text": f"story {i} of {tmp_path}"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": " "}', *lines, '{"text": 5}']))
    settings = [f"data.train={tmp_path / 'a.jsonl'}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"a.jsonl, record 61 \(line 62\)"):
        read_data(load_train_config("debug", settings))
    corpus = read_data(
        load_train_config("debug", [*settings, "data.max_skipped=1", "data.num_proc=2"])
    )
    printed = capsys.readouterr().out
    assert (
        "61 records" in printed
        and "60 documents" in printed
        and f"{len(corpus.train):,} tokens" in printed
    )
    assert "1 blank and left out" in printed and "1 record left out (data.max_skipped=1)" in printed
    assert corpus.tokenizer.init_kwargs["training_characters"].startswith(" ")


def test_a_record_keeps_its_number_where_records_are_drawn(tmp_path):
    rows = [_picture(10 * i) for i in range(9)]
    datasets.Dataset.from_dict({"image": [*rows[:7], b"broken", *rows[7:]]}).to_parquet(
        tmp_path / "a.parquet"
    )
    settings = [f"data.train={tmp_path / 'a.parquet'}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"record 7 \(image\) holds no picture"):
        read_data(load_train_config("style-tiny", settings))


def _picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_dialogues_and_streams_of_text_are_reported(tmp_path, capsys):
    lines = [json.dumps({"prompt": f"what is {i}?", "answer": "a number"}) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = inspect(capsys, tmp_path / "a.jsonl", "--sheet", tmp_path / "a.png")
    assert "5 records, fields prompt, answer" in report and "'what is 0?' -> 'a number'" in report
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": f"story {i}"}) for i in range(5))
    )
    report = inspect(
        capsys, tmp_path / "b.jsonl", "data.streaming=true", "--sheet", tmp_path / "a.png"
    )
    assert "a stream of records" in report


@pytest.mark.parametrize(
    "data, settings, named",
    [
        ("pictures", ["data.caption_column=captoin"], "captoin"),
        ("pictures", ["data.kind=smells"], "data.kind.*smells"),
        ("pictures", [], "broken.png.*data.max_skipped=1"),
        ("nowhere", [], "nowhere"),
    ],
)
def test_what_cannot_be_read_ends_with_one_sentence(data, settings, named, tmp_path):
    (tmp_path / "pictures").mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "pictures/broken.png").write_bytes(buffer.getvalue()[:-500])
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        main(
            [
                str(tmp_path / data),
                "--preset",
                "style-tiny",
                "--sheet",
                str(tmp_path / "a.png"),
                *settings,
            ]
        )


def test_clips_in_a_column_of_another_name_are_found_in_the_message(tmp_path):
    datasets.Dataset.from_dict({"video": [b"x"], "label": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match="fields: video, label.*data.image_column"):
        main([str(tmp_path / "a.parquet"), "--preset", "video-tiny"])


def test_the_table_of_inputs_names_tests_that_there_are():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/history.md").read_text(encoding="utf-8")))
    there = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 10 and named <= there
