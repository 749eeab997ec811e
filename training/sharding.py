"""Models too large for every process to hold: one has the weights, and each gets its shards.

Under FSDP2 the main process alone builds or loads a model. The others allocate its shape, of which
nothing is in memory until it is written, so that accelerate finds what it wants to shard. Then
every parameter is handed out, one after the other. So a process holds its shards and one whole parameter
at a time, and the main process also the model, in the memory of its host, until that is done.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def holds_shards_alone(state: PartialState) -> bool:
    """Whether this process is to hold shards of a model, and never the whole."""
    is_fsdp2 = parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "2"
    return is_fsdp2 and not state.is_main_process


def shape_of(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, without its numbers: memory that was asked for but not used."""
    with torch.device("meta"):
        model = build()
    return model.to_empty(device="cpu")


def hand_out(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill the shards of `model` from `weights`, which the main process alone needs to have.

    `weights` is the state of the model before it was sharded. Buffers are not sharded, and every
    process gets them whole. Torch's generator goes on everywhere as on the main process, which has
    drawn the weights.
    """
    is_main = dist.get_rank() == 0
    for name, target in fsdp2_canonicalize_names(model.state_dict()).items():
        if not isinstance(target, DTensor):
            if is_main:
                target.copy_(weights[name])
            dist.broadcast(target, 0)
            continue
        local = target.to_local()
        if is_main:
            whole = weights[name].to(local.device)
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=local.device)
        shard = distribute_tensor(whole, target.device_mesh, target.placements)
        local.copy_(shard.to_local())
    drawn = [torch.get_rng_state()]
    dist.broadcast_object_list(drawn, 0)
    torch.set_rng_state(drawn[0])
