"""What sharding needs: an exponential moving average of parameters that survives it, and units that
fit the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedEMAModel(EMAModel):
    """EMAModel whose checkpoint holds full tensors, in the memory of the main process alone.

    Accelerate writes the state of rank 0 only; with FSDP2 that would be rank 0's shards. Gather on
    saving, distribute again on loading.
    """

    def state_dict(self) -> dict:
        """The state; of what is sharded, other processes than the main one have None. Every process calls it."""
        state = super().state_dict()
        shadow = []
        for parameter in state["shadow_params"]:
            if isinstance(parameter, DTensor):
                # every process takes part in the exchange, and only one keeps the result
                whole = parameter.full_tensor()
                # on the host: a second full copy of the weights would not fit beside the shards
                parameter = whole.cpu() if dist.get_rank() == 0 else None
            shadow.append(parameter)
        return {**state, "shadow_params": shadow}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state, of which only the main process needs what is sharded."""
        loaded = state_dict["shadow_params"]
        # without those, of which diffusers would make copies
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "shadow_params"})
        self.shadow_params = [
            self._distributed(new, old) for new, old in zip(loaded, self.shadow_params, strict=True)
        ]

    @staticmethod
    def _distributed(new: torch.Tensor | None, old: torch.Tensor) -> torch.Tensor:
        if not isinstance(old, DTensor):
            return new.to(old.device)
        if dist.get_rank() == 0:
            whole = new.to(old.device)
        else:
            # `distribute_tensor` sends rank 0's values to all and never reads these
            whole = torch.empty(old.shape, dtype=old.dtype, device=old.device)
        return distribute_tensor(whole, old.device_mesh, old.placements)


def decay_from_half_life(steps: float) -> float:
    """Decay per step that halves a parameter's weight after `steps` optimizer steps."""
    # a half-life below one step would forget everything: at least 1, that is a decay of 0.5
    return 0.5 ** (1.0 / max(1.0, steps))


@contextmanager
def embeddings_in_the_root(model: nn.Module) -> Iterator[None]:
    """While accelerate prepares a model for FSDP2, hide its embedding, which would become a unit of
    its own, gathered for its own forward alone; the codec's decoder multiplies with the same
    weight."""
    # on the instance, so that deleting it brings the method of the class back
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings
