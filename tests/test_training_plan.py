"""What a run refuses before it reads its data: settings that make no model, and models and tokenizers
that are not there."""

import pytest
from helpers import ROOT

from tokcom.train_accelerate import run
from tokcom.training import corpora
from tokcom.training.config import load_train_config
from tokcom.training.plan import expected_config
from tokcom.training.presets import preset_names

MISTAKES = [
    (
        ["model.transformer_config.hiden_size=32"],
        "'model.transformer_config.hiden_size'; did you mean 'model.transformer_config.hidden_size'",
    ),
    (["model.noise_sdt=1"], "'model.noise_sdt'; did you mean 'model.noise_std'"),
    (["model.transformer_config.hidden_size=33"], r"`model.transformer_config.hidden_size` \(33\)"),
    (["model.transformer_config.hidden_size=big"], "model.transformer_config.hidden_size"),
    (["model.codec_config.latent_channels=32"], r"`model.codec_config.latent_channels` \(32\)"),
    (["model.codec_config.model_type=smell"], "model.codec_config.model_type.*'smell'"),
    (["flow.objective.infil_rate=0.1"], "did you mean flow.objective.infill_rate"),
    (["flow.objective.infill_rate=2"], r"`flow.objective.infill_rate` \(2\)"),
    (["codec.objective.kl_wieght=1"], "did you mean codec.objective.kl_weight"),
    (["stage=flow"], "needs a trained codec"),
    (["attention=spda"], "`attention` .'spda'.*did you mean 'sdpa'"),
    (["stage=flow", "init_from=nope"], "`init_from` .nope. does not exist; give"),
    (["stage=flow", "codec_from=nope"], "`codec_from` .nope. does not exist; give"),
    (["stage=distill", "init_from=nope"], "`init_from` .nope. does not exist; give"),
    (["stage=flow", "init_from=EMPTY"], "`init_from` .*holds no config.json.*no TokCom model"),
    (["tokenizer=EMPTY"], "`tokenizer` .*cannot be loaded .*; give a directory with a tokenizer"),
    (["stage=flow", "init_from=BERT"], "`init_from` .*of type 'bert'"),
]


@pytest.mark.parametrize("overrides, message", MISTAKES)
def test_mistakes_are_named_as_typed_before_data_are_read(
    overrides, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpora, "read_data", None)  # which a run would call
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    places = {"EMPTY": tmp_path / "empty", "BERT": tmp_path / "bert"}
    for name, place in places.items():
        overrides = [override.replace(name, str(place)) for override in overrides]
    settings = ["data.train=nowhere.txt", f"output_dir={tmp_path}/out", "report_to=none"]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(load_train_config("debug", [*settings, *overrides]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", preset_names())
def test_the_model_of_every_preset_can_be_known_before_its_data_are_read(name):
    codec = expected_config(load_train_config(name, ["data.train=x"])).codec_config
    assert codec.latent_channels > 0


def test_a_codec_of_other_data_is_named_with_its_model(tmp_path):
    settings = [
        f"data.train={ROOT}/sample_data/stories_validation.jsonl",
        f"output_dir={tmp_path}/out",
        "report_to=none",
        "stage=flow",
        f"codec_from={ROOT}/zoo/emoji",
    ]
    with pytest.raises(ValueError, match="of .*zoo/emoji reads pictures but the data are texts"):
        run(load_train_config("debug", settings))


def test_a_window_that_is_no_multiple_of_a_chunk_is_named_with_its_stage(tmp_path):
    settings = [
        f"data.train={ROOT}/sample_data/stories_validation.jsonl",
        f"output_dir={tmp_path}/out",
        "report_to=none",
        "flow.sequence_length=63",
    ]
    with pytest.raises(
        ValueError, match=r"`flow.sequence_length` \(63\) must be a multiple.*use 64"
    ):
        run(load_train_config("debug", settings))
