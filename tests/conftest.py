"""Real classes at tiny size, on the CPU, without network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# workers, and the processes that they start, share the cores: one job of two threads beside another is many times slower
if "PYTEST_XDIST_WORKER" in os.environ:  # what starts them has read this file too, and hands its own number down
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file

from configuration_tokcom import TokComConfig
from modeling_tokcom import TokComModel
from pipeline_text_tokcom import vocabulary_size
from pipeline_tokcom import TokComPipeline
from scheduling_tokcom import TokComFlowMatchScheduler
from training.data import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STOCK_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def stories() -> list[str]:
    lines = (ROOT / "sample_data" / "stories_validation.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def tokenizer(stories):
    return train_tokenizer(stories, 320)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two directories hold the same weights, to the last bit."""
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_config(vocab_size: int = 320, **overrides) -> TokComConfig:
    transformer = {"max_position_embeddings": 32, **overrides.pop("transformer_config", {})}
    return TokComConfig.from_preset("debug", vocab_size, transformer_config=transformer, **overrides)


@pytest.fixture
def build(tokenizer):
    """Factory of a seeded tiny pipeline: `build(transformer_config={"block_size": None})`."""

    def make(**overrides) -> TokComPipeline:
        torch.manual_seed(0)
        overrides.setdefault("stage", "flow")
        model = TokComModel(tiny_config(vocabulary_size(tokenizer), **overrides)).eval()
        for name, parameter in model.transformer.named_parameters():
            if "modulation" in name:  # a block at initialisation is the identity, which would hide mistakes
                torch.nn.init.normal_(parameter, std=0.3)
        pipe = TokComPipeline(model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
