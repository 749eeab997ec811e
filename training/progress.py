"""What a run remembers besides weights: how far it is, what it has seen, and which updates it left
out."""

import math

import numpy as np
import torch

from tokcom.training.config import StageConfig
from tokcom.training.stopping import TrainingError

SPIKES_AFTER = 50  # updates before the average gradient norm means something


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite; training stopped before anything was overwritten."""


class Progress:
    """Counters, the best validation loss and running sums of one stage, and the size of the batches
    that they count.

    Args:
        batch_size, processes, accumulation (`int`): rows of a micro-batch, processes that each take
            one, and micro-batches of an update. Checkpoints of version 0.2 lack them and are taken
            to have had the sizes of now.
        rows (`int`, *optional*): the size of an epoch; None of a stream.
        workers (`int`): processes that load the data of each.
    """

    def __init__(
        self,
        batch_size: int,
        processes: int,
        accumulation: int,
        rows: int | None = None,
        workers: int = 0,
    ):
        self.step = 0
        self.micro_batch = 0  # of one process
        self.tokens = 0
        self.seconds = 0.0  # of updates alone, without validations and checkpoints
        self.skipped = 0  # updates left out
        self.skipped_in_row = 0
        self.norm = 0.0  # moving average of the gradient norm
        self.best = float("inf")
        self.train_loss = 0.0
        self.train_count = 0
        self.batch_size = batch_size
        self.processes = processes
        self.accumulation = accumulation
        self.rows = rows
        self.workers = workers

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def relocate(
        self, batch_size: int, processes: int, accumulation: int, rows: int | None
    ) -> str | None:
        """Count in batches of another size or number from now on; returns what changed, or None.

        `rows` is the size of an epoch, None of a stream. No row is seen twice in an epoch: a batch
        that would begin among rows that were already seen is passed over, and so are those that
        would begin an update in its middle. If an epoch has another size, its rows are other ones,
        and the next epoch begins.
        """
        before = (self.batch_size, self.processes, self.accumulation, self.rows)
        now = (batch_size, processes, accumulation, rows)
        if before == now:
            return None
        old_rows = self.batch_size * self.processes  # in one micro-batch of all processes
        new_rows = batch_size * processes
        if rows is None or self.rows is None:
            epoch, done = 0, self.micro_batch
        else:
            # those of an epoch that fill no batch are dropped
            epoch, done = divmod(self.micro_batch, max(1, self.rows // old_rows))
            if rows != self.rows:
                epoch, done = epoch + (done > 0), 0
        # rounded up: the batch that contains the last row seen is passed over, not shown again
        micro_batch = math.ceil(done * old_rows / new_rows)
        if rows is not None:
            micro_batch += epoch * (rows // new_rows)
        # an update must begin with its first micro-batch
        self.micro_batch = math.ceil(micro_batch / accumulation) * accumulation
        self.batch_size, self.processes, self.accumulation, self.rows = now
        names = ("batch size", "processes", "accumulation", "rows of an epoch")
        changes = zip(names, before, now, strict=True)
        return ", ".join(f"{name} {old} became {new}" for name, old, new in changes if old != new)


class UpdateGuard:
    """Decides which updates to leave out: those whose loss or gradient is not finite, or whose
    gradient is a spike."""

    def __init__(
        self, progress: Progress, options: StageConfig, loss_is_scaled: bool, can_skip: bool
    ):
        self.progress = progress
        self.options = options
        # a scaler expects infinite gradients, and skips them by itself
        self.loss_is_scaled = loss_is_scaled
        self.can_skip = can_skip

    @property
    def is_exhausted(self) -> bool:
        """Whether one more update may not be left out."""
        return not self.can_skip or self.progress.skipped_in_row > self.options.max_skipped_steps

    def problem(self, loss: float, norm: torch.Tensor | None) -> str | None:
        """Why the update must be left out, or None; counts either."""
        progress = self.progress
        norm = None if self.loss_is_scaled or norm is None else float(norm)
        reason = None
        if not np.isfinite(loss):
            reason = f"loss is {loss}"
        elif norm is not None and not np.isfinite(norm):
            reason = f"gradient norm is {norm}"
        elif norm is not None and self._is_spike(norm):
            reason = f"gradient norm {norm:.3g} is more than {self.options.spike_factor:g} times its average"
        elif norm is not None:
            # over about 50 updates. Only good ones count: a spike must not raise the bar for the
            # next.
            progress.norm = norm if not progress.norm else 0.98 * progress.norm + 0.02 * norm
        if reason is None:
            progress.skipped_in_row = 0
            return None
        progress.skipped += 1
        progress.skipped_in_row += 1
        return reason

    def _is_spike(self, norm: float) -> bool:
        limit = self.options.spike_factor * self.progress.norm
        # a `spike_factor` of 0 turns this off
        return bool(limit) and self.progress.step >= SPIKES_AFTER and norm > limit
