"""A tiny model of pictures and its pipeline, for the tests of images."""

import torch
from helpers import ROOT

from tokcom.codec_style_tokcom import TokComStyleCodec
from tokcom.configuration_media_tokcom import TokComStyleCodecConfig
from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComImagePipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.data import train_tokenizer

CODEC = dict(
    image_size=16,
    patch_size=4,
    num_tokens=6,
    latent_channels=4,
    hidden_size=32,
    intermediate_size=48,
)
CODEC |= dict(
    num_attention_heads=2, num_hidden_layers=1, num_expert_layers=1, expert_intermediate_size=16
)
CODEC |= dict(decoder_hidden_size=24, decoder_intermediate_size=32, decoder_num_attention_heads=2)
CODEC |= dict(num_decoder_layers=1)
FLOW = dict(
    latent_channels=4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
)
FLOW |= dict(
    num_key_value_heads=2, max_position_embeddings=6, conditioning_size=16, block_size=None
)
FLOW |= dict(per_latent_timestep=False)
EMOJI = str(ROOT / "sample_data/emoji_train.parquet")


def codec(**overrides) -> TokComStyleCodec:
    torch.manual_seed(0)
    return TokComStyleCodec._from_config(TokComStyleCodecConfig(**{**CODEC, **overrides})).eval()


def model(condition_vocab_size: int = 0, **overrides) -> TokComModel:
    torch.manual_seed(0)
    fields = dict(
        codec_config={"model_type": "tokcom_style_codec", **CODEC, **overrides},
        transformer_config=FLOW,
    )
    config = TokComConfig(**fields, condition_vocab_size=condition_vocab_size)
    return TokComModel(config).eval()


def randomized(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def pictures(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def pipeline(captions: bool = True) -> TokComImagePipeline:
    tokenizer = train_tokenizer(["a red ball", "a blue cat"], 300) if captions else None
    net = randomized(model(vocabulary_size(tokenizer) + 1 if captions else 0))
    return TokComImagePipeline(
        net, TokComFlowMatchScheduler.from_model_config(net.config), tokenizer
    )
