"""What a run does with data that changed, exports that are damaged, numbers that mean nothing, and
its precision."""

import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import ROOT, tiny_model
from PIL import Image
from test_training import quick

from tokcom.objective_tokcom import TokComOutput
from tokcom.quantization_tokcom import VectorQuantizer
from tokcom.train_accelerate import run
from tokcom.training import precision, trainer
from tokcom.training.card import training_card
from tokcom.training.checkpoints import CheckpointError
from tokcom.training.config import load_train_config
from tokcom.training.corpora import read_data
from tokcom.training.digest import check_unchanged, data_digests
from tokcom.training.directory import RunDirectory
from tokcom.training.pipelines import load_pipeline
from tokcom.training.stage import StageTrainer, weighed_means
from tokcom.training.tokens import get_tokenizer, load_tokenizer

TEXT = ROOT / "sample_data" / "stories_validation.jsonl"


@pytest.fixture
def text(tmp_path):
    """A copy of the text, which a test may change."""
    return shutil.copy(TEXT, tmp_path / "text.jsonl")


def append(text, line: str) -> None:
    with open(text, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": line}) + "\n")


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_part_that_some_outputs_lack_is_a_mean_over_the_others(lacks):
    outputs = [
        TokComOutput(loss=torch.tensor(loss), ce_loss=torch.tensor(loss), weight=torch.tensor(2.0))
        for loss in (1.0, 3.0)
    ]
    outputs[lacks].ce_loss = None
    shapes = []
    means = weighed_means(outputs, lambda sums: shapes.append(sums.shape) or sums)
    assert means["loss"] == 2 and means["ce_loss"] == (3.0, 1.0)[lacks]
    assert "mse_loss" not in means and means["weight"] == 2
    outputs[1 - lacks].ce_loss = None
    assert "ce_loss" not in weighed_means(outputs, lambda sums: shapes.append(sums.shape) or sums)
    assert shapes[0] == shapes[1]  # whatever a process lacks, all exchange tensors of one size


# ---- data that changed ----


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.large_string())])
def test_a_picture_that_is_named_by_a_text_counts_with_its_content(kind, tmp_path):
    file = tmp_path / "a.png"
    name = str(file) if kind == pa.string() else [str(file)]
    records = datasets.Dataset(pa.table({"image": pa.array([name, None], kind)}))

    def digest() -> str:
        part = SimpleNamespace(records=records)
        corpus = SimpleNamespace(train=part, validation=part, streamed=False)
        return data_digests(None, corpus)["training data"]

    Image.new("RGB", (4, 4), "red").save(file)
    before = digest()
    Image.new("RGB", (4, 4), "blue").save(file)
    assert digest() != before


def test_a_run_refuses_other_data_under_the_same_name_unless_told_to_go_on(text, tmp_path, capsys):
    options = [f"data.train={text}", "stage=codec"]
    run(quick(tmp_path, *options, "codec.max_steps=3"))
    append(text, "A dog came along and said that it was late. " * 20)
    with pytest.raises(ValueError, match="training data .*changed since.*allow_changed=true"):
        run(quick(tmp_path, *options))
    run(quick(tmp_path, *options, "data.allow_changed=true"))
    printed = capsys.readouterr().out
    assert "training data" in printed and "changed; the run goes on" in printed
    run(quick(tmp_path, *options, "codec.max_steps=7"))  # these are its data now


def test_the_digest_is_of_the_content_and_not_of_the_name(text, tmp_path):
    other = shutil.copy(text, tmp_path / "other.jsonl")
    first, second = (
        data_digests(config, read_data(config))
        for config in (quick(tmp_path, f"data.train={path}") for path in (text, other))
    )
    assert first == second
    append(other, "One more sentence.")
    config = quick(tmp_path, f"data.train={other}")
    assert data_digests(config, read_data(config)) != first


def test_data_of_a_run_that_never_began_bind_nobody(tmp_path):
    config = quick(tmp_path)
    directory = RunDirectory(config, is_main=True)
    directory.work.mkdir(parents=True)
    corpus = SimpleNamespace(
        streamed=False, train=np.arange(5), validation=np.arange(3), digest=None
    )
    check_unchanged(config, corpus, directory)
    corpus.train = np.arange(6)
    check_unchanged(config, corpus, directory)
    directory.settings.write_text("{}")
    corpus.train = np.arange(7)
    with pytest.raises(ValueError, match="^the training data changed"):
        check_unchanged(config, corpus, directory)


def test_the_best_model_is_chosen_anew_where_validation_measures_something_else(
    text, tmp_path, capsys
):
    options = [f"data.validation={text}", "stage=codec", "codec.eval_steps=3"]
    run(quick(tmp_path, *options, "codec.max_steps=3"))
    best = tmp_path / "out" / "run" / "codec" / "best" / "model.safetensors"
    before = best.read_bytes()
    noise = "".join(chr(9 * i % 93 + 33) for i in range(9000))  # a loss that is higher
    text.write_text(json.dumps({"text": noise}) + "\n")
    run(quick(tmp_path, *options, "codec.max_steps=6", "data.allow_changed=true"))
    assert "validation is another one now (validation data changed)" in capsys.readouterr().out
    assert best.read_bytes() != before


def test_how_many_processes_read_the_data_may_change_and_what_they_read_may_not(tmp_path):
    run(quick(tmp_path, "stage=codec", "codec.max_steps=2"))
    run(quick(tmp_path, "stage=codec", "codec.max_steps=2", "data.num_proc=2"))
    with pytest.raises(ValueError, match=r"data\.text_column='text', now .*data\.allow_changed"):
        run(quick(tmp_path, "stage=codec", "data.text_column=body"))
    with pytest.raises(ValueError, match="autoencoder=None, now it is 'other'"):
        run(quick(tmp_path, "stage=codec", "autoencoder=other"))


def test_an_edited_preset_is_another_model(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: debug\n")

    def config():
        data = [f"data.train={TEXT}", "data.validation=null"]
        steps = ["stage=codec", "codec.max_steps=2", "report_to=none", "num_samples=0"]
        return load_train_config(str(preset), [*data, *steps, f"output_dir={tmp_path}/out"])

    run(config())
    preset.write_text("extends: debug\nmodel: {transformer_config: {block_size: 8}}\n")
    with pytest.raises(ValueError, match="was started with preset_model="):
        run(config())


def test_a_tokenizer_that_the_donor_does_not_know_is_refused(text, tmp_path):
    donor, other = tmp_path / "donor", tmp_path / "other"
    run(quick(tmp_path, "stage=codec", "codec.max_steps=1", f"output_dir={donor}"))
    texts = [{"text": "zebra quartz jumps " * 9}]
    size = len(load_tokenizer(donor))
    get_tokenizer(None, size, texts, "text").save_pretrained(other)
    for key in ("init_from", "codec_from"):
        options = ["stage=flow", f"{key}={donor}", f"tokenizer={other}"]
        with pytest.raises(ValueError, match="gives ids another meaning.*remove `tokenizer`"):
            read_data(load_train_config("debug", [f"data.train={text}", *options]))


# ---- exports ----


def test_a_finished_stage_gives_way_to_later_ones_and_an_edited_card_stays(tmp_path, capsys):
    steps = ["codec.max_steps=2", "flow.max_steps=2"]
    run(quick(tmp_path, *steps))
    out = tmp_path / "out"
    weights = (out / "model.safetensors").read_bytes()
    (out / "README.md").write_text("mine")
    run(quick(tmp_path, *steps, "stage=codec"))
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "README.md").read_text() == "mine"
    assert "has been edited and stays as it is" in capsys.readouterr().out


def test_a_damaged_export_is_named_and_made_anew_from_the_newest_checkpoint(tmp_path):
    run(quick(tmp_path, "stage=codec"))
    stage = tmp_path / "out" / "run" / "codec"
    weights = stage / "final" / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="model.safetensors.*remove .*final and run the same"):
        run(quick(tmp_path, "stage=codec"))
    shutil.rmtree(stage / "final")
    shutil.rmtree(stage / "best")
    run(quick(tmp_path, "stage=codec"))
    assert (stage / "best" / "checksums.json").is_file()
    assert weights.stat().st_size == len(intact)


# ---- numbers ----


@pytest.mark.parametrize(
    "override",
    [
        "codec.learning_rate=.nan",
        "flow.learning_rate=-1",
        "flow.max_grad_norm=0",
        "flow.ema_half_life=.inf",
        "codec.weight_decay=-0.1",
        "codec.cooldown_share=1.5",
        "flow.spike_factor=.nan",
        "data.validation_fraction=1.5",
        "data.shuffle_buffer=0",
        "seed=-1",
        "num_samples=-1",
        "num_workers=-2",
        "distill.guidance_scale=.nan",
        "distill.fake_learning_rate=.inf",
        "perceptual_weight=-1",
        "tokenizer_vocab_size=0",
        "codec.objective.kl_weight=.nan",
    ],
)
def test_a_number_that_means_nothing_is_named_before_anything_is_read(tmp_path, override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"`{key}` .*must be"):
        quick(tmp_path, override)
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_finite_do_not_reach_a_codebook():
    torch.manual_seed(0)
    one, two = VectorQuantizer(8, 4).train(), VectorQuantizer(8, 4).train()
    two.load_state_dict(one.state_dict())
    latents = torch.randn(32, 4)
    torch.manual_seed(1)
    one(latents[:30].clone().requires_grad_())
    spoiled = latents.clone()
    spoiled[30:] = float("nan")
    torch.manual_seed(1)
    two(spoiled.requires_grad_())
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    before = {name: value.clone() for name, value in two.state_dict().items()}
    two(torch.full((5, 4), float("inf"), requires_grad=True))
    assert all(torch.equal(value, before[name]) for name, value in two.state_dict().items())


# ---- means ----


def gradients(tmp_path, monkeypatch, batch_size: int, accumulation: int) -> list[torch.Tensor]:
    """Gradients of the first update of a codec on dialogues, before they are clipped."""
    lines = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    file = tmp_path / "dialogues.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": text[:9]},
                {"role": "assistant", "content": text[9 : 14 + 9 * i]},
            ]
        }
        for i, text in enumerate(lines[:8])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    options = ["stage=codec", "codec.max_steps=1", f"data.train={file}", f"data.validation={file}"]
    options += [f"codec.batch_size={batch_size}", "codec.sequence_length=64"]
    options += [f"codec.gradient_accumulation_steps={accumulation}", "mixed_precision=no"]
    objective = ["token_dropout=0.0", "latent_dropout=0.0", "kl_weight=0.0"]
    options += [f"codec.objective.{setting}" for setting in objective]
    weigh = StageTrainer._weigh_gradients

    def note(self, weight):
        weigh(self, weight)
        found.extend(p.grad.clone() for p in self.model.parameters() if p.grad is not None)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_weigh_gradients", note)
        patch.setattr(torch, "randn_like", torch.zeros_like)
        folder = tmp_path / f"{batch_size}"
        folder.mkdir()
        run(quick(folder, *options))
    return found


def test_accumulated_gradients_are_those_of_one_batch_however_many_tokens_each_row_has(
    tmp_path, monkeypatch
):
    whole = gradients(tmp_path, monkeypatch, 8, 1)
    parts = gradients(tmp_path, monkeypatch, 2, 4)
    assert whole and len(whole) == len(parts)
    for one, other in zip(whole, parts):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


# ---- precision ----


def test_each_run_of_a_process_has_its_own_precision_and_the_card_names_it(tmp_path, monkeypatch):
    for speed, wanted in (("fast", "bfloat16 autocast on 1 x cpu"), ("slow", "float32 on 1 x cpu")):
        monkeypatch.setenv("TOKCOM_BFLOAT16", speed)
        assert precision.has_fast_bfloat16("cpu") == (speed == "fast")
        folder = tmp_path / speed
        folder.mkdir()
        config = quick(folder, "stage=codec", "codec.max_steps=1", "mixed_precision=auto")
        out = run(config)
        assert wanted in (out / "README.md").read_text(), speed
    summary = out / "run" / "codec" / "summary.json"
    facts = json.loads(summary.read_text())
    minutes = f"| {facts['tokens']} | {facts['seconds'] / 60:.1f} |"
    assert minutes in (out / "README.md").read_text()
    # as older runs wrote it
    del facts["precision"], facts["seconds"]
    summary.write_text(json.dumps(facts))
    card = training_card(config, load_pipeline(out))
    assert "precision not noted" in card
    assert f"| {facts['tokens']} | - |" in card


def test_the_seconds_of_a_run_are_those_of_its_updates_whatever_came_between(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def taking(seconds, method):
        def slow(self, *args):
            clock.now += seconds
            return method(self, *args)

        return slow

    monkeypatch.setattr(StageTrainer, "_micro_batch", taking(1, StageTrainer._micro_batch))
    monkeypatch.setattr(StageTrainer, "evaluate", taking(100, StageTrainer.evaluate))
    for steps in (2, 5):  # the second goes on where the first stopped
        out = run(quick(tmp_path, "stage=codec", f"codec.max_steps={steps}"))
        facts = json.loads((out / "run" / "codec" / "summary.json").read_text())
        assert facts["seconds"] == steps


def test_latents_are_encoded_outside_autocast_so_that_cached_ones_are_the_same():
    model = tiny_model()
    ids = torch.arange(64).view(2, 32)
    clean = []
    note = type(model).predict_noised

    def noted(self, objective, latents, *args, **kwargs):
        clean.append(latents.latents)
        return note(self, objective, latents, *args, **kwargs)

    type(model).predict_noised = noted
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
    finally:
        type(model).predict_noised = note
    assert clean[0].dtype == torch.float32
    assert torch.equal(clean[0], model.encode(ids).latents)
