"""What sharding needs: an exponential moving average of parameters that survives it, and units that
fit the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor


class ShardedEMAModel(EMAModel):
    """EMAModel of parameters that may be sharded; every process averages and saves its shards."""

    @property
    def shards(self) -> dict[str, DTensor]:
        """The averages that are sharded, by their place."""
        averages = enumerate(self.shadow_params)
        return {str(i): average for i, average in averages if isinstance(average, DTensor)}

    def state_dict(self) -> dict:
        """The state, with None for what is sharded: that is for `save_shards`."""
        state = super().state_dict()
        shadow = [None if isinstance(p, DTensor) else p for p in state["shadow_params"]]
        return {**state, "shadow_params": shadow}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state; what is sharded stays as it is until `load_shards`."""
        loaded = state_dict["shadow_params"]
        # without those, of which diffusers would make copies
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "shadow_params"})
        pairs = zip(loaded, self.shadow_params, strict=True)
        self.shadow_params = [old if new is None else new.to(old.device) for new, old in pairs]

    def save_shards(self, folder: Path) -> None:
        """Write what is sharded, if anything is; every process calls it and writes its own."""
        if self.shards:
            dcp.save(self.shards, checkpoint_id=folder)

    def load_shards(self, folder: Path) -> None:
        """Read what `save_shards` has written, on any number of processes."""
        if self.shards:
            dcp.load(self.shards, checkpoint_id=folder)


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
