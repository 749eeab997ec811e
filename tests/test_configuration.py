from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedConfig

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.config import load_train_config
from tokcom.training.data import WindowShape
from tokcom.training.presets import PRESET_DIR, preset_config, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_config_round_trips_through_json(name, tmp_path):
    config = preset_config(name)
    config.save_pretrained(tmp_path)
    assert TokComConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_v5_2_has_the_published_parameter_counts():
    with torch.device("meta"):
        model = TokComModel(preset_config("v5.2"))
    assert model.config.codec_config.vocab_size == 32017
    assert sum(p.numel() for p in model.codec.parameters()) == 744_483_456
    assert sum(p.numel() for p in model.transformer.parameters()) == 442_285_184


def test_presets_have_the_size_their_name_promises():
    sizes = {}
    for name in ("tiny", "base"):
        with torch.device("meta"):
            sizes[name] = TokComModel(preset_config(name)).num_parameters()
    assert sizes["tiny"] <= 14e6 and 70e6 < sizes["base"] < 85e6  # the shipped file is bfloat16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"codec_config": {"latent_channels": 8}}, "must be equal"),
        ({"codec_config": {"layer_type": "conv"}}, "'conv'"),
        ({"codec_config": {"token_dropout": 0.5}}, "codec.objective.token_dropout"),
        ({"codec_config": {"variational": False}}, "variational=True"),
        ({"transformer_config": {"num_attention_heads": 5}}, "multiple of `num_attention_heads`"),
        ({"transformer_config": {"num_position_axes": 9}}, "num_position_axes"),
        ({"transformer_config": {"block_size": 0}}, "block_size"),
        ({"transformer_config": {"input_projection": False}}, "input_projection=True"),
        ({"transformer_config": {"hiden_size": 64}}, "hiden_size"),
        ({"codec_config": {"num_codes": -1}}, "between 0 and 2147483647"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"ce_weight": 0.5}, "flow.objective.ce_weight"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(Exception, match=message) as error:
        preset_config("debug", **overrides)
    assert isinstance(error.value, ValueError) or "Validation" in type(error.value).__name__


def test_unknown_preset_and_codec_are_named():
    with pytest.raises(ValueError, match="huge.*known presets are"):
        preset_config("huge")
    with pytest.raises(ValueError, match="tokcom_smell_codec"):
        TokComConfig(codec_config={"model_type": "tokcom_smell_codec"})


# Fields that no two presets set differently, and why they stay.
NEVER_VARY = {
    "initializer_range": "a convention of transformers",
    "rms_norm_eps": "published checkpoints name theirs",
    "latent_head": "stage head adds it to a finished model (OmniFlow's text decoders)",
    "latent_head_size": "its width",
    "latent_head_codes": "its codes",
    "latent_refiner": "as latent_head",
    "latent_refiner_size": "its width",
    "sampling_top_p": "a default of sampling that a model may bring",
    "condition_vocab_size": "the tokenizer decides",
    "num_quantizers": "its levels",
    "fsq_levels": "as num_codes",
    "layout": "`raster` is PixelDLM's published layout, the control of docs/pixels.md",
    "standardize": "`false` is PixelDLM's published scale, the control of docs/pixels.md",
    "linear_path": "for reconstruction and codes; presets draw (docs/images.md)",
    "num_tokens": "Styled_vae_vq's 36 tokens; smaller pictures need fewer",
    "temporal_compression": "of external autoencoders that code time",
    "sampling_rate": "of sounds: the data decide",
    "fft_length": "of sounds",
    "hop_length": "of sounds",
}


def own_fields(fields: dict) -> dict:
    """Fields that the library's base class does not have."""
    return {
        name: value for name, value in fields.items() if name not in PreTrainedConfig().to_dict()
    }


def collect(fields: dict, found: dict) -> None:
    """Note the values of all fields of a configuration and of its parts, by class and name."""
    for name, value in own_fields(fields).items():
        if name in ("codec_config", "transformer_config"):
            collect(value, found)
        elif name not in ("model_type", "streams"):
            found.setdefault((fields["model_type"], name), set()).add(repr(value))


def test_every_field_varies_between_presets_or_has_a_reason():
    found = {}
    for name in preset_names():
        config = preset_config(name)
        collect(config.to_dict(), found)
        if config.codec_config.modality == "several":
            for stream in config.codec_config.stream_configs().values():
                collect(stream.to_dict(), found)
    varied = {name for (_, name), values in found.items() if len(values) > 1}
    fixed = {name for _, name in found} - varied
    assert fixed - set(NEVER_VARY) == set()
    assert set(NEVER_VARY) - fixed == set()  # a reason that is no longer needed goes


def test_fields_of_earlier_versions_are_dropped_with_one_warning():
    fields = preset_config("debug").to_dict() | {
        "stage": "flow",
        "ce_weight": 0.3,
        "latent_stagger": 0.0,
    }
    fields["codec_config"] |= {"kl_weight": 0.1, "quantized_latents": True}
    with pytest.warns(
        UserWarning, match="ce_weight, kl_weight, latent_stagger, quantized_latents, stage"
    ) as caught:
        config = TokComConfig(**fields)
    assert len(caught) == 1 and not hasattr(config, "ce_weight")


def test_a_removed_field_that_was_in_use_is_refused():
    with pytest.raises(ValueError, match="latent_stagger.*0.1"):
        TokComConfig(**preset_config("debug").to_dict() | {"latent_stagger": 0.5})


@pytest.mark.parametrize("preset", ["pixel-b4", "style-512-64", "video-large"])
def test_a_preset_that_extends_another_says_only_what_differs(preset):
    text = yaml.safe_load((PRESET_DIR / f"{preset}.yaml").read_text())
    parent = preset_config(text["extends"]).to_dict()
    assert preset_config(preset).to_dict() != parent
    training = load_train_config(text["extends"], [])
    for part in set(text) - {"extends", "model"}:
        for name, value in text[part].items():
            assert value != getattr(getattr(training, part), name), name


@pytest.mark.parametrize("preset", preset_names())
def test_windows_of_a_preset_are_whole_chunks_that_its_positions_reach(preset):
    training = load_train_config(preset, [])
    config = preset_config(preset)
    if config.codec_config.input_name != "input_ids":
        return
    window = WindowShape.of(config, training.flow.sequence_length)
    places = config.transformer_config.max_position_embeddings
    assert window.length // config.codec_config.chunk_size <= places


def test_data_of_a_preset_do_not_reach_a_user_who_brings_data(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: v5.2\ndata: {train: mine.jsonl}\n")
    for config in (
        load_train_config(str(mine), []),
        load_train_config("v5.2", ["data.train=mine.jsonl"]),
        load_train_config("v5.2", ["data={train: mine.jsonl}"]),
    ):
        found = config.data.train, config.data.validation, config.data.name
        assert found == ("mine.jsonl", None, None)
    assert load_train_config("v5.2", []).data.name == "wikitext-2-raw-v1"
    mine.write_text("extends: debug\ndata: {train: docs, validation: held_out.jsonl}\n")
    data = load_train_config(str(mine), []).data
    assert (data.train, data.validation) == ("docs", "held_out.jsonl")  # not this repository's
    data = load_train_config("debug", []).data
    assert data.train.endswith("stories_train.jsonl") and Path(data.validation).is_file()
