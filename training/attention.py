"""Which attention function a stage trains with: the one that was asked for, the one it began with,
or the fastest here."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset

from tokcom.modeling_tokcom import TokComModel

ATTENTIONS = ("sdpa", "sdpa_float32", "eager")  # what `attention=auto` chooses from


def saved_attention(extra_file: Path) -> str:
    """The attention function of a checkpoint. Functions differ in rounding, so a run that goes on
    keeps its own."""
    return torch.load(extra_file, map_location="cpu", weights_only=True).get("attention", "sdpa")


def fastest_attention(
    model: TokComModel, dataset: Dataset, batch_size: int, accelerator: Accelerator
) -> str:
    """The function with the fastest training step on this machine; all processes agree on that of
    the first."""
    batch = next(iter(DataLoader(dataset, batch_size)))
    seconds = {name: time_step(model, batch, name, accelerator) for name in ATTENTIONS}
    # Times differ between processes, and the functions differ in rounding: all must use one.
    fastest = broadcast_object_list([min(seconds, key=seconds.get)])[0]
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    accelerator.print(f"attention {fastest!r} (a step takes {times})")
    return fastest


def time_step(
    model: TokComModel, batch: dict[str, torch.Tensor], attention: str, accelerator: Accelerator
) -> float:
    """Seconds of one forward and backward pass with an attention function, the faster of two."""
    model.set_attn_implementation(attention)
    model.train()
    seconds = []
    # the first call also allocates memory and chooses kernels
    for _ in range(2):
        # the same noise for each function, so all of them do the same work
        torch.manual_seed(0)
        started = time.perf_counter()
        with accelerator.autocast():
            loss = model(**batch).loss
        loss.backward()
        # these gradients must not reach the first update
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
