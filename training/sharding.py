"""Models too large for any process to hold: each has its shards, and one whole tensor at a time.

Under FSDP2 every process builds or loads the model itself. Its parameters are stand-ins on `meta`,
and each keeps the rows that FSDP2 will give to this process as its `shard`. Random numbers are
drawn for whole parameters, in the order of one process, and all but those rows are dropped at once.
From files only those rows are read. Once accelerate has sharded the stand-ins, `fill` gives them
their numbers. Buffers are whole everywhere.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tokcom.configuration_tokcom import TokComConfig
from tokcom.integrity_tokcom import (
    DATA,
    check_keys,
    check_shards,
    check_tensors,
    check_types,
    explain_loading,
    weight_files,
)
from tokcom.modeling_tokcom import TokComModel

# what leaves nothing of the numbers that a tensor had before
OVERWRITES = {"copy_", "fill_", "normal_", "uniform_", "zero_"}
ADDRESSES = count(1)
LARGE = 2**20  # bytes of a tensor after which memory is given back


class Part(NamedTuple):
    """The part that one of `count` processes has of every parameter."""

    index: int
    count: int

    def rows(self, length: int) -> slice:
        """Which of the rows of a parameter, as `torch.chunk` and FSDP2 cut it."""
        size = -(-length // self.count)
        start = min(self.index * size, length)
        return slice(start, min(start + size, length))


def part_of(state: PartialState) -> Part | None:
    """What this process is to have of every parameter; None if that is all of it."""
    is_fsdp2 = parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "2"
    # accelerate passes over FSDP on a CPU
    is_alone = state.num_processes == 1 or state.distributed_type == DistributedType.MULTI_CPU
    return Part(state.process_index, state.num_processes) if is_fsdp2 and not is_alone else None


class ShardedBuild(TorchDispatchMode):
    """While it is active, modules are built of stand-ins, and one parameter at a time is whole.

    Args:
        draws (`bool`): whether stand-ins get a `shard` of what initialises them; without, nothing
            is drawn for them.
    """

    def __init__(self, part: Part, draws: bool = True):
        super().__init__()
        self.part = part
        self.draws = draws
        self.stand_ins: dict[int, nn.Parameter] = {}  # by storage, which aliases share
        self.current: nn.Parameter | None = None
        self.whole: torch.Tensor | None = None  # all numbers of `current`

    def __enter__(self):
        self.hook = register_module_parameter_registration_hook(self._replace)
        return super().__enter__()

    def __exit__(self, *error):
        self._keep_shard()
        self.hook.remove()
        return super().__exit__(*error)

    def _replace(self, module: nn.Module, name: str, parameter: nn.Parameter | None):
        """The stand-in of a parameter that a module registers."""
        if parameter is None or parameter.is_meta:
            return None
        self._keep_shard()
        empty = torch.empty_like(parameter, device="meta")
        stand_in = nn.Parameter(empty, parameter.requires_grad)
        # accelerate finds an optimizer's parameters by address, and on meta there are none
        address = next(ADDRESSES)
        stand_in.data_ptr = lambda: address
        self.stand_ins[stand_in.untyped_storage()._cdata] = stand_in
        if self.draws:
            whole = parameter.detach()
            self.current = stand_in
            self.whole = whole
        return stand_in

    def _keep_shard(self) -> None:
        """Drop the whole parameter, after a copy of this process's rows."""
        stand_in = self.current
        whole = self.whole
        self.current = None
        self.whole = None
        if stand_in is not None:
            stand_in.shard = None  # that of an earlier initialisation
            stand_in.shard = whole[self.part.rows(len(whole))].clone()
            is_large = whole.nbytes >= LARGE
            del whole
            if is_large:
                give_back_memory()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = args[0] if args else None
        is_meta = isinstance(target, torch.Tensor) and target.is_meta
        if not is_meta:
            self._keep_shard()  # before anything else is allocated
        if not (is_meta and func._schema.is_mutable):
            return func(*args, **(kwargs or {}))
        if self.draws:
            self._carry_out(func, target, args[1:], kwargs or {})
        return target

    def _carry_out(self, func, target: torch.Tensor, rest: tuple, kwargs: dict) -> None:
        """Do to the whole parameter what is done to (a view of) its stand-in."""
        stand_in = self.stand_ins[target.untyped_storage()._cdata]
        if stand_in is not self.current:
            self._keep_shard()
            name = func._schema.name.removeprefix("aten::")
            if name not in OVERWRITES or target.numel() != stand_in.numel():
                raise NotImplementedError(f"{name} changes a parameter of which a shard is left")
            self.current = stand_in
            self.whole = torch.empty(stand_in.shape, dtype=stand_in.dtype)
        place = target.size(), target.stride(), target.storage_offset()
        func(self.whole.as_strided(*place), *rest, **kwargs)


def give_back_memory() -> None:
    """Let glibc return what was freed. It keeps gaps that the next tensor does not fit into, which
    together become as large as the model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def empty_model(path: str | os.PathLike, part: Part) -> TokComModel:
    """The model in a directory or a Hub repository, of stand-ins that have no numbers."""
    config = TokComConfig.from_pretrained(path)
    # as `from_pretrained` notes it, so that an export says the same
    config.dtype = torch.float32
    for name in config.sub_configs:
        getattr(config, name).dtype = torch.float32
    with torch.random.fork_rng(devices=[]), ShardedBuild(part, draws=False):
        return TokComModel(config).eval()


@contextmanager
def refused_by_all() -> Iterator[None]:
    """Raise the `ValueError` of any process in all of them, that of the first one."""
    problem = None
    try:
        yield
    except (OSError, ValueError) as error:
        problem = str(error)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    for message in found:
        if message is not None:
            raise ValueError(message)


def read_shards(
    model: TokComModel, path: str | os.PathLike, part: Part, codec_only: bool = False
) -> None:
    """Read this process's shards of the stand-ins of `model`, or of its codec, and the buffers.

    Raises in every process what `from_pretrained` raises for files that do not fit their own
    configuration or hold numbers that are not finite.
    """
    with refused_by_all(), explain_loading(str(path)):
        where = Path(path)
        if not where.is_dir():
            where = Path(snapshot_download(str(path), allow_patterns=[*DATA]))
        check_shards(where)
        files = weight_files(where, {})
        source = empty_model(where, part)
        _check_names(source, files, path)
        check_types(files, source)
        check_tensors(_shards_in(files, model, part, codec_only), str(path))


def _check_names(model: TokComModel, files: list[Path], path: str | os.PathLike) -> None:
    state = model.state_dict()
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    others = [
        (name, shape, list(state[name].shape))
        for name, shape in shapes.items()
        if name in state and shape != list(state[name].shape)
    ]
    facts = {"missing_keys": state.keys() - shapes.keys(), "mismatched_keys": others}
    facts["unexpected_keys"] = shapes.keys() - state.keys()
    check_keys(str(path), facts, weights_may_differ=False)


def _shards_in(
    files: list[Path], model: TokComModel, part: Part, codec_only: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and shards of all that is in `files`; those of `model` become its own."""
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            # opened anew: what was read of an open file stays mapped
            with safe_open(file, framework="pt") as tensors:
                if name in buffers:
                    value = tensors.get_tensor(name)
                else:
                    stored = tensors.get_slice(name)
                    value = stored[part.rows(stored.get_shape()[0])].clone()  # not the mapped file
            if codec_only and not name.startswith("codec."):
                pass
            elif name in buffers:
                buffers[name].copy_(value)
            else:
                parameters[name].shard = value.to(parameters[name].dtype)
            yield name, value


def load_sharded(path: str | os.PathLike, part: Part) -> TokComModel:
    """What `from_pretrained` loads in float32, as stand-ins with their shards."""
    model = empty_model(path, part)
    read_shards(model, path, part)
    return model


def shards_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The shards of a model of stand-ins, by the names of its parameters; none of any other."""
    parameters = model.named_parameters()
    return {name: parameter.shard for name, parameter in parameters if parameter.is_meta}


@torch.no_grad()
def fill(model: nn.Module, shards: dict[str, torch.Tensor]) -> None:
    """Give the parameters of a model that FSDP2 has sharded their numbers, and empty `shards`.

    The parameters stay the objects that they were, which an optimizer knows. Buffers become those
    of the main process.
    """
    for name, target in fsdp2_canonicalize_names(dict(model.named_parameters())).items():
        local = target.to_local()
        shard = shards.pop(name)
        if local.shape != shard.shape:
            raise ValueError(
                f"this process has {list(local.shape)} of {name} instead of {list(shard.shape)}; "
                "shard over all processes alike, as accelerate_configs/fsdp2.yaml does."
            )
        if not target.is_meta:
            local.copy_(shard)
            continue
        shard = shard.to(target.device_mesh.device_type)
        whole = DTensor.from_local(
            shard,
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )
        torch.utils.swap_tensors(target, nn.Parameter(whole, target.requires_grad))
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
