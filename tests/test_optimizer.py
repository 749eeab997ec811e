import copy

import pytest
import torch
from torch import nn

from tokcom.layers_tokcom import TokComTimestepEmbedding
from tokcom.training.optimizer import Float32Muon, build_optimizer, build_schedule
from tokcom.training.precision import has_fast_bfloat16, resolve_precision


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def train(model, optimizer, steps: int) -> None:
    for step in range(steps):
        ids = torch.arange(5) + step
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_gets_the_inner_matrices_and_every_parameter_belongs_to_one():
    model = network()
    model[3].requires_grad_(False)
    optimizer = build_optimizer(model, 1e-2, 1e-2, 0.1)
    adamw, muon = optimizer.parts
    assert [p is model[1].weight for g in muon.param_groups for p in g["params"]] == [True]
    owned = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decays = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert (
        decays[id(model[0].weight)] == 0.1
        and decays[id(model[2].weight)] == decays[id(model[1].bias)] == 0.0
    )


def test_muon_leaves_the_network_that_embeds_the_time_to_adamw():
    model = nn.ModuleDict(dict(time=TokComTimestepEmbedding(8, 1000.0), proj=nn.Linear(8, 8)))
    adamw, muon = build_optimizer(model, 1e-2, 1e-2, 0.1).parts
    assert [p is model["proj"].weight for g in muon.param_groups for p in g["params"]] == [True]
    assert {id(p) for p in model["time"].parameters()} < {
        id(p) for g in adamw.param_groups for p in g["params"]
    }


def test_without_a_muon_rate_it_is_adamw():
    first, second = network(), network()
    groups = [{"params": [p for p in second.parameters() if p.ndim >= 2]}]
    groups.append({"params": [p for p in second.parameters() if p.ndim < 2], "weight_decay": 0.0})
    train(first, build_optimizer(first, 1e-2, 0.0, 0.1), 3)
    train(second, torch.optim.AdamW(groups, 1e-2, (0.9, 0.98), weight_decay=0.1, fused=True), 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_a_schedule_and_a_restored_state_continue_exactly():
    model = network()
    optimizer = build_optimizer(model, 1e-2, 2e-2, 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, 3)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 5e-3, 1e-2]
    twin = copy.deepcopy(model)
    restored = build_optimizer(twin, 1e-2, 2e-2, 0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, restored)):
        train(m, o, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    assert [g["lr"] for g in restored.param_groups] == [5e-3, 5e-3, 1e-2]


def test_float32_muon_follows_torchs_up_to_its_rounding():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(12, 20)) for _ in range(2))
    options = dict(lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = Float32Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(4):
        ours.grad = torch.randn(12, 20)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert torch.allclose(
        *(o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (ours, theirs)))
    )


def test_automatic_precision_is_bfloat16_only_where_it_is_fast(monkeypatch):
    for fast, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(
            "tokcom.training.precision.has_fast_bfloat16", lambda device_type, fast=fast: fast
        )
        assert resolve_precision("auto", "cpu") == expected
        assert resolve_precision("fp16", "cpu") == "fp16" and resolve_precision(None, "cpu") is None
    with pytest.warns(UserWarning, match="mixed_precision=auto"):
        assert resolve_precision("bf16", "cpu") == "bf16"
    assert isinstance(has_fast_bfloat16("cpu"), bool)


def test_the_cool_down_is_constant_after_the_warm_up_and_ends_at_zero():
    optimizer = torch.optim.AdamW(network().parameters(), 1.0)
    schedule = build_schedule(optimizer, max_steps=20, warmup_steps=4, cooldown_share=0.25)
    (factor,) = schedule.lr_lambdas
    assert [factor(step) for step in range(16)] == [0.0, 0.25, 0.5, 0.75] + [1.0] * 12
    assert [factor(step) for step in range(15, 20)] == [1 - (k / 5) ** 0.5 for k in range(5)]
    assert factor(20) == factor(30) == 0.0
