"""What several test files share: paths, seeds, tiny models."""

from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
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


def tiny_model(stage: str = "flow", objective: dict | None = None, vocab_size: int = 320, **overrides) -> TokComModel:
    """A tiny model that is set to train a stage with an `objective` of these settings."""
    model = TokComModel(tiny_config(vocab_size, **overrides))
    model.set_stage(stage, **(objective or {}))
    return model


def build_model(vocab_size: int = 320, **overrides) -> TokComModel:
    """A seeded model whose tokens take turns, with a context network, and blocks that do something."""
    torch.manual_seed(0)
    model = TokComModel(tiny_config(vocab_size, **TURNS, transformer_config=SPLIT, **overrides)).eval()
    with torch.no_grad():
        model.codec.embed_tokens.weight.normal_()
        model.codec.to_posterior.weight.normal_(std=0.3)
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.3)
            if "start_embedding" in name:
                parameter.normal_()
    return model
