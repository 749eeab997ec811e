"""The optimizer of every training script here: AdamW, with Muon on the matrices inside the network
if it has a rate."""

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from transformers import get_wsd_schedule

from tokcom.layers_tokcom import TokComTimestepEmbedding
from tokcom.training.precision import has_fast_bfloat16


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, for learning-rate schedules and
    checkpoints."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        # the base class makes groups of its own, which `_link` replaces
        super().__init__(
            [p for part in parts for group in part.param_groups for p in group["params"]], {}
        )
        self._link()

    def _link(self) -> None:
        # the very dictionaries of the parts, so that a schedule which sets their rate reaches them
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # loading gave the parts new dictionaries
        self._link()


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `match_rms_adamw`, whose products are float32 instead of bfloat16.

    For processors where those are slow: on an AVX2 core a step of `tiny` takes 0.5 s instead of 16.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"]
                grad = parameter.grad
                # momentum and update as torch.optim.Muon averages them
                momentum.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalize(
                    update, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                # decoupled weight decay, as in AdamW
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # The entries of an orthogonal matrix have a root mean square of 1 / sqrt(longer
                # side), those of AdamW's updates one of 0.2 to 0.4 (Liu et al. 2025). One rate fits
                # both.
                parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])
        return loss


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Bring the singular values of `matrix` near 1 by a quintic Newton-Schulz iteration (Jordan et
    al. 2024)."""
    a, b, c = coefficients
    # wide `(m, n)`, m <= n, since the iteration costs m * m * n
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # The Frobenius norm is at least the largest singular value. Below 1 the iteration converges.
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T  # (m, m)
        # (a I + b G + c G^2) W maps every singular value s to a s + b s^3 + c s^5
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def build_schedule(
    optimizer: torch.optim.Optimizer,
    max_steps: int,
    warmup_steps: int,
    cooldown_share: float,
    decay_type: str = "1-sqrt",
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each step: linear warm-up, then a cosine to 0, or constant with a
    cool-down at the end.

    The cool-down over the last `cooldown_share` of the steps is `1 - sqrt(progress)` (Haegele et
    al. 2024), or another `decay_type` of transformers. Until it begins the rate does not depend on
    `max_steps`, so a run can be made longer, or be cooled down earlier, at any time.
    """
    if not cooldown_share:
        return get_scheduler(
            "cosine", optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_steps
        )
    # from the step at which it begins, so that the same share gives the same beginning
    cooldown_steps = max_steps - round(max_steps * (1 - cooldown_share))
    return get_wsd_schedule(
        optimizer, warmup_steps, cooldown_steps, num_training_steps=max_steps, decay_type=decay_type
    )


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """AdamW on all that is trained; with a Muon rate, Muon (Jordan et al. 2024) on matrices that
    are no embeddings.

    The small network that embeds the time is an embedding: under Muon its units drift into the flat
    side of their SiLU until single ones answer to bands of times with outputs of any size
    (docs/streams.md).

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw"), so both rates are of the
    same kind. Vectors do not decay. `device` is where training will be, by default where the model
    is.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    embeddings = (nn.Embedding, TokComTimestepEmbedding)
    # by identity: `in` on tensors would compare their values
    kept = {id(p) for m in model.modules() if isinstance(m, embeddings) for p in m.parameters()}
    # Muon orthogonalises matrices; tables of embeddings are rows that have little to do with each
    # other, most of which have no gradient in an update
    inner = [p for p in trained if muon_learning_rate and p.ndim == 2 and id(p) not in kept]
    taken = {id(p) for p in inner}
    others = [p for p in trained if id(p) not in taken]
    groups = [{"params": [p for p in others if p.ndim >= 2]}]
    # biases and scales of norms: decay would pull scales from 1 towards 0
    groups.append({"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0})
    # 0.98 averages squared gradients over about 50 updates, AdamW's default 0.999 over 1000
    adamw = torch.optim.AdamW(
        groups, learning_rate, (0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    if not inner:
        return adamw
    fast = has_fast_bfloat16((device or inner[0].device).type)
    muon_class = torch.optim.Muon if fast else Float32Muon
    muon = muon_class(
        inner, muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return ChainedOptimizer([adamw, muon])
