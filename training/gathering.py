"""Files of a model that is sharded, of which one tensor at a time is whole.

The main process writes them as it would write those of an ordinary model, byte for byte. Whenever a
tensor is due, it asks the other processes for their shards.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from safetensors.torch import save
from torch.distributed.tensor import DTensor
from transformers import modeling_utils

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.sharding import Part


class Gathering:
    """The tensors of a sharded model, whole on request of the main process."""

    def __init__(self, model: TokComModel):
        self.state = fsdp2_canonicalize_names(model.state_dict())

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in the memory of the main process, which calls this."""
        dist.broadcast_object_list([name], 0)
        return self._gather(name)

    def finish(self) -> None:
        """Tell the other processes that nothing else is needed."""
        dist.broadcast_object_list([None], 0)

    def follow(self) -> None:
        """Send shards until the main process has finished; the other processes call this."""
        while True:
            wanted = [None]
            dist.broadcast_object_list(wanted, 0)
            if wanted[0] is None:
                return
            self._gather(wanted[0])

    def _gather(self, name: str) -> torch.Tensor | None:
        """A tensor on the main process; `DTensor.full_tensor` has several copies of it everywhere."""
        tensor = self.state[name]
        if not isinstance(tensor, DTensor):
            return tensor.cpu()
        local = tensor.to_local()
        if dist.get_rank():
            if local.numel():
                dist.send(local.contiguous(), 0)
            return None
        whole = torch.empty(tensor.shape, dtype=local.dtype, device=local.device)
        whole[: len(local)] = local
        processes = dist.get_world_size()
        for index in range(1, processes):
            rows = whole[Part(index, processes).rows(len(whole))]
            if rows.numel():
                dist.recv(rows, index)
        return whole.cpu()


@torch.no_grad()
def write_gathered(
    model: TokComModel, write: Callable[[TokComModel], None], config: TokComConfig | None = None
) -> None:
    """Call `write(empty)` on the main process, where `empty` is an ordinary model on `meta` of the
    configuration `config`, by default that of `model`. Its `save_pretrained` saves what `model`
    holds.

    Every process calls it. What `write` raises is raised on the main process, once the others are
    told to go on.
    """
    gathering = Gathering(model)
    if dist.get_rank():
        gathering.follow()
        return
    with torch.device("meta"):
        empty = TokComModel(TokComConfig.from_dict((config or model.config).to_dict()))
    save_file = partial(save_one_by_one, whole=gathering.whole)
    try:
        # the function with which transformers writes each file of weights
        with patch.object(modeling_utils, "safe_save_file", save_file):
            write(empty)
    finally:
        gathering.finish()


def save_one_by_one(
    tensors: dict[str, torch.Tensor],
    filename: str | os.PathLike,
    metadata: dict[str, str] | None = None,
    *,
    whole: Callable[[str], torch.Tensor],
) -> None:
    """Write what `safetensors.torch.save_file` would, with one tensor at a time in memory.

    Args:
        tensors: shapes and types, on `meta`.
        whole: the numbers of a tensor, by its name.
    """
    # the library's order and names of types, from tensors without elements
    nothing = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    short = save(nothing, metadata)
    header = json.loads(short[8 : 8 + int.from_bytes(short[:8], "little")])
    order = [name for name in header if name != "__metadata__"]
    start = 0
    for name in order:
        end = start + tensors[name].nbytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with Path(filename).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = whole(name).to(tensors[name].dtype).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy())
            del tensor  # before the next one is gathered
