import copy
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT

from tokcom.processing_tokcom import (
    as_prompts,
    prompt_ids,
    text_ids,
    vocabulary_size,
    with_pad_token,
)
from tokcom.training.config import DataConfig, TrainConfig
from tokcom.training.corpora import read_data
from tokcom.training.data import (
    CodecMix,
    DialogueDataset,
    PackedDataset,
    StreamingPackedDataset,
    WindowShape,
    cache_latents,
    load_documents,
    messages_of,
    random_unicode,
    tokenize_dialogues,
    tokenize_document,
    tokenize_documents,
    tokenize_prompt,
    train_tokenizer,
)
from tokcom.training.documents import part_kind

LEFT = WindowShape(64, 4, pads_left=True)
TEXTS = ["Once upon a time.\n\nThere was a pig — “Squinty”.", "第二篇 document."]


@pytest.fixture
def files(tmp_path):
    import datasets

    records = [{"text": text, "title": "x"} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.txt").write_text(TEXTS[0])
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "folder" / f"{i}.txt").write_text(text)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "folder", "a.txt"])
def test_every_format_gives_the_same_documents(files, name, streaming):
    documents = load_documents(str(files / name), DataConfig(streaming=streaming), "train")
    assert [row["text"] for row in documents] == (TEXTS[:1] if name == "a.txt" else TEXTS)


def test_several_sources_are_joined(files):
    documents = load_documents(
        [str(files / "a.jsonl"), str(files / "a.parquet")], DataConfig(), "train"
    )
    assert len(documents) == 4


def test_a_name_that_is_no_file_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(name="wikitext-2-raw-v1")
    assert len(load_documents("Salesforce/wikitext", config, "validation")) == 2
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation", "streaming": False})
    ]


def test_missing_field_empty_data_and_unknown_files_are_named(files):
    with pytest.raises(ValueError, match="no field 'body'.*text, title.*data.text_column"):
        load_documents(str(files / "a.jsonl"), DataConfig(text_column="body"), "train")
    (files / "empty.jsonl").write_text(json.dumps({"text": "  "}) + "\n")
    with pytest.raises(ValueError, match="empty.jsonl.*empty"):
        load_documents(str(files / "empty.jsonl"), DataConfig(), "train")
    with pytest.raises(FileNotFoundError, match="gone.txt does not exist"):
        load_documents(str(files / "gone.txt"), DataConfig(), "train")


def test_trained_tokenizer_round_trips_any_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in [*TEXTS, "never seen: ñ 🐷\t\r\n  e\u0301"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_word_of_any_length_is_learnt_from_in_time():
    begin = time.monotonic()
    tokenizer = train_tokenizer(["a text", "ACGT" * 50_000], 270)
    assert time.monotonic() - begin < 20  # minutes, if it were one word
    assert tokenizer.decode(text_ids(tokenizer, "a text ACGTACGT")) == "a text ACGTACGT"


def test_documents_are_separated_by_eos():
    tokenizer = train_tokenizer(TEXTS, 300)
    tokens = tokenize_documents([{"text": t} for t in [*TEXTS, " "]], tokenizer, "text", "x")
    assert (tokens == tokenizer.eos_token_id).sum() == 2 and tokens[-1] == tokenizer.eos_token_id


def test_a_record_without_text_is_named_and_not_dropped():
    tokenizer = train_tokenizer(TEXTS, 300)
    with pytest.raises(ValueError, match="record 1 has no text in field 'text'"):
        tokenize_documents([{"text": "a"}, {"text": None}], tokenizer, "text", "x")


def test_an_epoch_covers_the_corpus_from_a_new_offset():
    tokens = np.arange(1000, dtype=np.int32)
    dataset = PackedDataset(tokens, LEFT, 9999, seed=0, training=True)
    starts = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        rows = torch.stack([dataset[i]["input_ids"] for i in range(len(dataset))])
        assert torch.equal(
            rows.flatten(), torch.arange(rows.numel()) + rows[0, 0]
        )  # no gap, no overlap
        starts.add(int(rows[0, 0]) % 4)
    assert starts == {0, 1, 2, 3}  # chunk boundaries fall everywhere
    held_out = PackedDataset(tokens, WindowShape(64, 4), 9999, seed=0, training=False)
    assert held_out[0]["input_ids"][0] == 0 and held_out[0]["attention_mask"].all()


def test_padding_of_models_that_regress_latents_is_at_the_left_and_shorter_than_a_chunk():
    shape = WindowShape(16, 4, pads_left=True)
    dataset = PackedDataset(np.arange(10_000, dtype=np.int32), shape, 99_999, seed=0, training=True)
    padding = [16 - int(dataset[i]["attention_mask"].sum()) for i in range(len(dataset))]
    assert set(padding) == {0, 1, 2, 3} and 0.1 < np.mean(np.array(padding) > 0) < 0.3
    row = next(dataset[i]["attention_mask"] for i in range(len(dataset)) if padding[i] == 3)
    assert row.tolist() == [0, 0, 0] + [1] * 13


def test_short_corpus_gives_one_padded_window_and_empty_one_an_error():
    shape = WindowShape(16, 4)
    row = PackedDataset(np.arange(5, dtype=np.int32), shape, 99, seed=0, training=False)[0]
    assert row["attention_mask"].sum() == 5
    with pytest.raises(ValueError, match="empty"):
        PackedDataset(np.zeros(0, dtype=np.int32), shape, 99, seed=0, training=True)
    with pytest.raises(ValueError, match=r"\(18\).*20"):
        WindowShape(18, 4)


def test_half_of_the_windows_begin_where_a_document_begins_and_all_say_whether_they_do():
    tokens = np.ones(40_000, dtype=np.int32)
    tokens[99::100] = 0  # EOS
    tokens[::100] = 2  # first tokens of documents
    shape = WindowShape(128, 4, marks_starts=True)
    windows = PackedDataset(tokens, shape, 0, seed=0, training=True)
    items = [windows[i] for i in range(len(windows))]
    begins = [bool(item["text_start"]) for item in items]
    assert begins == [int(item["input_ids"][0]) == 2 for item in items]
    assert 0.4 < np.mean(begins) < 0.6
    assert not any(item["attention_mask"].eq(0).any() for item in items)  # nothing is padded
    lead = PackedDataset(tokens, WindowShape(128, 1, lead=1), 0, seed=0, training=True)
    firsts = [int(lead[i]["input_ids"][0]) for i in range(len(lead))]
    assert (
        0.4 < np.mean([first == 0 for first in firsts]) < 0.6
    )  # an autoregressive model begins from EOS


def test_codec_training_sees_every_token_and_random_unicode(tokenizer):
    text = PackedDataset(
        np.full(64_000, 7, dtype=np.int32), WindowShape(64, 4), 0, seed=0, training=True
    )
    mix = CodecMix(text, tokenizer, seed=0)
    rows = torch.stack([mix[i]["input_ids"] for i in range(900)])
    assert rows.unique().numel() == vocabulary_size(tokenizer)
    plain = (rows == 7).all(1).float().mean()
    assert 0.55 < plain < 0.7
    assert torch.equal(rows[5], mix[5]["input_ids"])
    string = random_unicode(np.random.default_rng(0), 1000)
    assert tokenizer.decode(text_ids(tokenizer, string)) == string


@pytest.mark.parametrize("text", ["a </s> b", "<pad>", "</s></s>"])
def test_text_that_spells_a_special_token_is_text(tokenizer, text):
    ids = text_ids(tokenizer, text)
    assert tokenizer.eos_token_id not in ids and tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenize_document(tokenizer, text) == [*ids, tokenizer.eos_token_id]
    turns = [{"role": "user", "content": text}]
    assert tokenize_prompt(tokenizer, turns) == ids


def test_the_last_token_of_every_tokenizer_is_its_pad_token(tokenizer):
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == vocabulary_size(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token  # as many do
    assert vocabulary_size(other) == len(other)
    padded = with_pad_token(other)
    assert (
        padded.pad_token_id == len(padded) - 1 != padded.eos_token_id
        and padded.pad_token != "<pad>"
    )


def test_stream_gives_full_windows_of_the_same_tokens():
    path, config = (
        str(ROOT / "sample_data" / "stories_validation.jsonl"),
        DataConfig(streaming=True),
    )
    tokenizer = train_tokenizer((r["text"] for r in load_documents(path, config, "train")), 320)
    stream = StreamingPackedDataset(
        load_documents(path, config, "train"), tokenizer, "text", LEFT, 0, 1
    )
    rows = list(stream)
    total = sum(
        len(tokenize_document(tokenizer, r["text"]))
        for r in load_documents(path, DataConfig(), "train")
    )
    assert total - 128 <= sum(len(r["input_ids"]) for r in rows) <= total
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, stream))


FORMS = [
    {"prompt": "What is a pig?", "answer": "An animal."},
    {
        "messages": [
            {"role": "user", "content": "What is a pig?"},
            {"role": "assistant", "content": "An animal."},
        ]
    },
    {
        "conversations": [
            {"from": "human", "value": "What is a pig?"},
            {"from": "gpt", "value": "An animal."},
        ]
    },
]


@pytest.mark.parametrize("record", FORMS, ids=["prompt", "messages", "conversations"])
def test_dialogues_of_any_form_become_a_prompt_and_an_answer(tmp_path, tokenizer, record):
    (tmp_path / "d.jsonl").write_text((json.dumps(record) + "\n") * 3)
    documents = load_documents(str(tmp_path / "d.jsonl"), DataConfig(train="x"), "train")
    assert part_kind(documents, DataConfig()) == "dialogues" and len(documents) == 3
    prompt, answer = tokenize_dialogues(documents, tokenizer, "dialogues")[0]
    assert tokenizer.decode(prompt) == "What is a pig?"
    assert answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]) == "An animal."
    window = DialogueDataset([(prompt, answer)], LEFT, tokenizer.eos_token_id)[0]
    start = int(window["known_mask"].sum())
    assert start % 4 == 0 and window["attention_mask"].sum() == 64 - (start - len(prompt))
    assert window["input_ids"][start - len(prompt) : start].tolist() == prompt
    assert window["input_ids"][start : start + len(answer)].tolist() == answer
    assert (window["input_ids"][start + len(answer) :] == tokenizer.eos_token_id).all()


def test_an_answer_begins_inside_the_last_chunk_of_its_prompt_and_nothing_is_learnt_after_its_end():
    shape = WindowShape(64, 4, ends_at_eos=True, marks_starts=True)
    window = DialogueDataset([([5, 6, 7, 8, 9, 10], [20, 21, 22, 2])], shape, 2)[0]
    assert window["input_ids"][:12].tolist() == [5, 6, 7, 8, 9, 10, 20, 21, 22, 2, 2, 2]
    assert window["known_mask"].tolist() == [1] * 6 + [0] * 58
    assert window["attention_mask"].tolist() == [1] * 12 + [0] * 52 and bool(window["text_start"])


def test_chat_templates_shape_the_prompt(tokenizer):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    ids = tokenize_prompt(templated, messages_of(FORMS[0])[:-1])
    assert tokenizer.decode(ids) == "<user>What is a pig?<assistant>"


def test_a_special_token_is_one_in_the_template_and_text_in_what_a_turn_says(tokenizer):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}"
    turns = [{"role": "user", "content": "say </s> please "}]
    ids = tokenize_prompt(templated, turns)
    assert ids == [*text_ids(tokenizer, "say </s> please"), tokenizer.eos_token_id]
    (prompt,) = as_prompts(templated, turns)
    assert prompt == "say </s> please</s>" and prompt_ids(templated, [prompt], 99)[0] == [ids]
    turns[0]["content"] = "say it, please"
    assert tokenize_prompt(templated, turns) == templated("say it, please</s>").input_ids


def test_long_dialogues_keep_the_end_of_the_prompt_and_the_beginning_of_the_answer():
    window = DialogueDataset([(list(range(100)), list(range(100, 200)))], WindowShape(32, 8), 999)[
        0
    ]
    assert window["input_ids"].tolist() == [*range(76, 100), *range(100, 108)]
    with pytest.raises(ValueError, match=r"`sequence_length` \(8\)"):
        DialogueDataset([], WindowShape(8, 8), 999)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "robot", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ],
)
def test_dialogues_without_an_answer_or_with_unknown_roles_are_named(record):
    with pytest.raises(ValueError, match="Hi"):
        messages_of(record)


def write_rows(path, field: str, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def test_sources_are_mixed_by_weight_and_cut_to_size(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", "text", [f"a {i}" for i in range(300)])
    second = write_rows(tmp_path / "b.jsonl", "caption", [f"b {i}" for i in range(100)])
    mixed = [{"path": first, "weight": 3.0}, {"path": second, "field": "caption", "weight": 1.0}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mixed))
    for source in (mixed, str(tmp_path / "mix.yaml")):
        texts = load_documents(source, DataConfig(train=source), "train")["text"]
        assert {t for t in texts if t[0] == "a"} == {
            f"a {i}" for i in range(300)
        }  # nothing is lost
        assert 0.65 < sum(t[0] == "a" for t in texts) / len(texts) < 0.85
    cut = [
        {"path": first, "max_samples": 7},
        {"path": second, "field": "caption", "fraction": 0.25},
    ]
    texts = load_documents(cut, DataConfig(train=cut), "train")["text"]
    assert len(texts) == 7 + 25 and len(set(texts)) == 32


def test_weighted_sources_need_validation_text_of_their_own(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", "text", ["a text"] * 30)
    with pytest.raises(ValueError, match="repeat documents"):
        read_data(
            TrainConfig(
                output_dir=str(tmp_path), data=DataConfig(train=[{"path": first, "weight": 1.0}])
            )
        )


def test_a_dialogue_has_the_same_ids_in_training_and_in_the_pipeline(build):
    pipe, turns = build(), [{"role": "user", "content": "Who was Squinty? "}]
    for template in (None, "{% for m in messages %}{{ m['content'] }} Answer: {% endfor %}"):
        pipe.tokenizer.chat_template = template
        rows = pipe.encode_prompt(as_prompts(pipe.tokenizer, turns))[1]
        assert rows == [tokenize_prompt(pipe.tokenizer, turns)]
    pipe.tokenizer.chat_template = None


def test_a_stream_of_sources_is_mixed_and_its_head_taken(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", "text", [f"a {i}" for i in range(50)])
    second = write_rows(tmp_path / "b.jsonl", "caption", [f"b {i}" for i in range(50)])
    source = [
        {"path": first, "weight": 1.0, "max_samples": 10},
        {"path": second, "field": "caption", "weight": 1.0},
    ]
    rows = list(load_documents(source, DataConfig(train=source, streaming=True), "train"))
    assert {row["text"] for row in rows if row["text"][0] == "a"} == {f"a {i}" for i in range(10)}
    with pytest.raises(ValueError, match="max_samples"):
        source[0] = {"path": first, "fraction": 0.5}
        load_documents(source, DataConfig(train=source, streaming=True), "train")


@pytest.mark.parametrize(
    "source, message",
    [
        ({"file": "a.jsonl"}, "must have `path`"),
        ({"path": "a.jsonl", "wieght": 1}, "'wieght'; did you mean 'weight'"),
        ({"path": "a.jsonl", "weight": 0}, r"a.jsonl: `weight` \(0\) must be a positive number\.$"),
        ({"path": "a.jsonl", "weight": "heavy"}, r"`weight` \(heavy\)"),
        ({"path": "a.jsonl", "fraction": 1.5}, r"`fraction` \(1.5\)"),
        ({"path": "a.jsonl", "max_samples": 0}, r"`max_samples` \(0\)"),
        (None, "source 0 is null.*must have `path`"),
    ],
)
def test_bad_sources_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_documents([source], DataConfig(train="x"), "train")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no sources; give it lines such as"),
        ("a: [b", "is not a readable YAML file .*in line 1"),
        ("- {path: a.txt, weigth: 1}", "source 0 of .*'weigth'; did you mean 'weight'"),
        ("- {path: a.txt}\n- [b.txt]", "source 1 of .*must have `path`"),
    ],
)
def test_a_bad_mixture_is_named_with_its_file(content, message, tmp_path):
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_documents(str(tmp_path / "mix.yaml"), DataConfig(train="x"), "train")
    assert "mix.yaml" in str(error.value)


def test_a_first_record_without_the_field_is_told_from_all_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"text": "y"}\n')
    with pytest.raises(ValueError, match="the first record of .*a.jsonl has no field 'text'.*body"):
        load_documents(str(tmp_path / "a.jsonl"), DataConfig(), "train")


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("a.zip", "unpack it"),
        ("a.tar.gz", "unpack it"),
        ("x.docx", "texts .*.txt.*, and other documents are to be converted"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(name, remedy, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"no file that is read .{name}.; .*{remedy}"):
        load_documents(str(tmp_path / name), DataConfig(), "train")


def test_names_are_looked_up_at_the_endpoint_that_the_environment_names(tmp_path):
    """A mirror is a setting of huggingface_hub, which nothing here gets around."""
    asked = []

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from tokcom.training.data import *; load_documents('someone/stories', DataConfig(train='x'), 'train')"
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | settings, capture_output=True
    )
    server.shutdown()
    assert done.returncode != 0 and any("someone/stories" in path for path in asked)


def test_cached_latents_are_those_of_their_windows(tmp_path, build):
    model, file = build().model, tmp_path / "latents.f32"
    tokens = np.random.default_rng(0).integers(0, 320, 4 * 100 + 3).astype(np.int32)
    latents = cache_latents(model, tokens, file, rows=64)
    data = PackedDataset(
        tokens, WindowShape(32, 4, pads_left=True), 999, seed=0, training=True, latents=latents
    )
    for epoch in range(3):
        data.set_epoch(epoch)
        for item in (data[0], data[len(data) - 1]):
            assert item["attention_mask"].all()
            torch.testing.assert_close(
                item["latents"], model.encode(item["input_ids"][None]).latents[0]
            )
    written = file.stat().st_mtime_ns
    assert (
        np.array_equal(cache_latents(model, tokens, file), latents)
        and file.stat().st_mtime_ns == written
    )
    with pytest.raises(ValueError, match="do not fill a window of 512"):
        PackedDataset(tokens, WindowShape(512, 4), 999, seed=0, training=True, latents=latents)


def test_sources_whose_files_have_other_kinds_of_strings_are_joined(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sources = [
        {"path": str(tmp_path / name), "weight": weight}
        for name, weight in (("a.parquet", 1), ("b.jsonl", 1))
    ]
    assert set(load_documents(sources, DataConfig(train="x"), "train")["text"][:]) == set(TEXTS)
    plain = [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]
    assert load_documents(plain, DataConfig(train="x"), "train")["text"][:] == 2 * TEXTS
