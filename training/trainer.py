"""The loop that all stages share: updates, averages, metrics, checkpoints, stops, and going on
after any of them.

A stage is a subclass that yields its updates (`StageTrainer` in `stage.py`, `DistillTrainer` in
`distill.py`). Everything random in an update is seeded by its place in the run, so that a run that
was stopped ends with the weights of one that was not.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from tokcom.training.checkpoints import Checkpoints
from tokcom.training.config import LoopConfig, TrainConfig
from tokcom.training.corpora import Corpus
from tokcom.training.directory import WORK, write_atomically
from tokcom.training.ema import ShardedEMAModel, decay_from_half_life
from tokcom.training.launch import build_accelerator
from tokcom.training.progress import Progress
from tokcom.training.stopping import StopSignals, TrainingStopped, signal_name

EXTRA = "extra.pt"  # of a checkpoint: progress, schedule and average
AVERAGE = "average"  # of a checkpoint: the folder of averages that are sharded


class Trainer:
    """One stage of training.

    Args:
        stage (`str`): which of the settings of `config`, and which folder of its `output_dir/run`,
            are of this stage.
        handlers (`list`): of accelerate, e.g. how DDP wraps the models.
    """

    def __init__(self, config: TrainConfig, stage: str, corpus: Corpus, handlers: Iterable = ()):
        self.config = config
        self.stage = stage
        self.prefix = stage  # of the names of metrics
        self.corpus = corpus
        # the settings of a stage are the field of the configuration that has its name
        self.options: LoopConfig = getattr(config, stage)
        self.directory = Path(config.output_dir) / WORK / stage
        self.checkpoints = Checkpoints(self.directory, self.options.checkpoints_total_limit)
        self.accelerator: Accelerator = build_accelerator(
            config, self.options, str(self.directory), list(handlers)
        )
        self.progress = Progress(
            self.options.batch_size,
            self.accelerator.num_processes,
            self.options.gradient_accumulation_steps,
        )
        self.signals = StopSignals()
        self.lr_scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self.ema: ShardedEMAModel | None = None

    def updates(self) -> Iterator[dict[str, float]]:
        """Make update after update without end, and yield the metrics of each, `loss` among
        them."""
        raise NotImplementedError

    def averaged_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters whose moving average is kept."""
        raise NotImplementedError

    def export(self, target: Path) -> None:
        """Write the finished model as a Hub repository, and that the stage is finished."""
        raise NotImplementedError

    def evaluate(self, bar: tqdm) -> None:
        """Measure the model; called after every update, so that the stage decides when."""

    # ---- the loop ----

    def train(self) -> None:
        """Train to `max_steps`, from the newest checkpoint if there is one."""
        progress = self.progress
        max_steps = self.options.max_steps
        if self.config.report_to != "none":
            settings = {"stage": self.stage, **vars(self.options)}
            # trackers take no dictionaries
            settings["objective"] = json.dumps(settings.get("objective", {}))
            self.accelerator.init_trackers("tokcom", config=settings)
        self._resume()
        bar = tqdm(
            total=max_steps,
            initial=progress.step,
            desc=self.stage,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
        )
        self.started = time.perf_counter()
        self.started_tokens = progress.tokens
        # an error that ends the run must not follow on the line of the bar
        with self.signals, bar:
            # a stage that has made all its steps must not draw a batch, or it would train one
            # update more
            updates = self.updates() if progress.step < max_steps else ()
            begun = time.perf_counter()
            for metrics in updates:
                # a clock may jump
                progress.seconds += max(time.perf_counter() - begun, 0.0)
                self._after_update(metrics, bar)
                if progress.step >= max_steps:
                    break
                begun = time.perf_counter()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _after_update(self, metrics: dict[str, float], bar: tqdm) -> None:
        progress = self.progress
        options = self.options
        if self.lr_scheduler is not None:
            # Not handed to accelerate, whose wrapper would make one step for each process: one step
            # of the schedule is one update, however many processes share it.
            self.lr_scheduler.step()
            metrics = {**metrics, "learning_rate": self.lr_scheduler.get_last_lr()[0]}
        if self.ema is not None:
            # after the optimizer, so the average contains this update
            self.ema.step(self.averaged_parameters())
        progress.step += 1
        loss = metrics.pop("loss")
        # a mean since the last validation, which sets both to 0
        progress.train_loss += loss
        progress.train_count += 1
        self.log(metrics)
        elapsed = max(time.perf_counter() - self.started, 1e-9)  # a clock may jump
        # tokens of this call alone: a resumed run has not spent the time of those before
        speed = (progress.tokens - self.started_tokens) / elapsed
        bar.update(1)
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
        last = progress.step == options.max_steps
        # before the checkpoint, which then knows the best loss; a resumed run does not take a worse
        # model for a better one
        self.evaluate(bar)
        if progress.step % options.checkpoint_steps == 0 or last:
            self._save_checkpoint()
        if not last:
            self._stop_if_told()

    def log(self, metrics: dict[str, float]) -> None:
        """Log metrics of the current step to the trackers."""
        named = {f"{self.prefix}/{name}": value for name, value in metrics.items()}
        self.accelerator.log(named, step=self.progress.step)

    def _stop_if_told(self) -> None:
        """Write a checkpoint and raise `TrainingStopped` if any process has had a signal."""
        number = self.signals.number
        if self.accelerator.num_processes > 1:
            # A scheduler may signal one process only, or not all within the same update.
            # Checkpoints are written by all together, so they agree at a point that all of them
            # pass.
            told = torch.tensor([float(number)], device=self.accelerator.device)
            # no signal is 0, so the maximum is a signal if any process had one
            number = int(self.accelerator.gather(told).max())
        if not number:
            return
        self._save_checkpoint()
        raise TrainingStopped(
            f"stopped by {signal_name(number)} after {self.stage} step {self.progress.step}; run "
            "the same command again to go on from there."
        )

    def write_summary(self) -> None:
        """Say that the stage is finished, after how much; written last."""
        progress = self.progress
        facts = {
            "steps": progress.step,
            # of all processes
            "tokens": progress.tokens,
            # of updates alone, whatever stopped and went on between them
            "seconds": round(progress.seconds, 1),
            "precision": self.accelerator.mixed_precision,
            "device": self.accelerator.device.type,
            "processes": self.accelerator.num_processes,
        }
        if math.isfinite(progress.best):
            facts["best_validation_loss"] = progress.best
        write_atomically(self.directory / "summary.json", json.dumps(facts, indent=2) + "\n")

    # ---- averages ----

    def start_average(self) -> None:
        """Begin to average the parameters as they are now, if the settings ask for it."""
        if self.options.ema_half_life:
            # EMAModel starts with a short memory and lengthens it, so early weights do not linger
            self.ema = ShardedEMAModel(
                self.averaged_parameters(),
                decay=self._decay(),
                foreach=not self.accelerator.is_fsdp2,  # torch copies shards one by one only
            )

    def _decay(self) -> float:
        return decay_from_half_life(self.options.ema_half_life * self.options.max_steps)

    def _restore_average(self, saved: dict | None, folder: Path) -> None:
        if self.ema is None and saved is not None:
            self.accelerator.print(
                f"{self.stage}.ema_half_life is 0 now: the averaged weights of the checkpoint are "
                "dropped, and the run goes on with the weights themselves"
            )
        elif self.ema is not None and saved is None:
            self.start_average()  # those of before were averages of the weights at initialisation
            self.accelerator.print(
                "the checkpoint has no averaged weights: averaging begins at step "
                f"{self.progress.step}"
            )
        elif self.ema is not None:
            self.ema.load_state_dict(saved)
            self.ema.load_shards(folder / AVERAGE)
            self.ema.decay = self._decay()  # max_steps may have changed

    # ---- checkpoints ----

    def extra_state(self) -> dict[str, object]:
        """What a checkpoint holds besides what accelerate saves, and shards of averages."""
        parts = {"progress": self.progress, "scheduler": self.lr_scheduler, "average": self.ema}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {**state, "data": self.corpus.digest, "validated": self.validated()}

    def _save_checkpoint(self) -> None:
        accelerator = self.accelerator
        extra = self.extra_state()

        def save(folder: str) -> None:
            accelerator.save_state(folder)
            if accelerator.is_main_process:
                torch.save(extra, Path(folder) / EXTRA)
            if self.ema is not None:
                self.ema.save_shards(Path(folder) / AVERAGE)

        self.checkpoints.write(
            self.progress.step, save, accelerator.is_main_process, accelerator.wait_for_everyone
        )

    def newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, as the main process sees it."""
        # Checking a checkpoint reads every byte of it, which one process does. Those of other
        # machines may also see another state of a shared file system.
        found = [str(self.checkpoints.newest() or "") if self.accelerator.is_main_process else ""]
        newest = broadcast_object_list(found)[0]
        return Path(newest) if newest else None

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, whose files are read without running code of
        theirs."""
        newest = self.newest_checkpoint()
        if newest is None:
            return
        if not self.config.resume:
            raise ValueError(
                f"{newest} exists and `resume` is false; choose another output_dir or remove it."
            )
        # before `load_state`, which brings back the groups with the settings that were saved
        groups = [] if self.lr_scheduler is None else self.lr_scheduler.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        self.accelerator.load_state(str(newest))
        extra = torch.load(newest / EXTRA, "cpu", weights_only=True)
        # first, since `_restore_average` and `relocate` ask how far the run is
        self.progress.load_state_dict(extra["progress"])
        self._restore_average(extra.get("average"), newest)
        if self.lr_scheduler is not None:
            self._restore_schedule(extra["scheduler"], decays)
        self._check_best(extra.get("validated"))
        self.relocate()
        # one answer for all processes: they must go on at the same place of the data
        digest = broadcast_object_list([self.corpus.digest])[0]
        # older checkpoints hold no digest; their data count as unchanged
        if extra.get("data", digest) != digest:
            self.begin_epoch()
        self.accelerator.print(f"resumed {self.stage} from {newest}")

    def _check_best(self, before: dict | None) -> None:
        """Forget the best loss if validation measures something else than `before`: the two could
        not be compared."""
        now = broadcast_object_list([self.validated()])[0]
        if before is None or before == now:  # older checkpoints do not say
            return
        changed = [name for name, value in now.items() if before.get(name) != value]
        self.progress.best = float("inf")
        self.accelerator.print(
            f"{self.stage}: validation is another one now ({', '.join(changed)} changed); the best "
            "model is chosen anew"
        )

    def _restore_schedule(self, saved: dict, decays: list[float]) -> None:
        """Go on at the saved step of the schedule, with the rates and the weight decay of the
        settings of now."""
        schedule = self.lr_scheduler
        # LambdaLR saves the rates it was built with; those of the settings of now are put back
        # below
        rates = list(schedule.base_lrs)
        schedule.load_state_dict(saved)
        schedule.base_lrs = rates
        # `load_state_dict` leaves the rate of the saved settings there, which the next update would
        # use
        schedule._last_lr = [
            rate * factor(schedule.last_epoch)
            for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)
        ]
        settings = zip(
            schedule.optimizer.param_groups, rates, schedule._last_lr, decays, strict=True
        )
        for group, initial, current, decay in settings:
            group.update({"initial_lr": initial, "lr": current, "weight_decay": decay})

    def validated(self) -> dict:
        """What the validation loss is a measure of, on the main process."""
        return {}

    def begin_epoch(self) -> None:
        """Go on at the beginning of an epoch, since the data are others now."""

    def relocate(self) -> None:
        """Find the place in the data again if batches have another size now."""
