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
    return TokComConfig.from_preset("debug", vocab_size, transformer_config=transformer, **overrides)
