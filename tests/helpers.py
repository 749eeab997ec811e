"""What several test files share: paths, seeds, tiny models."""

import io
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.pipelines import build_pipeline
from tokcom.training.presets import preset_config

ROOT = Path(__file__).resolve().parents[1]
STOCK_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
]


def same_weights(first: Path, second: Path) -> bool:
    """Whether two directories hold the same weights, to the last bit."""
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_config(vocab_size: int = 320, **overrides) -> TokComConfig:
    transformer = {"max_position_embeddings": 32, **overrides.pop("transformer_config", {})}
    return preset_config("debug", vocab_size, transformer_config=transformer, **overrides)


TURNS = {
    "prediction_type": "tokens",
    "codec_config": {"encoder_type": "token"},
    "token_stagger": 1.0,
    "timestep_sampling": "uniform",
}
SPLIT = {
    "num_context_layers": 1,
    "num_hidden_layers": 2,
    "block_size": 1,
    "head_attention": False,
    "start_latents": True,
}


def tiny_model(
    stage: str = "flow", objective: dict | None = None, vocab_size: int = 320, **overrides
) -> TokComModel:
    """A tiny model that is set to train a stage with an `objective` of these settings."""
    model = TokComModel(tiny_config(vocab_size, **overrides))
    model.set_stage(stage, **(objective or {}))
    return model


def build_model(vocab_size: int = 320, **overrides) -> TokComModel:
    """A seeded model whose tokens take turns, with a context network, and blocks that do
    something."""
    torch.manual_seed(0)
    model = TokComModel(
        tiny_config(vocab_size, **TURNS, transformer_config=SPLIT, **overrides)
    ).eval()
    with torch.no_grad():
        model.codec.embed_tokens.weight.normal_()
        model.codec.to_posterior.weight.normal_(std=0.3)
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.3)
            if "start_embedding" in name:
                parameter.normal_()
    return model


MEDIA = {
    "image": {
        "preset": "style-tiny",
        "codec_config": {
            **dict(
                image_size=16,
                patch_size=4,
                num_tokens=6,
                latent_channels=4,
                hidden_size=32,
                intermediate_size=48,
            ),
            **dict(
                num_attention_heads=2,
                num_hidden_layers=1,
                num_expert_layers=1,
                expert_intermediate_size=16,
            ),
            **dict(
                decoder_hidden_size=24, decoder_intermediate_size=32, decoder_num_attention_heads=2
            ),
            **dict(num_styled_layers=3, num_decoder_layers=1),
        },
        "transformer_config": {"latent_channels": 4, "max_position_embeddings": 6},
    },
    "video": {
        "preset": "video-tiny",
        "codec_config": dict(num_frames=4, height=16, width=24, patch_size=8),
    },
    "several": {
        "preset": "omni-tiny",
        "codec_config": {
            "text_latents": 4,
            "streams": {
                "text": dict(
                    chunk_size=2,
                    latent_channels=8,
                    embedding_size=16,
                    hidden_size=32,
                    intermediate_size=32,
                ),
                "image": dict(height=16, width=16),
                "audio": dict(num_frames=16, num_channels=10, fft_length=128, hop_length=64),
            },
        },
    },
}


def tiny_pipeline(modality: str, tokenizer=None) -> TokComBasePipeline:
    """A seeded pipeline of pictures, clips or several streams; with captions if there is a
    tokenizer."""
    torch.manual_seed(0)
    parts = dict(MEDIA[modality])
    small = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    small |= dict(num_key_value_heads=2, **parts.pop("transformer_config", {}))
    size = None if tokenizer is None else vocabulary_size(tokenizer)
    if modality == "several":
        size = size or 300
    config = preset_config(parts.pop("preset"), size, transformer_config=small, **parts)
    model = TokComModel(config).eval()
    for name, parameter in model.named_parameters():
        if (
            "modulation" in name
        ):  # a block at initialisation is the identity, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = build_pipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact_pipe(tokenizer, kind: type[TokComPipeline] = TokComPipeline) -> TokComPipeline:
    """A model whose tokens take turns, so that its probabilities are exact."""
    return quiet_pipe(build_model(vocabulary_size(tokenizer)), tokenizer, kind)


def quiet_pipe(model, tokenizer, kind: type[TokComPipeline] = TokComPipeline) -> TokComPipeline:
    """A model with its own scheduler, and without a progress bar."""
    pipe = kind(model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """A picture as a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shades(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    """Pictures of one colour each, from green to red."""
    return [Image.new("RGB", size, (20 * i, 255 - 20 * i, 40)) for i in range(count)]
