"""Texts and dialogues as people write them: encodings, records of unlike shape, and what is wrong
with one."""

import ast
import codecs
import copy
import json
import warnings

import datasets
import numpy as np
import pytest
from helpers import ROOT
from transformers import AutoTokenizer

from tokcom.processing_tokcom import text_ids
from tokcom.training.config import DataConfig
from tokcom.training.records import OPENERS, messages_of
from tokcom.training.report import PartReport, Report
from tokcom.training.sources import load_documents
from tokcom.training.tokens import (
    tokenize_dialogues,
    tokenize_document,
    tokenize_documents,
    tokenizer_digest,
)


def read(path, report=None, **options):
    return load_documents(
        str(path),
        DataConfig(train="x", **options),
        "train",
        report or Report(options.get("max_skipped", 0)),
    )


def lines(path, *records, encoding="utf-8"):
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding=encoding,
    )
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_a_byte_order_mark_says_the_encoding_and_is_removed(suffix, encoding, tmp_path):
    path = tmp_path / f"a.{suffix}"
    text = "Über 北京 🐷"
    if suffix == "txt":
        path.write_text(text, encoding=encoding)
    elif suffix == "csv":
        path.write_text(f"text,id\n{text},1\n", encoding=encoding)
    elif suffix == "json":
        path.write_text(json.dumps([{"text": text}], ensure_ascii=False), encoding=encoding)
    else:
        lines(path, {"text": text}, encoding=encoding)
    assert read(path)["text"][:] == [text]


@pytest.mark.parametrize(
    "content, remedy",
    [
        (
            "Überraschung für größere Jungen, die schöne Bäume mögen".encode("cp1252"),
            "perhaps it is cp1252: .*data.encoding=cp1252",
        ),
        ("a text".encode("utf-16-le"), "UTF-16 without a mark.*data.encoding=utf-16-le"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "convert"),
    ],
)
def test_what_is_no_utf8_is_named_with_a_remedy(content, remedy, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(ValueError, match=f"a.txt.*({remedy}).*data.max_skipped=1"):
        read(tmp_path)
    report = Report(1)
    assert read(tmp_path, report)["text"][:] == ["good"] and "a.txt" in report.problems[0]


def test_an_encoding_can_be_named_and_lines_end_in_one_way(tmp_path):
    (tmp_path / "a.txt").write_bytes("für\r\nviele\rJungen".encode("cp1252"))
    assert read(tmp_path / "a.txt", encoding="cp1252")["text"][:] == ["für\nviele\nJungen"]
    with pytest.raises(ValueError, match="data.encoding.*klingon"):
        read(tmp_path / "a.txt", encoding="klingon")


@pytest.mark.parametrize("name", ["UTF-16-LE", "utf_16_le", "utf8", "UTF-8", "cp1252"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_lines_are_read_in_an_encoding_under_any_of_its_names(suffix, name, tmp_path):
    path = lines(tmp_path / f"a.{suffix}", {"text": "für"}, {"text": "alle"}, encoding=name)
    if suffix == "json" and "16" in name:  # such a file is one JSON value
        path.write_text(json.dumps([{"text": "für"}, {"text": "alle"}]), encoding=name)
    assert read(path, encoding=name)["text"][:] == ["für", "alle"]
    with pytest.raises(ValueError, match="data.encoding.*klingon"):
        read(path, encoding="klingon")


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"text": None}, "'text' but null"),
        ({"text": 5}, "the number 5"),
        ({"text": ["a", "b"]}, "the list"),
        ({"text": {"en": "a"}}, "the object"),
        ({"text": True}, "the truth value"),
        ({"txt": "a"}, "no field 'text' .*txt.*did you mean 'txt'"),
        ("a", "not an object"),
        ({"text": "\ud800"}, "half a character"),
    ],
)
def test_a_bad_record_is_named_with_its_file_and_line(bad, named, tmp_path):
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one"}\n\n' + json.dumps(bad) + '\n{"text": "three"}\n'
    )
    lines(tmp_path / "a.jsonl", {"text": "zero", "id": [1]})
    with pytest.raises(ValueError, match=rf"b.jsonl, record 1 \(line 3\).*{named}"):
        read(tmp_path)
    report = Report(1)
    assert (
        read(tmp_path, report)["text"][:] == ["zero", "one", "three"] and len(report.problems) == 1
    )
    again = Report(1)  # from the cache
    assert len(read(tmp_path, again)) == 3 and again.problems == report.problems
    (tmp_path / "c.json").write_text(json.dumps([{"text": "one"}, bad]))
    with pytest.raises(ValueError, match=rf"c.json, record 1.*{named}"):
        read(tmp_path / "c.json")


@pytest.mark.parametrize(
    "line", ['{"text": "a"', "{'text': 'a'}", '{"text": "a"} x', "not json", "[" * 9999]
)
def test_a_line_that_is_no_json_is_named(line, tmp_path):
    (tmp_path / "whole.json").write_text("[" + line)
    with pytest.raises(ValueError, match="whole.json is no JSON"):
        read(tmp_path / "whole.json")
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, record 1 \(line 2\) is no JSON"):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", max_skipped=1)["text"][:] == ["one"]


def test_one_problem_too_many_ends_the_run(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": 1}, {"text": 2}, {"text": 3})
    assert len(read(tmp_path / "a.jsonl", max_skipped=3)) == 1
    with pytest.raises(ValueError, match=r"record 3 .*data.max_skipped=2"):
        read(tmp_path / "a.jsonl", max_skipped=2)
    with pytest.raises(ValueError, match=r"record 1 .*data.max_skipped=1"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="record 3"):
        list(read(tmp_path / "a.jsonl", max_skipped=2, streaming=True))
    assert len(list(read(tmp_path / "a.jsonl", max_skipped=3, streaming=True))) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_files_of_unlike_columns_are_joined_by_the_one_that_is_used(kind, tmp_path):
    rows = [[{"text": "a"}], [{"id": 3, "text": "b"}], [{"text": "c", "id": "x", "more": None}]]
    for i, part in enumerate(rows):
        path = tmp_path / f"{i}.{kind}"
        if kind == "jsonl":
            lines(path, *part)
        elif kind == "csv":
            names = list(part[0])
            path.write_text(
                ";".join(names) + "\n" + ";".join(str(part[0][n]) for n in names) + "\n"
            )
        else:
            datasets.Dataset.from_list(part).to_parquet(path)
    assert read(tmp_path)["text"][:] == ["a", "b", "c"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_from_the_cache(tmp_path, monkeypatch):
    import os

    path = tmp_path / "a.txt"
    path.write_text("first")
    assert read(path)["text"][:] == ["first"]
    times = path.stat().st_mtime_ns
    path.write_text("other")
    os.utime(path, ns=(times, times))  # as a copy that keeps the times
    assert read(path)["text"][:] == ["other"]
    monkeypatch.setattr("tokcom.training.documents.read_text", lambda *a: pytest.fail("read again"))
    assert read(path)["text"][:] == ["other"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: (p / "a.jsonl").touch(),
        lambda p: (p / "a.txt").touch(),
        lambda p: (p / "a.jsonl").write_text("\n\n"),
        lambda p: (p / "a.json").write_text("[]"),
        lambda p: (p / "a.csv").write_text("text\n"),
        lambda p: (p / "a.txt").write_text(" \n\t"),
        lambda p: lines(p / "a.jsonl", {"text": " "}),
        lambda p: datasets.Dataset.from_dict({"text": []}).to_parquet(p / "a.parquet"),
    ],
)
def test_empty_files_are_named(make, tmp_path):
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match="empty|no text"):
            read(source)
    with pytest.raises(ValueError, match=path.name):
        read(path)


def test_an_empty_file_among_others_is_named(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.jsonl").write_text("\n")
    (tmp_path / "c.jsonl").touch()
    report = Report()
    assert read(tmp_path, report)["text"][:] == ["a"]
    assert report.sources[0].listing.left_out == {
        "empty": ["c.jsonl"],
        "without records": ["b.jsonl"],
    }


def test_csv_is_read_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        codecs.BOM_UTF8 + b'id;text\r\n1;"a ""word"";\r\nof two lines"\r\n2;007\r\n'
    )
    assert read(tmp_path / "a.csv")["text"][:] == ['a "word";\nof two lines', "007"]
    (tmp_path / "b.csv").write_text("id,text\n1,a,b\n")
    with pytest.raises(
        ValueError, match=r"b.csv, record 0 \(line 2\) has 3 fields, but the header 2"
    ):
        read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("sep=;\nid;text\n1;a, b\n")
    (tmp_path / "d.csv").write_text("id|text\n1|c, d\n")
    assert [read(tmp_path / f"{name}.csv")["text"][0] for name in "cd"] == ["a, b", "c, d"]
    (tmp_path / "f.tsv").write_text("id\ttext\n1\te, f; g\n")
    assert read(tmp_path / "f.tsv")["text"][:] == ["e, f; g"]
    (tmp_path / "e.csv").write_text('id,text\n1,ok\n2,"never closed\n3,lost\n')
    with pytest.raises(
        ValueError, match=r"e.csv, record 1 \(line 4\) is no CSV .*close its quotes"
    ):
        read(tmp_path / "e.csv")
    assert read(tmp_path / "e.csv", max_skipped=1)["text"][:] == ["ok"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_compressed_file_that_is_cut_off_is_named_or_left_out(kind, suffix, tmp_path):
    rows = {"txt": "words and words ", "jsonl": '{"text": "words"}\n', "csv": "text\n"}
    compress = OPENERS[f".{suffix}"]
    (tmp_path / f"a.{kind}").write_text(rows[kind] + "words\n" * (kind == "csv"))
    with compress(tmp_path / f"b.{kind}.{suffix}", "wb") as stream:
        stream.write(b"".join(b"%d, %s" % (i, rows[kind].encode()) for i in range(900)))
    path = tmp_path / f"b.{kind}.{suffix}"
    if kind == "txt":
        assert read(path)["text"][0].startswith("0, words and words 1, words")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"b.{kind}.{suffix}"):
        read(tmp_path)
    (tmp_path / f"c.{kind}.{suffix}").write_bytes(b"not compressed at all")
    with pytest.raises(ValueError, match=rf"c.{kind}.{suffix} cannot be read"):
        read(tmp_path / f"c.{kind}.{suffix}")
    if kind == "txt":
        assert len(read(tmp_path, max_skipped=2)) == 1


def test_parquet_of_another_type_and_nulls_are_named(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", None, "b"], "number": [1, 2, 3]}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match="a.parquet.*record 1 has no text.*null"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", max_skipped=1)["text"][:] == ["a", "b"]
    with pytest.raises(ValueError, match="'number'.*int64.*not texts"):
        read(tmp_path / "a.parquet", text_column="number")
    (tmp_path / "folder").mkdir()
    for name, values in (("a", ["x", "y"]), ("b", ["z", None]), ("c", ["0"])):
        datasets.Dataset.from_dict({"text": values}).to_parquet(tmp_path / f"folder/{name}.parquet")
    with pytest.raises(ValueError, match="b.parquet, record 1 has no text"):
        read(tmp_path / "folder")
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "folder/b.parquet")
    with pytest.raises(ValueError, match="'text' of .*b.parquet holds .*int64"):
        read(tmp_path / "folder")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match="b.parquet cannot be read"):
        read(tmp_path)


BAD_DIALOGUES = [
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]},
        "turn 1 .assistant.*null",
    ),
    (
        {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]},
        "turn 0 .user.*number 5",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "x"},
            ]
        },
        "list",
    ),
    ({"messages": ["hi", "ho"]}, "not an object with role"),
    ({"messages": "hi"}, "not a list"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "known roles"),
    ({"messages": [{"role": "user"}]}, "no 'content'"),
    ({"messages": None}, "must end with an answer"),
    ({"prompt": "hi", "answer": None}, "turn 1 .assistant.*null"),
    ({"prompt": "hi"}, "turn 1 .assistant.*null"),
    ({"prompt": "hi", "answer": " "}, "blank answer"),
    ({"text": "hi"}, "none of the fields prompt, messages, conversations .fields: text"),
    ({"prompt": 7, "answer": "x"}, "number 7"),
    (
        {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "x"}]},
        "turn 0.*null",
    ),
]


@pytest.mark.parametrize("record, named", BAD_DIALOGUES)
def test_a_bad_dialogue_is_named_with_its_file_and_line(record, named, tmp_path, tokenizer):
    good = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": None},
        ]
    }
    lines(tmp_path / "a.jsonl", good, record)
    with pytest.raises(ValueError, match=rf"a.jsonl, record 1 \(line 2\).*{named}"):
        read(tmp_path / "a.jsonl")
    documents = read(tmp_path / "a.jsonl", max_skipped=1)
    assert len(documents) == 1 and len(tokenize_dialogues(documents, tokenizer, "dialogues")) == 1
    with pytest.raises(ValueError, match=named):
        messages_of(record)


def test_a_bad_dialogue_of_a_parquet_file_is_counted(tokenizer):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": None}]
    report = Report(1)
    assert (
        len(tokenize_dialogues(datasets.Dataset.from_list(rows), tokenizer, "dialogues", report))
        == 1
    )
    with pytest.raises(ValueError, match="dialogues, record 1"):
        tokenize_dialogues(datasets.Dataset.from_list(rows), tokenizer, "dialogues")


def test_a_bad_dialogue_of_several_parquet_files_is_named_with_its_file(tmp_path):
    good = {"prompt": "a", "answer": "b"}
    for name, rows in (("a", [good] * 3), ("b", [good, {"prompt": "a", "answer": None}])):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="b.parquet, record 1: turn 1 .assistant.*null"):
        read(tmp_path)
    assert len(read(tmp_path, max_skipped=1)) == 4


def test_sources_of_texts_and_of_dialogues_are_not_joined(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "a"})
    lines(tmp_path / "b.jsonl", {"prompt": "a", "answer": "b"})
    with pytest.raises(ValueError, match="a.jsonl holds texts.*b.jsonl holds dialogues"):
        load_documents(
            [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], DataConfig(train="x"), "train"
        )


def test_a_misspelt_text_column_is_an_error_also_beside_a_dialogue(tmp_path):
    lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b", "body": "c"})
    with pytest.raises(ValueError, match="'bodi'.*did you mean 'body'"):
        read(tmp_path / "a.jsonl", text_column="bodi")


# ---- tokens ----


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_cache_holds_the_ids_of_one_document_after_the_other(
    num_proc, tokenizer, stories, tmp_path
):
    texts = [*stories, " ", "a </s> b", "北京"]
    documents = datasets.Dataset.from_dict({"text": texts, "salt": [str(tmp_path)] * len(texts)})
    part = PartReport("x")
    found = tokenize_documents(documents, tokenizer, "text", "x", num_proc, part)
    wanted = np.concatenate([tokenize_document(tokenizer, text) for text in texts if text.strip()])
    assert found.dtype == np.int32 and np.array_equal(found, wanted)
    assert part.counts == {
        "documents": len(texts),
        "blank and left out": 1,
        "characters": sum(map(len, texts)),
        "tokens": len(wanted),
    }
    assert set(part.letters) == set("".join(texts))


def test_texts_are_tokenized_once_for_a_tokenizer_and_again_for_another(
    tmp_path, tokenizer, monkeypatch
):
    lines(tmp_path / "a.jsonl", *({"text": f"text {i} of {tmp_path}"} for i in range(5)))
    documents = read(tmp_path / "a.jsonl")
    first = tokenize_documents(documents, tokenizer, "text", "x")
    digest = tokenizer_digest(tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer("use it", truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digest
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["text"])
    with monkeypatch.context() as patch:
        patch.setattr(
            "tokcom.training.tokens._write_tokens", lambda *a: pytest.fail("tokenized again")
        )
        assert np.array_equal(
            tokenize_documents(read(tmp_path / "a.jsonl"), tokenizer, "text", "x"), first
        )
    assert len(tokenize_documents(documents, other, "text", "x")) < len(first)
    assert text_ids(tokenizer, "text 0 of")[0] == first[0]


def test_every_file_that_holds_text_is_opened_with_its_encoding():
    """Windows opens files in another one."""
    found = []
    for path in sorted(ROOT.glob("**/*.py")):
        if path.relative_to(ROOT).parts[0] in ("tests", ".venv", "build"):
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            texts = call.func.attr in ("read_text", "write_text")
            if texts and "encoding" not in [word.arg for word in call.keywords]:
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not found


def test_reading_warns_of_nothing_without_a_reason(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_documents(str(tmp_path), DataConfig(train="x"), "train")


def test_a_prompt_with_characters_that_the_training_text_never_had_warns_once(
    build, tmp_path, stories
):
    pipe = build()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.init_kwargs["training_characters"] = "".join(sorted(set("".join(stories))))
    pipe.tokenizer.save_pretrained(tmp_path)
    pipe.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    options = {"gen_length": 4, "num_inference_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe("Once upon a time\n", **options)
    with pytest.warns(UserWarning, match="never had .京 北."):
        pipe("北京 is far", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe("北京 is far", **options)
