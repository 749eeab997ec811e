import pytest
import torch

from tokcom.configuration_tokcom import PRESETS, TokComConfig
from tokcom.modeling_tokcom import TokComModel


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trips_through_json(name, tmp_path):
    config = TokComConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    assert TokComConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_v5_2_has_the_published_parameter_counts():
    with torch.device("meta"):
        model = TokComModel(TokComConfig.from_preset("v5.2"))
    assert model.config.codec_config.vocab_size == 32017
    assert sum(p.numel() for p in model.codec.parameters()) == 744_483_456
    assert sum(p.numel() for p in model.transformer.parameters()) == 442_285_184


def test_presets_have_the_size_their_name_promises():
    sizes = {}
    for name in ("tiny", "base"):
        with torch.device("meta"):
            sizes[name] = TokComModel(TokComConfig.from_preset(name)).num_parameters()
    assert sizes["tiny"] <= 14e6 and 70e6 < sizes["base"] < 85e6  # the shipped file is bfloat16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"codec_config": {"latent_channels": 8}}, "must be equal"),
        ({"codec_config": {"layer_type": "conv"}}, "'conv'"),
        ({"codec_config": {"token_dropout": 1.5}}, "1.5"),
        ({"codec_config": {"variational": False}}, "variational=True"),
        ({"transformer_config": {"num_attention_heads": 5}}, "multiple of `num_attention_heads`"),
        ({"transformer_config": {"num_position_axes": 9}}, "num_position_axes"),
        ({"transformer_config": {"block_size": 0}}, "block_size"),
        ({"transformer_config": {"input_projection": False}}, "input_projection=True"),
        ({"transformer_config": {"hiden_size": 64}}, "hiden_size"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"stage": "vae"}, "'vae'"),
        ({"mse_weight": 0.0, "ce_weight": 0.0}, "positive"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(Exception, match=message) as error:
        TokComConfig.from_preset("debug", **overrides)
    assert isinstance(error.value, ValueError) or "Validation" in type(error.value).__name__


def test_unknown_preset_and_codec_are_named():
    with pytest.raises(ValueError, match="huge.*known are"):
        TokComConfig.from_preset("huge")
    with pytest.raises(ValueError, match="tokcom_smell_codec"):
        TokComConfig(codec_config={"model_type": "tokcom_smell_codec"})
