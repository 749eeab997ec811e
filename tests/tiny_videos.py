"""A tiny model of clips and its pipeline, for the tests of videos."""

import numpy as np
import torch
from helpers import seeded
from PIL import Image

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_media_tokcom import TokComVideoPipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.data import train_tokenizer
from tokcom.training.films import write_film
from tokcom.training.presets import preset_config

CODEC = dict(num_frames=4, height=16, width=24, patch_size=8)
FLOW = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
QUANTIZED = dict(
    hidden_size=32, intermediate_size=32, latent_channels=8, quantizer="vq", num_codes=16
)


def model(codec=None, transformer=None, vocab_size=None, **overrides) -> TokComModel:
    torch.manual_seed(0)
    parts = dict(
        codec_config={**CODEC, **(codec or {})}, transformer_config={**FLOW, **(transformer or {})}
    )
    net = TokComModel(preset_config("video-tiny", vocab_size, **parts, **overrides)).eval()
    for name, parameter in net.transformer.named_parameters():
        if (
            "modulation" in name
        ):  # a block at initialisation is the identity, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def pipeline(*args, captions: bool = False, **kwargs) -> TokComVideoPipeline:
    tokenizer = train_tokenizer(["a red ball", "a blue cat"], 300) if captions else None
    net = model(*args, vocab_size=vocabulary_size(tokenizer) if captions else None, **kwargs)
    pipe = TokComVideoPipeline(
        net, TokComFlowMatchScheduler.from_model_config(net.config), tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clips(count=2, frames=4, height=16, width=24, channels=3) -> torch.Tensor:
    return torch.rand(count, channels, frames, height, width, generator=seeded(3)) * 2 - 1


def moving(count: int = 6) -> list[Image.Image]:
    frames = []
    for i in range(count):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[8:24, 3 * i : 3 * i + 8] = (250, 30 * i, 40)
        frames.append(Image.fromarray(pixels))
    return frames


def films(folder, count: int = 6):
    folder.mkdir()
    for i in range(count):
        write_film(moving(), folder / f"{i}.gif")
    return folder
