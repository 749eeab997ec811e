"""A tiny model of several streams, its pipeline and its data, for the tests of streams."""

import itertools

import numpy as np
import torch
from helpers import seeded
from PIL import Image

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.processing_tokcom import (
    vocabulary_size,
)
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.data import train_tokenizer
from tokcom.training.presets import preset_config

STREAMS = {
    "text": dict(
        chunk_size=2, latent_channels=8, embedding_size=16, hidden_size=32, intermediate_size=32
    ),
    "image": dict(height=16, width=16),
    "audio": dict(num_frames=16, num_channels=10, fft_length=128, hop_length=64),
}
FLOW = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
SUBSETS = [
    names for size in range(4) for names in itertools.combinations(("audio", "image", "text"), size)
]


def train_words():
    return train_tokenizer(["a red ball", "a blue cat"], 300)


def model(vocab_size=300, codec=None, **overrides) -> TokComModel:
    torch.manual_seed(0)
    parts = dict(
        codec_config={"text_latents": 4, "streams": STREAMS, **(codec or {})},
        transformer_config=FLOW,
    )
    net = TokComModel(preset_config("omni-tiny", vocab_size, **{**parts, **overrides})).eval()
    for name, parameter in net.transformer.named_parameters():
        if (
            "modulation" in name
        ):  # a block at initialisation is the identity, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def build_pipe(words) -> TokComOmniPipeline:
    net = model(vocabulary_size(words))
    pipe = TokComOmniPipeline(net, TokComFlowMatchScheduler.from_model_config(net.config), words)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(batch=3, seed=1) -> dict[str, torch.Tensor]:
    g = seeded(seed)
    return {
        "text": torch.randint(0, 300, (batch, 8), generator=g),
        "image": torch.rand(batch, 3, 16, 16, generator=g) * 2 - 1,
        "audio": torch.rand(batch, 10, 16, generator=g) * 4 - 3,
    }


def content(kind: str, count: int = 2) -> list:
    made = {
        "text": [f"a {color} cat" for color in ("red", "blue", "pink")],
        "image": [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "pink")],
        "audio": [tone(f) for f in (300, 700, 1100)],
    }
    return made[kind][:count]


def tone(frequency: float, samples: int = 960, rate: int = 8000) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(samples) / rate).astype(np.float32)
