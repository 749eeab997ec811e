"""FSDP2 on two gloo processes: sharded training, its average and its export are those of one
process."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, tiny_model

from tokcom.evaluation.scaling import memory

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
saved = average.state_dict()  # gathers
again = ShardedEMAModel(model.parameters(), decay=0.5)
again.load_state_dict(saved)  # distributes
restored = [a.full_tensor() if hasattr(a, "full_tensor") else a for a in again.shadow_params]
if dist.get_rank():
    assert all(p is None for p in saved["shadow_params"]), "only the main process has whole averages"
    same = True
else:
    same = all(map(torch.equal, restored, saved["shadow_params"]))
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
train(model, 1, optimizer, again)
if dist.get_rank() == 0:
    torch.save({"state": state, "average": saved["shadow_params"], "same": same}, sys.argv[1])
dist.destroy_process_group()
"""


def build():

    torch.manual_seed(0)
    return tiny_model().train()


def train(model, steps: int, optimizer=None, average=None):
    from tokcom.training.ema import ShardedEMAModel

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
    (tmp_path / "worker.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{WORKER}"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path / "out.pt")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
import json, resource, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.ema import embeddings_in_the_root
from tokcom.training.presets import preset_config
from tokcom.training.sharding import hand_out, shape_of

dist.init_process_group("gloo")
rank = dist.get_rank()
preset, everyone_builds = sys.argv[1], sys.argv[2] == "all"
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_offload=False, cpu_ram_efficient_loading=False,
)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)),
    parallelism_config=SimpleNamespace(fsdp_dim_names=("dp",)), mixed_precision="no", is_main_process=not rank, device="cpu",
)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
torch.manual_seed(0)
build = lambda: TokComModel(preset_config(preset, 4096))
model = build() if everyone_builds or not rank else shape_of(build)
model.codec.latent_mean += 1 - rank  # a buffer that the main process alone has
wanted = {name: value.clone() for name, value in model.state_dict().items()} if preset == "debug" else None
peaks = [resident() - before]
weights = model.state_dict()
with embeddings_in_the_root(model):
    model = fsdp2_prepare_model(accelerator, model)
hand_out(model, weights)
del weights
peaks.append(resident() - before)
model.set_stage("flow")
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
draws = [None, None]
dist.all_gather_object(draws, (torch.rand(1).item(), peaks, len(state)))
if not rank:
    same = wanted is None or all(torch.equal(state[name], wanted[name]) for name in wanted)
    size = sum(v.nbytes for v in state.values())
    print("RESULT", json.dumps({"same": same, "size": size, "ranks": draws}))
dist.destroy_process_group()
"""


def share(tmp_path, preset: str, who_builds: str) -> dict:
    (tmp_path / "worker.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(tmp_path / "worker.py"), preset, who_builds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT ")[2])


def test_shards_handed_out_by_one_process_are_those_of_a_model_that_all_have_built(tmp_path):
    found = share(tmp_path, "debug", "main")
    (first, _, whole), (second, _, gathered) = found["ranks"]
    assert found["same"] and first == second, "weights, buffers, and what is drawn next"
    assert whole and not gathered, "a gathered state is in the main process alone"


@pytest.mark.slow
def test_the_other_processes_never_hold_a_whole_model(tmp_path):
    """Resident memory of `base`: built by all, the whole model; built by one, half of it and one parameter."""
    everyone = share(tmp_path, "base", "all")
    alone = share(tmp_path, "base", "main")
    size = alone["size"]
    print({"bytes": size, "all build": everyone["ranks"], "one builds": alone["ranks"]})
    assert everyone["ranks"][1][1][0] > 0.9 * size
    assert alone["ranks"][1][1][0] < 0.1 * size
    assert max(alone["ranks"][1][1]) < 0.75 * size


@pytest.mark.slow
def test_both_stages_take_a_step_as_accelerate_shards_them(tmp_path):
    (tmp_path / "worker.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{PREPARED}"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
    path = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    (tmp_path / "worker.py").write_text(path + MEMORY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(tmp_path / "worker.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("RESULT ")[2])
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
