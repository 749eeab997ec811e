"""FSDP2 on two gloo processes: what is built, loaded, trained and saved is that of one process, and
no process ever holds all of it."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MEDIA, ROOT, same_weights, tiny_model
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file
from test_training import QUICK, quick

from tokcom.evaluation.scaling import memory
from tokcom.modeling_tokcom import TokComModel
from tokcom.train_accelerate import run
from tokcom.training.ema import ShardedEMAModel
from tokcom.training.export import export_repository
from tokcom.training.gathering import save_one_by_one
from tokcom.training.images import measure_image_statistics
from tokcom.training.presets import preset_config
from tokcom.training.sharding import Part, ShardedBuild, shards_of

PATH = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"


def spawn(worker: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What two processes print that run `worker`."""
    (tmp_path / "worker.py").write_text(PATH + worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(tmp_path / "worker.py"), *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def result_of(printed: str):
    return json.loads(printed.partition("RESULT ")[2])


# ---- one process ----


def preset_model(name: str) -> TokComModel:
    parts = dict(MEDIA.get(name, {}))
    vocabulary = {"debug": 320, "several": 300}.get(name, 0)
    return TokComModel(preset_config(parts.pop("preset", name), vocabulary, **parts))


@pytest.mark.parametrize("name", ["debug", "image", "video", "several"])
def test_parts_of_a_model_are_built_of_the_numbers_that_one_process_draws(name):
    torch.manual_seed(0)
    whole = preset_model(name)
    drawn_next = torch.rand(1)
    parts = []
    for index in range(3):
        torch.manual_seed(0)
        with LiveBytes() as counted, ShardedBuild(Part(index, 3)):
            model = preset_model(name)
        assert torch.equal(torch.rand(1), drawn_next)
        for mine, buffer in zip(model.buffers(), whole.buffers(), strict=True):
            assert torch.equal(mine, buffer)
        parts.append(shards_of(model))
        kept = [*parts[-1].values(), *model.buffers()]
        largest = max(parameter.nbytes for parameter in whole.parameters())
        assert counted.peak <= sum(tensor.nbytes for tensor in kept) + largest
    for parameter_name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([part[parameter_name] for part in parts]), parameter)


def test_a_codec_without_parameters_is_measured_before_the_model_has_its_shards():
    pixels = torch.rand(4, 3, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    dataset = [{"pixel_values": clip} for clip in pixels]
    with ShardedBuild(Part(1, 2)):
        model = preset_model("video")
    whole = preset_model("video")
    for measured in (model, whole):
        measure_image_statistics(measured, dataset)
    assert not torch.equal(whole.codec.latent_std, torch.ones_like(whole.codec.latent_std))
    assert torch.equal(model.codec.latent_std, whole.codec.latent_std)


def test_a_parameter_that_is_changed_after_its_shard_was_kept_is_refused():
    with pytest.raises(NotImplementedError, match="mul_"), ShardedBuild(Part(0, 2)):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        torch.nn.init._no_grad_fill_(model[0].weight, 1.0).detach().mul_(2)
        model[1].weight.detach().mul_(2)


def test_a_file_that_is_written_tensor_by_tensor_is_the_one_of_safetensors(tmp_path):
    tensors = {
        "halves": torch.randn(7).bfloat16(),
        "matrix": torch.randn(3, 5),
        "ids": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(2.0),
        "nothing": torch.empty(0, 3),
        'quoted "\u00e9"': torch.randn(2),
    }
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "theirs", metadata)
        save_one_by_one(shapes, tmp_path / "ours", metadata, whole=tensors.__getitem__)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# ---- two processes ----


WORKER = """
import random, sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_sharding import build, train
from tokcom.training.ema import ShardedEMAModel

dist.init_process_group("gloo")
model = build()
mesh = init_device_mesh("cpu", (2,))
for layer in model.transformer.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer, average = train(model, 3)
average.save_shards(sys.argv[1] + ".shards")
saved = average.state_dict()
assert all(p is None for p in saved["shadow_params"]), "shards are in files of their own"
again = ShardedEMAModel(model.parameters(), decay=0.5)
again.load_state_dict(saved)
again.load_shards(sys.argv[1] + ".shards")
averages = [a.full_tensor() for a in average.shadow_params]
same = all(torch.equal(a.full_tensor(), b) for a, b in zip(again.shadow_params, averages))
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
train(model, 1, optimizer, again)
if dist.get_rank() == 0:
    torch.save({"state": state, "average": averages, "same": same}, sys.argv[1])
dist.destroy_process_group()
"""


def build():
    torch.manual_seed(0)
    return tiny_model().train()


def train(model, steps: int, optimizer=None, average=None):
    optimizer = optimizer or torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.1
    )
    average = average or ShardedEMAModel(model.parameters(), decay=0.5)
    for step in range(steps):
        torch.manual_seed(step)
        random.seed(step)
        ids = torch.randint(
            0, 300, (2, 32)
        )  # the same on both processes, so that the mean is that of one
        model(ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
    return optimizer, average


@pytest.mark.slow
def test_sharded_training_average_and_export_are_those_of_one_process(tmp_path):
    spawn(WORKER, tmp_path, str(tmp_path / "out.pt"))
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    model = build()
    _, average = train(model, 3)
    assert found["same"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(average.shadow_params, found["average"], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)


PREPARED = """
import random
from types import SimpleNamespace
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from tokcom.modeling_tokcom import TokComModel
from helpers import ROOT, tiny_model
from tokcom.training.ema import embeddings_in_the_root

dist.init_process_group("gloo")
settings = yaml.safe_load((ROOT / "accelerate_configs/fsdp2.yaml").read_text())["fsdp_config"]
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT", cpu_offload=False,
    cpu_ram_efficient_loading=settings["fsdp_cpu_ram_efficient_loading"],
)
# accelerate itself refuses FSDP2 on a CPU, so what it would call is called here
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)),
    parallelism_config=SimpleNamespace(fsdp_dim_names=("dp",)), mixed_precision="no", is_main_process=True, device="cpu",
)
for stage in ("codec", "flow"):
    torch.manual_seed(0)
    random.seed(0)  # decides how many passes all processes make
    model = tiny_model(stage).train()
    with embeddings_in_the_root(model):
        model = fsdp2_prepare_model(accelerator, model)
    model(torch.randint(0, 300, (2, 32))).loss.backward()
    assert model.get_input_embeddings() is model.codec.embed_tokens
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
dist.destroy_process_group()
"""


SHARED = """
import json, resource
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from live_bytes import LiveBytes
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.ema import ShardedEMAModel, embeddings_in_the_root
from tokcom.training.export import export_repository
from tokcom.training.gathering import write_gathered
from tokcom.training.presets import preset_config
from tokcom.training.sharding import Part, ShardedBuild, fill, load_sharded, shards_of

dist.init_process_group("gloo")
rank = dist.get_rank()
part = Part(rank, 2)
folder = Path(sys.argv[1])
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_offload=False, cpu_ram_efficient_loading=False,
)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)),
    parallelism_config=SimpleNamespace(fsdp_dim_names=("dp",)), mixed_precision="no", is_main_process=not rank, device="cpu",
)

def shard(model):
    shards = shards_of(model)
    with embeddings_in_the_root(model):
        model = fsdp2_prepare_model(accelerator, model)
    fill(model, shards)
    return model

def held(*groups):
    return sum(getattr(t, "_local_tensor", t).nbytes for tensors in groups for t in tensors)

def tell(found):
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    if not rank:
        print("RESULT", json.dumps(everyone))
    dist.destroy_process_group()
"""

COUNTED = (
    SHARED
    + """
config = preset_config("debug", 320, transformer_config={"num_hidden_layers": 8})
save = lambda model, name: write_gathered(model, lambda m: export_repository(m, None, folder / name))
found = {"live": {}, "refused": {}}

def count(name, work, *others):
    with LiveBytes() as counted:
        model = work()
    kept = held(model.parameters(), model.buffers(), *others)
    found["live"][name] = [counted.peak, kept]
    return model

def build():
    torch.manual_seed(0)
    with ShardedBuild(part):
        model = TokComModel(config)
    return shard(model)

def average():
    mine = ShardedEMAModel(model.parameters(), decay=0.5)
    mine.save_shards(folder / "average")
    mine.load_shards(folder / "average")
    averages.extend(mine.shadow_params)
    return model

model = count("build", build)
found["next"] = torch.rand(1).item()
count("save", lambda: save(model, "built") or model)
averages = []
count("average", average, averages)
del averages, model
model = count("load", lambda: shard(load_sharded(folder / "built", part)))
save(model, "loaded")
for case in sorted(folder.glob("bad-*")):
    try:
        load_sharded(case, part)
    except ValueError as error:
        found["refused"][case.name] = str(error)
tell(found)
"""
)


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def damage(good: Path, name: str, change) -> None:
    """A copy of a model whose weights `change` has changed."""
    bad = good.with_name(f"bad-{name}")
    shutil.copytree(good, bad)
    tensors = load_file(bad / "model.safetensors")
    change(tensors)
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_no_process_ever_holds_more_than_its_shards_and_one_tensor(tmp_path):
    torch.manual_seed(0)
    config = preset_config("debug", 320, transformer_config={"num_hidden_layers": 8})
    model = TokComModel(config)
    drawn_next = torch.rand(1).item()
    one = tmp_path / "one"
    export_repository(model, None, one)
    name = "codec.embed_tokens.weight"
    damage(one, "missing", lambda tensors: tensors.pop(name))
    damage(one, "unexpected", lambda tensors: tensors.update(other=torch.ones(1)))
    damage(one, "shape", lambda tensors: tensors.update({name: torch.ones(4, 2)}))
    damage(one, "type", lambda tensors: tensors.update({name: tensors[name].int()}))
    damage(one, "infinite", lambda tensors: tensors[name][-1].fill_(torch.inf))  # the second's
    whole = files_of(tmp_path / "bad-missing")["model.safetensors"]
    shutil.copytree(one, tmp_path / "bad-cut")
    (tmp_path / "bad-cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    first, second = result_of(spawn(COUNTED, tmp_path, str(tmp_path)))
    assert first["next"] == second["next"] == drawn_next
    assert files_of(tmp_path / "built") == files_of(one)
    reloaded = TokComModel.from_pretrained(one, dtype=torch.float32)
    export_repository(reloaded, None, tmp_path / "reloaded")
    assert files_of(tmp_path / "loaded") == files_of(tmp_path / "reloaded")

    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    for found in (first, second):
        print({name: (peak, kept) for name, (peak, kept) in found["live"].items()}, size, largest)
        for name, (peak, kept) in found["live"].items():
            # and messages between the processes, such as the name of a tensor
            assert peak <= kept + largest + 2**14, (name, peak, kept, largest)
            assert name == "average" or peak < 0.75 * size

    assert first["refused"] == second["refused"]
    for case in ("missing", "unexpected", "shape", "type", "infinite", "cut"):
        bad = tmp_path / f"bad-{case}"
        with pytest.raises(ValueError) as refused:
            TokComModel.from_pretrained(bad)
        expected = str(refused.value)
        assert first["refused"][bad.name] == expected


RESIDENT = (
    SHARED
    + """
from tokcom.training.sharding import give_back_memory

config = preset_config("base", 4096)
found = {}

def resident(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return 1024 * int(line.split()[1])

def measure(name, work, *arguments):
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    result = work(*arguments)
    found[name] = [resident("VmHWM") - before, resident("VmRSS") - before]
    return result

def build():
    torch.manual_seed(0)
    with ShardedBuild(part):
        return TokComModel(config)

def everyone_builds():
    torch.manual_seed(0)
    return TokComModel(config)

def load():
    return load_sharded(folder / "out", part)

model = measure("built", build)
model = measure("sharded", shard, model)
found["size"] = sum(parameter.nbytes for parameter in model.parameters())
measure("saved", lambda: write_gathered(model, lambda m: export_repository(m, None, folder / "out")))
del model
give_back_memory()
model = measure("loaded", load)
del model
give_back_memory()
measure("built whole", everyone_builds)
tell(found)
"""
)


@pytest.mark.slow
def test_resident_memory_stays_far_below_a_whole_model(tmp_path):
    for rank in result_of(spawn(RESIDENT, tmp_path, str(tmp_path))):
        print(rank)
        size = rank.pop("size")
        whole = rank.pop("built whole")[0]
        assert whole > 0.95 * size
        assert all(peak < 0.65 * size for peak, _ in rank.values()), (rank, size)


# accelerate has no FSDP2 on a CPU, so this one passes for a GPU where the kind of launch is read
RUN = """
from accelerate import DistributedType
from tokcom.training import launch

start_processes = launch.start_processes

def start():
    state = start_processes()
    state.distributed_type = DistributedType.MULTI_GPU
    return state

launch.start_processes = start
from tokcom.train_accelerate import main
main(sys.argv[1:])
"""
FSDP2 = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.slow
def test_a_run_under_fsdp2_trains_what_one_process_does_and_resumes(tmp_path):
    """Both stages, averages and latent statistics included, with the script itself."""
    options = [f"{stage}.{name}" for stage in ("codec", "flow") for name in ("ema_half_life=0.2",)]
    options += ["codec.muon_learning_rate=0", "flow.muon_learning_rate=0", "attention=sdpa"]
    options += ["mixed_precision=no"]
    half = [f"{stage}.gradient_accumulation_steps=2" for stage in ("codec", "flow")]
    run(quick(tmp_path, *options, *half))
    one = tmp_path / "out"
    two = tmp_path / "two"
    arguments = ["--preset", "debug", *QUICK, *options, f"output_dir={two}"]
    arguments += [f"data.train={ROOT}/sample_data/stories_validation.jsonl", "data.validation=null"]
    spawn(RUN, tmp_path, *arguments, **FSDP2)

    for stage in ("codec", "flow"):
        final = two / "run" / stage / "final"
        theirs = load_file(final / "model.safetensors")
        for name, value in load_file(one / "run" / stage / "final/model.safetensors").items():
            torch.testing.assert_close(theirs[name], value, rtol=2e-3, atol=2e-4)
        other = one / "run" / stage / "final"
        assert files_of(final).keys() == files_of(other).keys()
        weights = ("model.safetensors", "checksums.json")  # which agree to rounding
        for name, content in files_of(other).items():
            assert name in weights or content == files_of(final)[name], (stage, name)
        again = tmp_path / "again"
        export_repository(TokComModel.from_pretrained(final), None, again)
        for name in ("model.safetensors", "config.json"):
            assert (again / name).read_bytes() == (final / name).read_bytes()

    whole = two.rename(tmp_path / "whole")
    shutil.copytree(whole, two)
    for gone in ("checkpoint-6", "final", "summary.json"):
        target = two / "run" / "flow" / gone
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    printed = spawn(RUN, tmp_path, *arguments, **FSDP2)
    assert "resumed flow from" in printed
    assert same_weights(whole, two)


@pytest.mark.slow
def test_both_stages_take_a_step_as_accelerate_shards_them(tmp_path):
    spawn(PREPARED, tmp_path)


MEMORY = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from helpers import tiny_model
from tokcom.training.ema import ShardedEMAModel

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = tiny_model().train()
units = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
for unit in units:
    fully_shard(unit, mesh=mesh)
fully_shard(model, mesh=mesh)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained)
average = ShardedEMAModel(trained, decay=0.5)
model(torch.randint(0, 300, (2, 32))).loss.backward()
optimizer.step()
local = lambda tensors: sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)
moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
parts = list(model.parameters()), [p.grad for p in trained], moments, average.shadow_params
found = [0] * 2
dist.all_gather_object(found, sum(map(local, parts)))
if dist.get_rank() == 0:
    print("RESULT", json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_memory_of_a_rank_is_what_was_foretold(tmp_path):
    """Weights, gradients, moments and average of two processes, beside `evaluation/scaling.py`."""
    found = result_of(spawn(MEMORY, tmp_path))
    model = tiny_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    foretold = memory(trained, frozen, 0.0, ranks=2, sharded=True, average=True)
    print(f"foretold {foretold:,.0f} bytes, measured {found}")
    assert all(abs(bytes_ - foretold) < 0.03 * foretold for bytes_ in found), (found, foretold)


@pytest.mark.slow
def test_the_check_for_gpus_runs_every_part_at_tiny_sizes_on_a_cpu(tmp_path):
    environment = dict(os.environ, DEVICE="cpu", SMALL="1", PYTHON=sys.executable)
    command = [str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    logs = {log.name: log.read_text()[-500:] for log in (tmp_path / "out").glob("*.log")}
    assert done.returncode == 0, (done.stdout, logs)
    found = {file.stem for file in (tmp_path / "out").glob("*.json")}
    assert found == {"training_debug", "attention", "sampling"}
    rows = json.loads((tmp_path / "out" / "attention.json").read_text())["rows"]
    assert [row["attention"] for row in rows if "seconds" in row][:2] == ["reference", "sdpa"]
