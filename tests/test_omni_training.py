"""Several streams: data, training and evaluation."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, same_weights
from tiny_streams import FLOW, STREAMS, build_pipe, inputs, model, tone, train_words

from examples.several_streams import main as join_streams
from tokcom.evaluation.omni import main as measure_streams
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    vocabulary_size,
    write_wav,
)
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.train_accelerate import main as train
from tokcom.training.build import build_model
from tokcom.training.config import DataConfig, load_train_config
from tokcom.training.data import load_documents
from tokcom.training.streams import OmniDataset, unmeasured_streams


@pytest.fixture(scope="module")
def words():
    return train_words()


@pytest.fixture
def pipe(words) -> TokComOmniPipeline:
    return build_pipe(words)


# ---- data and training ----


def sources(tmp_path) -> str:
    pictures, sounds = tmp_path / "pictures.parquet", tmp_path / "sounds.parquet"
    emoji = datasets.load_dataset(
        "parquet", data_files=str(ROOT / "sample_data/emoji_train.parquet"), split="train"
    )
    emoji.select(range(6)).to_parquet(pictures)
    encoded = []
    for i in range(4):
        write_wav(tone(300 + 200 * i), tmp_path / "a.wav", 8000)
        caption = "the sound of: " + emoji[i]["caption"]
        encoded.append(
            {
                "audio": {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None},
                "caption": caption,
            }
        )
    sound = datasets.Dataset.from_list(encoded).cast_column("audio", datasets.Audio(decode=False))
    sound.to_parquet(sounds)
    join_streams(
        [
            "--pictures",
            str(pictures),
            "--sounds",
            str(sounds),
            "--silent",
            "--output",
            str(tmp_path / "both.parquet"),
        ]
    )
    mix = [
        {
            "path": str(tmp_path / "both.parquet"),
            "fields": {"text": "caption", "image": "image", "audio": "audio"},
            "weight": 3,
        },
        {"path": str(sounds), "fields": {"audio": "audio"}, "weight": 1},
        {"path": str(pictures), "field": "caption", "modality": "text", "weight": 1},
    ]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    return str(tmp_path / "mix.yaml")


def test_sources_are_mixed_and_their_records_may_lack_streams(tmp_path, words):
    records = load_documents(sources(tmp_path), DataConfig(train="x"), "train")
    kinds = {tuple(sorted(k for k, v in row.items() if v is not None)) for row in records}
    assert kinds == {("audio",), ("text",), ("image", "text"), ("audio", "image", "text")}
    dataset = OmniDataset(records, words).fit(model(vocabulary_size(words)).codec)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))])
    for i, row in enumerate(records):
        for name, value in batch["streams"].items():
            there = row[name] is not None
            assert bool(batch["present"][name][i]) == there
            assert there or bool((value[i] == (words.eos_token_id if name == "text" else 0)).all())


def test_features_of_a_sound_are_computed_once_for_all_its_records_while_they_fit(
    tmp_path, words, monkeypatch
):
    records = load_documents(sources(tmp_path), DataConfig(train="x"), "train")
    dataset = OmniDataset(datasets.concatenate_datasets([records] * 2), words).fit(
        model(vocabulary_size(words)).codec
    )
    made, compute = [], TokComAudioProcessor.__call__
    monkeypatch.setattr(
        TokComAudioProcessor, "__call__", lambda self, *a: made.append(1) or compute(self, *a)
    )
    rows = np.flatnonzero(dataset.present["audio"]).tolist()
    sounds = {sound["bytes"] for sound in records["audio"] if sound is not None}
    first = [dataset[i]["streams"]["audio"] for i in rows]
    assert all(torch.equal(dataset[i]["streams"]["audio"], sound) for i, sound in zip(rows, first))
    assert len(rows) > len(made) == len(sounds) > 1
    monkeypatch.setattr("tokcom.training.streams.KEPT_SOUNDS", 0)
    dataset.streams["audio"].features.clear()
    assert all(
        torch.equal(dataset[i]["streams"]["audio"], sound) for i, sound in zip(rows * 2, first * 2)
    )
    assert len(made) == len(sounds) + 2 * len(rows)


def test_a_batch_without_any_stream_is_refused():
    net = model()
    net.set_stage("flow")
    with pytest.raises(ValueError, match="no row of this batch has any stream"):
        net(streams=inputs(), present={name: torch.tensor([False] * 3) for name in inputs()})


def test_batches_hold_records_of_the_same_streams_and_every_record_is_shown_once(tmp_path, words):
    records = load_documents(sources(tmp_path), DataConfig(train="x"), "train")
    dataset, orders = OmniDataset(datasets.concatenate_datasets([records] * 5), words), []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(list(dataset.sampler(3, 7)))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(
        range(len(dataset))
    )
    kinds = np.stack(list(dataset.present.values()), 1)[orders[0]]
    batches = kinds[: len(kinds) // 3 * 3].reshape(-1, 3, len(dataset.present))
    mixed = (batches != batches[:, :1]).any((1, 2)).sum()
    groups, counts = np.unique(kinds, axis=0, return_counts=True)
    assert len(groups) == 4 and mixed <= (counts % 3).sum() // 3


def test_held_out_pictures_are_of_no_digit_and_of_no_training_record(tmp_path):
    pictures = str(ROOT / "sample_data/emoji_train.parquet")
    join_streams(
        ["--pictures", pictures, "--hold_out", "10", "--output", str(tmp_path / "a.parquet")]
    )
    parts = [
        load_documents(
            str(tmp_path / f"{name}.parquet"),
            DataConfig(train="x", fields={"text": "caption", "image": "image"}),
            "train",
        )
        for name in ("a", "a_test")
    ]
    learnt, held_out = ([(row["text"], row["image"]["bytes"]) for row in part] for part in parts)
    assert len(held_out) == 10 and len(learnt) == 46 and not set(learnt) & set(held_out)


def test_a_held_out_picture_is_shown_with_no_sound_of_training(tmp_path):
    names = [f"animal {i}" for i in range(4)]
    pictures = [
        {"caption": name, "image": {"bytes": name.encode(), "path": None}} for name in names
    ]
    sounds = [
        {"caption": f"sound: {name}", "audio": {"bytes": b"0", "path": None}}
        for name in names
        for _ in range(3)
    ]
    for name, rows, kind in (
        ("image", pictures, datasets.Image),
        ("audio", sounds, datasets.Audio),
    ):
        stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        features = datasets.Features({"caption": datasets.Value("string"), name: stored})
        found = datasets.Dataset.from_list(rows, features).cast_column(name, kind(decode=False))
        found.to_parquet(tmp_path / f"{name}.parquet")
    files = [
        "--pictures",
        str(tmp_path / "image.parquet"),
        "--sounds",
        str(tmp_path / "audio.parquet"),
    ]
    join_streams([*files, "--hold_out", "2", "--output", str(tmp_path / "a.parquet")])
    learnt, held_out = (
        datasets.load_dataset(
            "parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train"
        )["caption"][:]
        for name in ("a", "a_test")
    )
    assert len(learnt) == len(held_out) == 6 and not set(learnt) & set(held_out)


def test_bad_sources_of_streams_are_named(tmp_path, words):
    path = str(ROOT / "sample_data/emoji_train.parquet")
    for source, named in (
        ({"path": path, "fields": {"text": "sentence"}}, "sentence"),
        ({"path": path, "modality": "text"}, "modality"),
    ):
        with pytest.raises(ValueError, match=named):
            load_documents([source], DataConfig(train="x"), "train")
    records = load_documents(
        [{"path": path, "fields": {"image": "caption"}}], DataConfig(train="x"), "train"
    )
    with pytest.raises(ValueError, match="'image'"):
        OmniDataset(records, words).fit(model(vocabulary_size(words)).codec)
    records = load_documents(
        [{"path": path, "fields": {"smell": "caption"}}], DataConfig(train="x"), "train"
    )
    with pytest.raises(ValueError, match="smell"):
        OmniDataset(records, words).fit(model(vocabulary_size(words)).codec)


def test_a_text_is_cut_between_characters_to_what_the_model_reads(tmp_path, words):
    datasets.Dataset.from_dict({"caption": ["红色的球和蓝色的猫", "a cat"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    source = [{"path": str(tmp_path / "a.parquet"), "fields": {"text": "caption"}}]
    dataset = OmniDataset(load_documents(source, DataConfig(train="x"), "train"), words)
    net = model(vocabulary_size(words))
    cut = dataset.fit(net.codec).content(0)["text"]
    assert cut and "红色的球和蓝色的猫".startswith(cut) and dataset.content(1)["text"] == "a cat"
    assert len(words(cut)["input_ids"]) <= 8


def test_a_misspelt_field_of_all_sources_is_named(tmp_path):
    path = str(ROOT / "sample_data/emoji_train.parquet")
    fields = {"image": "image", "text": "capton"}
    with pytest.raises(ValueError, match="text.*capton"):
        load_documents(path, DataConfig(train=path, fields=fields), "train")


def test_validation_of_the_codec_may_have_batches_without_a_stream(tmp_path):
    path = str(ROOT / "sample_data/emoji_train.parquet")
    pictures = datasets.load_dataset("parquet", data_files=path, split="train").select_columns(
        "image"
    )
    pictures.to_parquet(tmp_path / "silent.parquet")
    held_out = [{"path": path, "fields": {"text": "caption"}, "max_samples": 2}]
    held_out.append(
        {"path": str(tmp_path / "silent.parquet"), "fields": {"image": "image"}, "max_samples": 9}
    )
    options = [
        f"data.train={sources(tmp_path)}",
        f"data.validation={json.dumps(held_out)}",
        "stage=codec",
    ]
    train(
        tiny_run(tmp_path, *options, "codec.batch_size=1", "codec.eval_batches=11", "num_samples=0")
    )


def tiny_run(tmp_path, *more: str) -> list[str]:
    parts = [
        f"model.codec_config.streams={json.dumps(STREAMS)}",
        "model.codec_config.text_latents=8",
    ]
    parts += [
        f"model.transformer_config={json.dumps(FLOW)}",
        "tokenizer_vocab_size=300",
        "report_to=none",
        "attention=sdpa",  # the fastest differs from run to run, and runs are compared
    ]
    for stage in ("codec", "flow"):
        parts += [
            f"{stage}.max_steps=4",
            f"{stage}.batch_size=4",
            f"{stage}.eval_steps=4",
            f"{stage}.eval_batches=1",
        ]
    return ["--preset", "omni-tiny", f"output_dir={tmp_path / 'out'}", *parts, *more]


def test_training_ends_with_a_pipeline_of_all_streams_and_measured_latents(tmp_path, capsys):
    train(
        tiny_run(
            tmp_path,
            f"data.train={sources(tmp_path)}",
            f"data.validation={tmp_path / 'both.parquet'}",
        )
    )
    pipe = TokComOmniPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.codec.streams["image"].latent_std.std() > 0  # measured
    assert (tmp_path / "out/run/flow/samples-4.png").is_file()
    assert len(pipe(num_inference_steps=1).streams) == 3


def test_streams_that_the_stage_of_the_codec_did_not_see_are_measured_by_the_flow(tmp_path):
    both = sources(tmp_path)
    texts = tmp_path / "texts.parquet"
    column = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "both.parquet"), split="train"
    )
    column.select_columns("caption").to_parquet(texts)
    only = json.dumps([{"path": str(texts), "fields": {"text": "caption"}}])
    rest = ["num_samples=0", f"data.validation={tmp_path / 'both.parquet'}"]
    train(tiny_run(tmp_path, f"data.train={only}", "stage=codec", "num_samples=0"))
    rest.append("data.allow_changed=true")
    train(tiny_run(tmp_path, f"data.train={both}", "stage=flow", *rest))
    codec = TokComOmniPipeline.from_pretrained(tmp_path / "out").model.codec
    assert not unmeasured_streams(codec, codec.streams)
    assert codec.streams["image"].latent_std.std() > 0


def test_a_resumed_run_of_streams_changes_no_bit(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "donor")
    options = [
        f"data.train={sources(tmp_path)}",
        f"data.validation={tmp_path / 'both.parquet'}",
        "num_samples=0",
    ]
    options += [
        f"init_from={tmp_path / 'donor'}",
        "stage=flow",
        "flow.max_steps=24",
        "flow.checkpoint_steps=8",
    ]
    options += ["flow.eval_steps=6", "flow.batch_size=2", "flow.warmup_steps=2"]
    train(tiny_run(tmp_path, *options))
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in ("checkpoint-24", "final", "best"):
        shutil.rmtree(tmp_path / "out" / "run" / "flow" / name)
    (tmp_path / "out" / "model.safetensors").unlink()
    train(tiny_run(tmp_path, *options))
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_a_new_transformer_takes_over_a_codec_of_several_streams(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    options = [
        "stage=flow",
        f"codec_from={tmp_path}",
        "data.train=x",
        "model.transformer_config.num_hidden_layers=1",
    ]
    net = build_model(load_train_config("omni-tiny", options), pipe.tokenizer)
    assert net.config.transformer_config.num_hidden_layers == 1
    codec = pipe.model.codec.state_dict()
    assert all(torch.equal(value, codec[name]) for name, value in net.codec.state_dict().items())


def test_data_and_models_of_different_kinds_are_named(tmp_path):
    emoji, stories = (
        ROOT / "sample_data/emoji_train.parquet",
        ROOT / "sample_data/stories_train.jsonl",
    )
    for preset, data, named in (
        (
            "debug",
            [f"data.train={emoji}", "data.fields={text: caption, image: image}"],
            "omni-tiny",
        ),
        ("omni-tiny", [f"data.train={stories}", "data.fields=null"], "data.fields"),
        ("omni-tiny", [f"data.train={emoji}", "data.fields=null"], "omni-tiny|pictures"),
    ):
        with pytest.raises(SystemExit, match=named):
            train(["--preset", preset, f"output_dir={tmp_path / preset}", "report_to=none", *data])


@pytest.mark.slow
def test_the_evaluation_measures_six_directions_and_writes_pictures_and_sounds(tmp_path, words):
    net = model(
        vocabulary_size(words),
        codec={"streams": {**STREAMS, "audio": dict(num_frames=32, num_channels=16)}},
    )
    pipe = TokComOmniPipeline(net, TokComFlowMatchScheduler.from_model_config(net.config), words)
    pipe.save_pretrained(tmp_path / "model")
    sample = str(ROOT / "sample_data/streams_{}.parquet")
    for name in ("train", "validation"):
        records = datasets.load_dataset("parquet", data_files=sample.format(name), split="train")
        heard = [audio is not None for audio in records.data["audio"].to_pylist()]
        rows = [i for i, sound in enumerate(heard) if sound]
        records.select(rows * (2 if name == "train" else 1)).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    pictures = [str(ROOT / f"sample_data/emoji_{name}.parquet") for name in ("train", "train")]
    facts = measure_streams(
        [
            *(
                "--model",
                str(tmp_path / "model"),
                "--pictures",
                pictures[0],
                "--pictures_test",
                pictures[1],
            ),
            *(
                "--digits",
                str(tmp_path / "train.parquet"),
                "--digits_test",
                str(tmp_path / "validation.parquet"),
            ),
            *(
                "--guidance_scales",
                "1",
                "--steps",
                "1",
                "--contrastive_steps",
                "30",
                "--epochs",
                "8",
            ),
            *("--output_dir", str(tmp_path / "results")),
        ]
    )
    directions = {row["direction"] for row in facts["directions"]}
    assert len(directions) == 9 and all(  # six, two through a caption, and from nothing
        0 <= row["guidance 1"] <= 100 for row in facts["directions"]
    )
    nearest = [row for row in facts["directions"] if row["measure"] == "noun exact"][0]
    assert nearest["nearest training record"] == 1.0  # here the test pictures are the training ones
    for name in ("results.md", "pictures.png", "sounds.png", "seven.wav"):
        assert (tmp_path / "results" / name).is_file()
