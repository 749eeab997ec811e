"""Folders as they lie on people's disks: which files are read, as what, and with which captions."""

import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from tokcom.pictures_tokcom import Frames
from tokcom.processing_tokcom import write_wav
from tokcom.training.config import DataConfig
from tokcom.training.files import kind_of, list_files, natural_key
from tokcom.training.films import write_film
from tokcom.training.images import ImageDataset
from tokcom.training.report import Report
from tokcom.training.sources import load_documents


def read(path, report=None, **options):
    return load_documents(str(path), DataConfig(train="x", **options), "train", report)


def texts(path, **options) -> list[str]:
    return read(path, Report(), **options)["text"][:]


def draw(path, shade: int = 0, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path, **options)


@pytest.mark.parametrize(
    "name",
    ["A.TXT", "a.Text", "a.JSONL", "a.Csv", "a.NDJSON", "a.Parquet", "a.txt.gz", "a.jsonl.GZ"],
)
def test_a_suffix_counts_in_any_case_and_behind_a_compression(name, tmp_path):
    import gzip

    content = {
        "t": "a text",
        "j": json.dumps({"text": "a text"}),
        "n": json.dumps({"text": "a text"}),
        "c": "text\na text\n",
    }
    path = tmp_path / name
    if name == "a.Parquet":
        datasets.Dataset.from_dict({"text": ["a text"]}).to_parquet(path)
    else:
        data = content[name.lower()[2]].encode()
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert texts(path) == texts(tmp_path) == ["a text"]


def test_what_systems_and_editors_leave_behind_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    for name in (
        ".hidden.txt",
        "._a.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "__MACOSX/a.txt",
        ".git/b.txt",
        "Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no text of the data")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    report = Report()
    assert read(tmp_path, report)["text"][:] == ["a text"]
    found = report.sources[0].listing.left_out
    assert found["hidden"] == [".git", ".hidden.txt"] and found["notebook checkpoints"] == [
        ".ipynb_checkpoints"
    ]
    assert sorted(found["system file"]) == ["._a.txt", "Thumbs.db", "__MACOSX"]
    assert found["empty"] == ["empty.txt"] and found["broken link"] == ["gone.txt"]
    assert "8 left out" in str(report) and "empty.txt" in str(report)
    assert texts(tmp_path / ".hidden.txt") == [
        "no text of the data"
    ]  # which is asked for by its name


@pytest.mark.parametrize("name", ["a[1]", "a?", "a*", "[ab]", "a{1,2}", "~a", "a#b", "ä ö%20"])
def test_a_file_name_is_no_pattern(name, tmp_path):
    for other in ("a1", "ab", "a", "a2"):
        (tmp_path / f"{other}.txt").write_text("another file")
        datasets.Dataset.from_dict({"text": ["another file"]}).to_parquet(
            tmp_path / f"{other}.parquet"
        )
    (tmp_path / f"{name}.txt").write_text("the file")
    datasets.Dataset.from_dict({"text": ["the file"]}).to_parquet(tmp_path / f"{name}.parquet")
    assert texts(tmp_path / f"{name}.txt") == texts(tmp_path / f"{name}.parquet") == ["the file"]
    (tmp_path / "folders" / name).mkdir(parents=True)
    (tmp_path / f"{name}.txt").rename(tmp_path / "folders" / name / f"{name}.txt")
    draw(tmp_path / "pictures" / name / f"{name}.png")
    assert texts(tmp_path / "folders" / name) == ["the file"]
    assert len(read(tmp_path / "pictures" / name)) == 1


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (tmp_path / "data/a/1.txt").write_text("one")
    (tmp_path / "far/2.txt").write_text("two")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/up").symlink_to("..")
    (tmp_path / "data/0far").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/3.txt").symlink_to(tmp_path / "far/2.txt")
    listing = list_files(tmp_path / "data")
    assert [str(p.relative_to(tmp_path / "data")) for p in listing.files] == [
        "0far/2.txt",
        "3.txt",
        "a/1.txt",
    ]
    assert len(listing.left_out["link to a folder that is read already"]) == 3


def test_kinds_that_lie_together_are_all_read_or_named(tmp_path):
    for i, suffix in enumerate(
        ("png", "jpg", "tif", "TIFF", "avif", "webp", "bmp", "gif", "jfif", "ppm")
    ):
        Image.new("RGB", (8, 8)).save(
            tmp_path / f"{i}.{suffix}", {"TIFF": "TIFF", "jfif": "JPEG"}.get(suffix)
        )
    write_film([Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(4)], tmp_path / "film.mp4")
    records = read(tmp_path)
    assert len(records) == 11
    for row in records["image"]:
        assert Frames(row)[0].size[0] in (8, 16)
    (tmp_path / "notes.txt").write_text("what these pictures are")
    with pytest.warns(UserWarning, match=r"left out \(text beside .*: notes.txt"):
        assert len(read(tmp_path)) == 11


@pytest.mark.parametrize(
    "kind, count, named",
    [("text", 2, "cover.jpg"), ("pictures", 1, "a.txt"), (None, 2, "cover.jpg")],
)
def test_texts_beside_a_cover_are_read_as_the_run_asks_and_the_rest_is_named(
    kind, count, named, tmp_path
):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    draw(tmp_path / "cover.jpg")
    report = Report()
    assert len(read(tmp_path, report, kind=kind)) == count
    assert named in str(report)


def test_texts_of_several_formats_are_read_and_what_holds_none_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "c.csv").write_text("text;id\nthree;3\n")
    (tmp_path / "d.csv").write_text("name,price\nx,3\n")
    datasets.Dataset.from_dict({"text": ["four"]}).to_parquet(tmp_path / "e.parquet")
    for kind in (None, "text"):
        report = Report()
        found = read(tmp_path, report, kind=kind)["text"][:]
        assert sorted(found) == ["four", "one", "three", "two"]
        assert "left out (table without field 'text'): d.csv" in str(report)
    (tmp_path / "b.jsonl").write_text('{"prompt": "what?", "answer": "that"}\n')
    with pytest.raises(ValueError, match="holds texts .* dialogues .json.; give the files of one"):
        read(tmp_path)
    with pytest.raises(ValueError, match="holds no file that is read.*kind of file.*b.xyz"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other/b.xyz").write_text("x")
        read(tmp_path / "other")


@pytest.mark.parametrize("field", ["caption", "text"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_metadata_holds_captions_in_any_format(suffix, field, tmp_path):
    rows = [{"file_name": f"sub/{i}.png", field: f"picture, {i}"} for i in range(3)]
    for i in range(3):
        draw(tmp_path / "sub" / f"{i}.png", i)
    file = tmp_path / f"metadata.{suffix}"
    if suffix == "jsonl":
        file.write_text(
            "\ufeff" + "".join(json.dumps(row) + "\n" for row in reversed(rows)), encoding="utf-8"
        )
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    elif suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        mark = "\t" if suffix == "tsv" else ","
        lines = [f'{row["file_name"]}{mark}"{row[field]}"' for row in rows]
        file.write_text("\n".join([f"file_name{mark}{field}", *lines]), encoding="utf-8-sig")
    records = read(tmp_path)
    assert [(r["image"]["path"][-5:], r["caption"]) for r in records] == [
        (f"{i}.png", f"picture, {i}") for i in range(3)
    ]


@pytest.mark.parametrize("suffix", ["txt", "TXT", "caption", "text"])
def test_texts_of_the_same_name_are_captions(suffix, tmp_path):
    for i in range(3):
        draw(tmp_path / f"{i}.{('png', 'JPG', 'webp')[i]}", i)
    (tmp_path / f"0.{suffix}").write_text("\ufeffeine Kuh\r\n", encoding="utf-8")
    (tmp_path / f"1.{suffix}").write_text("a cow\nthe same cow\n")
    draw(tmp_path / "3.png")
    (tmp_path / f"3.png.{suffix}").write_text("a dog")
    report = Report()
    assert read(tmp_path, report)["caption"][:] == [
        ["eine Kuh"],
        ["a cow", "the same cow"],
        [],
        ["a dog"],
    ]
    assert "3 of 4" in str(report)


def test_names_of_folders_are_captions_and_only_none_means_none(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / name / "1.png")
    assert read(tmp_path)["caption"][:] == ["cat", "dog"]
    assert read(tmp_path, caption_column="none").column_names == ["image"]
    with pytest.raises(ValueError, match="captoin"):
        read(tmp_path, caption_column="captoin")
    draw(tmp_path / "loose.png")
    report = Report()
    captions = {row["image"]["path"][-8:]: row["caption"] for row in read(tmp_path, report)}
    assert captions == {"at/1.png": "cat", "og/1.png": "dog", "oose.png": ""}
    assert "1 file outside of them without one" in str(report)


@pytest.mark.parametrize("source", ["metadata", "parquet", "jsonl"])
def test_a_column_that_is_asked_for_and_missing_is_an_error_with_the_near_miss(source, tmp_path):
    draw(tmp_path / "p/1.png")
    row = {"title": "x", "Caption_en": "a cat"}
    if source == "metadata":
        (tmp_path / "p/metadata.jsonl").write_text(json.dumps({"file_name": "1.png", **row}))
    elif source == "parquet":
        rows = {name: [value] for name, value in row.items()} | {
            "image": [(tmp_path / "p/1.png").read_bytes()]
        }
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "p.parquet")
    else:
        (tmp_path / "p.jsonl").write_text(json.dumps({"image": str(tmp_path / "p/1.png"), **row}))
    path = tmp_path / "p" if source == "metadata" else tmp_path / f"p.{source}"
    with pytest.raises(
        ValueError,
        match="caption_eng.*fields: .*Caption_en.*did you mean 'Caption_en'.*data.caption_column",
    ):
        read(path, caption_column="caption_eng")
    assert read(path, caption_column="Caption_en")["Caption_en"][:] == ["a cat"]
    report = Report()
    assert "caption" not in read(path, report).column_names and "no captions" in str(report)
    with pytest.raises(ValueError, match="no captions in 'caption' .fields: .*'none' to train"):
        read(path, caption_column="caption")
    with pytest.raises(ValueError, match="no field 'imagge'"):
        read(
            tmp_path / "p.parquet" if source == "parquet" else write_table(tmp_path),
            image_column="imagge",
        )


def test_captions_that_are_asked_for_must_be_there_in_folders_of_any_kind(tmp_path):
    draw(tmp_path / "1.png")
    for folder in (False, True):
        with pytest.raises(ValueError, match="no captions in 'caption'.*'none' to train without"):
            read(tmp_path, caption_column="caption", frame_folders=folder)
    (tmp_path / "1.txt").write_text("a cat")
    assert read(tmp_path, caption_column="caption")["caption"][:] == ["a cat"]
    assert read(tmp_path, caption_column="none").column_names == ["image"]


def write_table(folder):
    datasets.Dataset.from_dict({"image": [b"x"], "title": ["x"]}).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def test_a_caption_that_cannot_be_read_is_a_problem_of_its_picture(tmp_path):
    for i in range(3):
        draw(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_bytes("café".encode("latin-1" if i == 1 else "utf-8"))
    with pytest.raises(ValueError, match="1.txt: byte 3 .*caption of 1.png.*data.max_skipped=1"):
        read(tmp_path)
    report = Report(1)
    assert read(tmp_path, report)["caption"][:] == ["café", "café"]
    assert "left out (caption that cannot be read): 1.png" in str(report)
    rows = [{"file_name": f"{i}.png", "text": "a" if i else 5} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"record 0 .line 1.: the caption of 0.png is the number 5"
    ):
        read(tmp_path)
    assert read(tmp_path, Report(1))["caption"][:] == ["a", "a"]


@pytest.mark.parametrize("written", ["in\\café.png", "./in/café.png", "in/caf\u0065\u0301.png"])
def test_files_are_found_as_other_systems_write_their_names(written, tmp_path):
    draw(tmp_path / "in/café.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{written},a cup\n", encoding="utf-8")
    assert read(tmp_path)["caption"][:] == ["a cup"]
    (tmp_path / "metadata.csv").write_text("filename,text\nin/café.png,a cup\n")
    with pytest.raises(ValueError, match="no field 'file_name'.*did you mean 'filename'"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_pictures_in_a_table_are_found_beside_it(suffix, tmp_path):
    draw(tmp_path / "in/1.png")
    rows = [{"image": "in/1.png", "caption": "a cup"}]
    text = {"csv": "image,caption\nin/1.png,a cup\n", "json": json.dumps(rows)}
    (tmp_path / f"a.{suffix}").write_text(text.get(suffix, json.dumps(rows[0]) + "\n"))
    (row,) = read(tmp_path / f"a.{suffix}")
    assert Frames(row["image"])[0].size == (8, 8) and row["caption"] == "a cup"


def test_captions_of_a_table_may_be_texts_beside_lists_and_other_fields_anything(tmp_path):
    draw(tmp_path / "1.png")
    values = [None, ["two", "three"], "one", 5]
    rows = [{"image": "1.png", "caption": v, "id": i or "x"} for i, v in enumerate(values)]
    del rows[0]["caption"]  # the first record does not tell all fields
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"record 3 \(line 4\): its caption is the number 5"):
        read(tmp_path / "a.jsonl")
    found = read(tmp_path / "a.jsonl", Report(1))
    assert found["caption"][:] == [None, ["two", "three"], ["one"]]
    with pytest.raises(ValueError, match="field 'id' of .* holds values of several kinds"):
        read(tmp_path / "a.jsonl", Report(1), fields={"image": "image", "text": "id"})


def test_what_is_no_file_of_data_is_named_and_does_not_stop_a_run(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    os.mkfifo(tmp_path / "pipe.txt")  # which would wait for someone to write
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    (tmp_path / "c.zip").write_bytes(b"x")
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb") as stream:
        stream.write(b"whose name is no UTF-8")
    report = Report()
    assert read(tmp_path, report)["text"][:] == ["a text"]
    assert report.sources[0].listing.left_out == {
        "archive, which is not opened": ["b.tar.gz", "c.zip"],
        "link that leads to itself": ["loop.txt"],
        "pipe, socket or device": ["pipe.txt"],
        "name that is no UTF-8": ["\\udcff.txt"],
    }


def test_rows_of_metadata_without_a_file_are_named(tmp_path):
    draw(tmp_path / "1.png")
    draw(tmp_path / "[1].png", 9)
    rows = [
        {"file_name": "[1].png", "text": "a"},
        {"file_name": "2.png", "text": "b"},
        {"text": "c"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"metadata.jsonl, record 1 \(line 2\) names '2.png'.*data.max_skipped"
    ):
        read(tmp_path)
    report = Report(2)
    records = read(tmp_path, report)
    assert [(r["image"]["path"][-6:], r["caption"]) for r in records] == [
        ("/1.png", ""),
        ("1].png", "a"),
    ]
    assert len(report.problems) == 2 and "1 of 2" in str(report)


@pytest.mark.parametrize("form", ["list", "rows", "lines", "parquet"])
def test_of_several_captions_one_is_drawn_in_every_epoch(form, tmp_path, tokenizer):
    captions = ["first", "second one", "third"]
    for i in range(2):
        draw(tmp_path / f"{i}.png", i)
    if form == "list":
        rows = [
            {"file_name": f"{i}.png", "caption": [f"{c} {i}" for c in captions]} for i in range(2)
        ]
    else:
        rows = [
            {"file_name": f"{i}.png", "caption": f"{c} {i}"} for i in range(2) for c in captions
        ]
    if form == "lines":
        for i in range(2):
            (tmp_path / f"{i}.txt").write_text("\n".join(f"{c} {i}" for c in captions))
    elif form == "parquet":
        content = {"image": [(tmp_path / f"{i}.png").read_bytes() for i in range(2)]}
        content["caption"] = [[f"{c} {i}" for c in captions] for i in range(2)]
        datasets.Dataset.from_dict(content).to_parquet(tmp_path / "p.parquet")
    else:
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read(tmp_path / "p.parquet" if form == "parquet" else tmp_path)
    for training in (True, False):
        dataset = ImageDataset(records, "image", "caption", tokenizer, 0, training)
        seen = set()
        for epoch in range(30):
            dataset.set_epoch(epoch)
            item = dataset[1]
            seen.add(tokenizer.decode(item["input_ids"][item["attention_mask"].bool()]))
            assert bool((item["input_ids"] == dataset[1]["input_ids"]).all())
        assert seen == ({f"{c} 1" for c in captions} if training else {"first 1"})
    kept = ImageDataset(records, "image", "caption", tokenizer, 0, False).select([1])
    assert tokenizer.decode(kept[0]["input_ids"][kept[0]["attention_mask"].bool()]) == "first 1"


def test_sources_with_one_and_with_several_captions_are_joined(tmp_path):
    draw(tmp_path / "a/1.png")
    (tmp_path / "a/1.txt").write_text("one")
    draw(tmp_path / "b/1.png")
    (tmp_path / "b/1.txt").write_text("one\ntwo")
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    records = load_documents(sources, DataConfig(train="x"), "train")
    assert records["caption"][:] == [["one"], ["one", "two"]]


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for i in (1, 2, 10, 9):
        draw(tmp_path / "film" / f"frame{i}.PNG", i)
    (tmp_path / "film/.hidden.png").write_text("x")
    (frames,) = read(tmp_path, frame_folders=True)["image"][:]
    assert [Frames(frames)[i].getpixel((0, 0))[0] for i in range(4)] == [1, 2, 9, 10]
    assert sorted(["b10", "b9", "a", "10", "9"], key=natural_key) == ["9", "10", "a", "b9", "b10"]


def test_sounds_pictures_and_texts_of_one_name_are_one_record(tmp_path):
    for i in range(3):
        write_wav(np.zeros(800), tmp_path / f"{i}.wav", 8000)
        draw(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    os.remove(tmp_path / "2.png")
    records = read(tmp_path, fields={"text": "caption", "image": "image", "audio": "audio"})
    assert records["text"][:] == ["number 0", "number 1", "number 2"] and len(records) == 3
    assert [row["image"] is None for row in records] == [False, False, True]
    assert all(row["audio"]["path"].endswith(".wav") for row in records)


def test_a_saved_dataset_is_read(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == ["one", "two"]


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(tmp_path):
    for name in (tmp_path / "gone", "./gone", "data/of/mine", "gone.PNG"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read(name)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.PNG", "picture"),
        ("a.m4v", "clip"),
        ("a.FLAC", "sound"),
        ("a.txt.xz", "text"),
        ("a.tar.gz", None),
        ("a.md", None),
    ],
)
def test_a_kind_is_told_by_the_suffix(name, kind):
    assert kind_of(name) == kind
