"""The optimizer of every training script here: AdamW, with Muon on the matrices inside the network if it has a rate."""

import torch
from torch import nn


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, for learning-rate schedules and checkpoints."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self._link()

    def _link(self) -> None:
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
        self._link()


def build_optimizer(
    model: nn.Module, learning_rate: float, muon_learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW on all that is trained; with a Muon rate, Muon (Jordan et al. 2024) on matrices that are no embeddings.

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw"), so both rates are of the same kind. Vectors do
    not decay.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    inner = [p for p in trained if muon_learning_rate and p.ndim == 2 and id(p) not in tables]
    taken = {id(p) for p in inner}
    others = [p for p in trained if id(p) not in taken]
    groups = [{"params": [p for p in others if p.ndim >= 2]}]
    groups.append({"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups, learning_rate, (0.9, 0.98), weight_decay=weight_decay, fused=True)
    if not inner:
        return adamw
    muon = torch.optim.Muon(inner, muon_learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return ChainedOptimizer([adamw, muon])
