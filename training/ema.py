"""What sharding needs: an exponential moving average of parameters that survives it, and units that
fit the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedEMAModel(EMAModel):
    """EMAModel whose checkpoint holds full tensors.

    Accelerate writes the state of rank 0 only; with FSDP2 that would be rank 0's shards. Gather on
    saving, distribute again on loading.
    """

    def state_dict(self) -> dict:
        state = super().state_dict()
        state["shadow_params"] = [
            p.full_tensor().cpu() if isinstance(p, DTensor) else p for p in state["shadow_params"]
        ]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        current = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            distribute_tensor(loaded.to(old.device), old.device_mesh, old.placements)
            if isinstance(old, DTensor)
            else loaded.to(old.device)
            for loaded, old in zip(self.shadow_params, current)
        ]


def decay_from_half_life(steps: float) -> float:
    """Decay per step that halves a parameter's weight after `steps` optimizer steps."""
    return 0.5 ** (1.0 / max(1.0, steps))


@contextmanager
def embeddings_in_the_root(model: nn.Module) -> Iterator[None]:
    """While accelerate prepares a model for FSDP2, hide its embedding, which would become a unit of
    its own, gathered for its own forward alone; the codec's decoder multiplies with the same
    weight."""
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings
