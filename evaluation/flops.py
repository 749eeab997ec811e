"""Count floating-point operations while the real code runs (`torch.utils.flop_counter`).

A multiply-add is two operations. Matrix products and attention are counted, element-wise work is
not. Attention is counted dense: on the CPU a mask does not make it cheaper.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROWS = 8  # of a batch whose operations are counted
STEPS = 4  # that are averaged


def count_flops(function: Callable[[], object]) -> int:
    """Operations of one call of `function`, including its backward passes."""
    # plain matrix products, so that attention counts the same on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def training_flops_per_token(model: nn.Module, input_ids: torch.Tensor) -> float:
    """Forward and backward operations per token of `input_ids (B, T)`, for TokCom or any causal
    language model.

    Averages some steps, because how many chunks have a loss varies with the random draws; they are
    the same in every count. The model's objective must be that of the run (`set_stage`): how many
    noise draws it takes is a setting of training. Weights, gradients and the random state are left
    unchanged.
    """
    was_training = model.training
    costs = []
    # transformers' models compute a loss only if they are given labels
    labels = {} if hasattr(model, "codec") else {"labels": input_ids}

    def step():
        model(input_ids=input_ids, **labels).loss.backward()

    model.train()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    kept = [p.grad for p in model.parameters()]
    for _ in range(STEPS):
        costs.append(count_flops(step))
    torch.set_rng_state(state)
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
    """Operations of one training step on `batch_size` rows of `sequence_length` tokens, including
    the optimizer."""
    rows = torch.zeros(ROWS, sequence_length, dtype=torch.long)
    per_token = training_flops_per_token(model, rows)
    return per_token * batch_size * sequence_length + optimizer_flops(model, build)


def optimizer_flops(model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]) -> int:
    """Operations of one optimizer step. Muon multiplies matrices, AdamW does not."""
    twin = copy.deepcopy(model)  # its weights will change
    optimizer = build(twin)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    return count_flops(optimizer.step)
