"""Real classes at tiny size, on the CPU, without network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# workers, and the processes that they start, share the cores: one job of two threads beside another
# is many times slower
if "PYTEST_XDIST_WORKER" in os.environ:
    # what starts them has read this file too, and hands its own number down
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import json

import pytest
import torch
from helpers import ROOT, exact_pipe, tiny_config

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.data import train_tokenizer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def stories() -> list[str]:
    lines = (ROOT / "sample_data" / "stories_validation.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def tokenizer(stories):
    return train_tokenizer(stories, 320)


@pytest.fixture(scope="module")
def pipe(tokenizer) -> TokComPipeline:
    """A text pipeline of exact probabilities; files about others have a fixture of this name."""
    return exact_pipe(tokenizer)


@pytest.fixture
def start():
    """A function that starts servers, which end with the test: `start(pipe, max_batch=4)`."""
    # imported here, since only the server's tests have its packages in use
    from serving import servers

    with servers() as make:
        yield make


@pytest.fixture
def build(tokenizer):
    """Factory of a seeded tiny pipeline: `build(transformer_config={"block_size": None})`."""

    def make(**overrides) -> TokComPipeline:
        torch.manual_seed(0)
        model = TokComModel(tiny_config(vocabulary_size(tokenizer), **overrides)).eval()
        for name, parameter in model.transformer.named_parameters():
            # a block at initialisation is the identity, which would hide mistakes
            if "modulation" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        pipe = TokComPipeline(
            model, TokComFlowMatchScheduler.from_model_config(model.config), tokenizer
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
