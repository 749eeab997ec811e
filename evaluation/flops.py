"""Floating-point operations, counted while the real code runs (`torch.utils.flop_counter`), not
from a formula.

A multiply-add is two operations; matrix products and attention are counted, element-wise work is
not. Attention is counted dense: a mask does not make it cheaper, as it does not on the CPU.
"""

import copy
import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], object]) -> int:
    """Operations of one call of `function`, backward passes inside it included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def training_flops_per_token(model: nn.Module, input_ids: torch.Tensor) -> float:
    """Forward and backward operations per token of `input_ids (B, T)`, for TokCom or any causal
    language model.

    A self-conditioned TokCom step costs one more forward pass in half of the cases: both cases are
    counted and averaged. Weights and gradients are left as they were found.
    """
    was_training = model.training
    costs = []
    labels = {} if hasattr(model, "codec") else {"labels": input_ids}

    def step():
        model(input_ids=input_ids, **labels).loss.backward()

    model.train()
    state = random.getstate()
    torch_state = torch.get_rng_state()
    kept = [p.grad for p in model.parameters()]
    for coin in (
        _seed_with(True),
        _seed_with(False),
    ):  # the model's coin is `random.random() < 0.5`
        random.seed(coin)
        costs.append(count_flops(step))
    random.setstate(state)
    torch.set_rng_state(torch_state)
    for parameter, grad in zip(model.parameters(), kept):
        parameter.grad = grad
    model.train(was_training)
    return sum(costs) / len(costs) / input_ids.numel()


def training_flops_per_step(
    model: nn.Module,
    batch_size: int,
    sequence_length: int,
    build: Callable[[nn.Module], torch.optim.Optimizer],
) -> float:
    """Operations of one optimizer step on `batch_size` rows of `sequence_length` tokens, the
    optimizer's included."""
    per_token = training_flops_per_token(model, torch.zeros(1, sequence_length, dtype=torch.long))
    return per_token * batch_size * sequence_length + optimizer_flops(model, build)


def _seed_with(below_half: bool) -> int:
    return next(s for s in range(100) if (random.Random(s).random() < 0.5) == below_half)


def optimizer_flops(model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]) -> int:
    """Operations of one step of the optimizer that `build(model)` makes; Muon multiplies matrices,
    AdamW does not."""
    twin = copy.deepcopy(model)
    optimizer = build(twin)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    return count_flops(optimizer.step)
