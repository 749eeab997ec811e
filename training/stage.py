"""The stages `codec`, `flow` and `head`: one network, its own loss, validation with fixed noise.

Metrics keep the names of the published training script, whose stages are `vae` and `diffusion`.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, send_to_device
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.objective_tokcom import TokComOutput
from tokcom.training.attention import fastest_attention, saved_attention
from tokcom.training.checks import check_rows
from tokcom.training.config import STAGES, StageConfig, TrainConfig
from tokcom.training.corpora import Corpus
from tokcom.training.ema import embeddings_in_the_root
from tokcom.training.export import check_folder, copy_repository, export_repository
from tokcom.training.gathering import write_gathered
from tokcom.training.modalities import MODALITIES
from tokcom.training.optimizer import build_optimizer, build_schedule
from tokcom.training.perceptual import FeatureLoss
from tokcom.training.pipelines import build_pipeline
from tokcom.training.progress import NonFiniteLossError, UpdateGuard
from tokcom.training.sharding import Part, fill, load_sharded, shards_of
from tokcom.training.trainer import EXTRA, Trainer

METRIC_PREFIX = {"codec": "vae", "flow": "diffusion", "head": "head"}
PARTS = ("loss", "ce_loss", "mse_loss")  # of a model's output


def weighed_means(
    outputs: list[TokComOutput],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, torch.Tensor]:
    """Means of the parts of outputs over all that they are means of, and the mean `weight`;
    `reduce` joins processes.

    A part that some outputs lack is a mean over the others; one that all lack is left out.
    """
    rows = []
    for output in outputs:
        weight = output.loss.new_ones(()) if output.weight is None else output.weight.float()
        found = [getattr(output, name) for name in PARTS]
        # every row has every part, so that processes exchange tensors of one size
        weights = [weight * (part is not None) for part in found]
        parts = [0 * weight if part is None else part.detach().float() * weight for part in found]
        rows.append(torch.stack([weight, *weights, *parts]))
    sums = reduce(torch.stack(rows).mean(0))
    weights, parts = sums[1:].view(2, len(PARTS))  # (parts,) each
    means = dict(zip(PARTS, parts / weights.clamp_min(1e-12)))
    names = [name for name in PARTS if any(getattr(x, name) is not None for x in outputs)]
    return {"weight": sums[0], **{name: means[name] for name in names}}


class StageTrainer(Trainer):
    """Trains one part of `model` by the loss of `stage`; what validates best is what the stage ends
    with."""

    options: StageConfig

    def __init__(self, config: TrainConfig, stage: str, model: TokComModel, corpus: Corpus):
        super().__init__(config, stage, corpus)
        self._check_distribution()
        self.prefix = METRIC_PREFIX[stage]
        self.pending = []  # outputs of the micro-batches of the update at hand
        # first: what the data give, and which parameters are trained, depend on the stage
        model.set_stage(stage, **self.options.objective)
        if stage == "codec" and config.perceptual_model:
            self._add_feature_loss(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.dataset, held_out = corpus.datasets(model, config, self.options, self.accelerator)
        self.progress.rows = None if corpus.streamed else len(self.dataset)
        self.progress.workers = config.num_workers
        self.validation_loader = DataLoader(held_out, self.options.batch_size)
        modality = MODALITIES[model.config.codec_config.modality]
        self.samples = modality.samples(self.accelerator, stage, self.directory, config.num_samples)
        self.attention = self._choose_attention(model)
        model.set_attn_implementation(self.attention)
        if config.torch_compile:
            for part in model.compilable_parts():
                part.compile()
        self._prepare(model)

    def _add_feature_loss(self, model: TokComModel) -> None:
        if not hasattr(model.codec, "feature_loss"):
            raise ValueError(
                "`perceptual_model` compares pictures; remove it for texts, clips and several "
                "streams."
            )
        name = self.config.perceptual_model
        model.codec.feature_loss = FeatureLoss(
            name, self.config.perceptual_weight, self.accelerator.device
        )

    def _choose_attention(self, model: TokComModel) -> str:
        if self.config.attention != "auto":
            return self.config.attention
        newest = self.checkpoints.newest()
        if newest is not None:
            # functions differ in rounding, and a run that goes on must not notice that it was
            # stopped
            return saved_attention(newest / EXTRA)
        # on a GPU sdpa chooses its kernel by itself
        is_cpu = self.accelerator.device.type == "cpu"
        if not is_cpu or self.stage == "codec" or self.accelerator.is_fsdp2:
            return "sdpa"
        return fastest_attention(model, self.dataset, self.options.batch_size, self.accelerator)

    # ---- set-up ----

    def _prepare(self, model: TokComModel) -> None:
        """Build loader, optimizer, schedule and average, and hand the model to accelerate."""
        options = self.options
        loader = self._loader()
        rates = options.learning_rate, options.muon_learning_rate, options.weight_decay
        optimizer = build_optimizer(model, *rates, self.accelerator.device)
        self.lr_scheduler = build_schedule(
            optimizer, options.max_steps, options.warmup_steps, options.cooldown_share
        )
        # it sees no loader to ask
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size
        # taken before `prepare` replaces the parameters by empty shards
        shards = shards_of(model)
        with embeddings_in_the_root(model):
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if shards:
            fill(self.module, shards)
        # a stream is read in parts by its own means
        self.loader = loader if self.corpus.streamed else self.accelerator.prepare(loader)
        steps_by_itself = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.guard = UpdateGuard(
            self.progress,
            options,
            loss_is_scaled=self.accelerator.scaler is not None,
            can_skip=not steps_by_itself,
        )
        # after `prepare`: the average follows the parameters that are trained, sharded or not
        self.start_average()

    def _check_distribution(self) -> None:
        """Raise `ValueError` for settings that need more of the model than a process has."""
        distribution = self.accelerator.distributed_type
        options = self.options
        has_shards = distribution in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if options.muon_learning_rate and has_shards:
            raise ValueError(
                f"`{self.stage}.muon_learning_rate` ({options.muon_learning_rate}) needs whole "
                f"matrices on every process; set it to 0 under {distribution.value}, or use "
                "multi_gpu_ddp.yaml."
            )
        if options.ema_half_life and distribution == DistributedType.DEEPSPEED:
            raise ValueError(
                f"`{self.stage}.ema_half_life` ({options.ema_half_life}) cannot average the shards "
                f"of DeepSpeed; set {self.stage}.ema_half_life=0 or use "
                "accelerate_configs/fsdp2.yaml."
            )
        if not self.accelerator.is_fsdp2:
            return
        if self.config.cache_latents:
            raise ValueError(
                "`cache_latents` (true) needs the whole codec on every process; set it to false "
                "under FSDP, or use multi_gpu_ddp.yaml."
            )
        if self.config.push_to_hub:
            raise ValueError(
                "`push_to_hub` (true) needs the whole model in one process; set it to false under "
                "FSDP and run tokcom publish afterwards."
            )
        if self.config.num_samples:
            self.accelerator.print(
                f"{self.stage}: no samples under FSDP, since no process has a whole model; "
                f"the best weights are in {self.directory / 'best'}"
            )

    def _loader(self) -> DataLoader:
        batch_size = self.options.batch_size
        workers = self.config.num_workers
        check_rows(
            self.corpus, self.dataset, self.stage, self.options, self.accelerator.num_processes
        )
        if self.corpus.streamed:
            return DataLoader(self.dataset, batch_size, drop_last=True, num_workers=workers)
        sampler = self.corpus.sampler(self.dataset, batch_size, self.config.seed)
        return DataLoader(
            self.dataset,
            batch_size,
            sampler is None,
            sampler=sampler,
            # every batch has one size, so that compiled graphs and schedules stay as they are
            drop_last=True,
            num_workers=workers,
        )

    @property
    def module(self) -> TokComModel:
        """The model itself, without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def averaged_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.module.parameters())

    # ---- updates ----

    def updates(self) -> Iterator[dict[str, float]]:
        while True:
            for batch in self._epoch():
                metrics = self._micro_batch(batch)
                if metrics is not None:
                    yield metrics

    def _epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from where `progress.micro_batch` stands to the end of that epoch."""
        if self.corpus.streamed:
            yield from self._stream()
            return
        # the place in the data is one number, so that a checkpoint holds no state of a loader
        epoch, done = divmod(self.progress.micro_batch, len(self.loader))
        self.loader.set_epoch(epoch)
        self.dataset.set_epoch(epoch)  # the loaders of several processes do not pass it on
        yield from self.accelerator.skip_first_batches(self.loader, done) if done else self.loader

    def _stream(self) -> Iterator[dict[str, torch.Tensor]]:
        """Epoch after epoch of this process's part of a stream, passing over what was already seen;
        processes whose parts are shorter begin their next epoch earlier."""
        # a stream cannot jump: a resumed run reads again what it has seen, and passes over it
        seen = self.progress.micro_batch
        epoch = 0
        while True:
            self.dataset.set_epoch(epoch)
            empty = True
            for batch in self.loader:
                empty = False
                if seen:
                    seen -= 1
                else:
                    yield send_to_device(batch, self.accelerator.device)
            if empty:
                raise ValueError(
                    f"the data stream gave no full batch; lower {self.stage}.batch_size or give "
                    "more text."
                )
            epoch += 1

    def _seed_micro_batch(self) -> None:
        """Noise depends on (seed, stage, which micro-batch of the whole run) alone, which makes a
        resumed run exact, and N processes equal to one that accumulates N micro-batches.

        Python's generator, which decides what all micro-batches of an update must do alike, depends
        on the update.
        """
        micro_batch = self.progress.micro_batch
        words = [self.config.seed, STAGES.index(self.stage)]
        # alike for all micro-batches of an update
        update = micro_batch // self.options.gradient_accumulation_steps
        # alike whether N processes take one micro-batch each or one process takes N
        place = micro_batch * self.accelerator.num_processes + self.accelerator.process_index
        # SeedSequence hashes its words: neighbouring seeds, stages and places give unrelated noise
        random.seed(int(np.random.SeedSequence([*words, update]).generate_state(1)[0]))
        torch.manual_seed(int(np.random.SeedSequence([*words, place, 1]).generate_state(1)[0]))

    def _micro_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, float] | None:
        """Forward and backward pass of a micro-batch; returns the metrics of the update if it
        completes one.

        Updates whose loss or gradient is bad are left out.
        """
        accelerator = self.accelerator
        progress = self.progress
        loss = 0.0
        problem = None
        self.model.train()
        self._seed_micro_batch()
        with accelerator.accumulate(self.model):
            output = self.model(**batch)
            # gradients of micro-batches add up, so each loss is scaled before, and all together
            # after
            accelerator.backward(self._share_of_update(output))
            self.pending.append(output)
            if accelerator.sync_gradients:
                means = self._mean_parts()
                # before clipping, whose limit is for the gradient of the mean over tokens
                self._weigh_gradients(means["weight"])
                norm = accelerator.clip_grad_norm_(
                    self.model.parameters(), self.options.max_grad_norm
                )
                # the only point of an update at which the host waits for the device
                means, norm = self._read(means, norm)
                loss = means["loss"]
                problem = self.guard.problem(loss, norm)
            # within `accumulate` this does nothing until the last micro-batch of the update
            if problem is None:
                self.optimizer.step()
            elif self.guard.is_exhausted:
                self._give_up(problem)
            elif accelerator.scaler is not None:
                # it has unscaled the gradients of this update, and expects to hear of it
                accelerator.scaler.update()
            self.optimizer.zero_grad()
        # also when the update is left out: the same rows would spoil it again
        progress.micro_batch += 1
        progress.tokens += (
            self.corpus.count(batch, self.module.config.codec_config) * accelerator.num_processes
        )
        if problem is not None:
            self.pending = []
            accelerator.print(
                f"{self.stage} step {progress.step + 1}: {problem}; left out ({progress.skipped} "
                "so far)"
            )
            return None
        return self._update_metrics(means) if accelerator.sync_gradients else None

    def _give_up(self, reason: str) -> NoReturn:
        last = (self.checkpoints.all() or ["none yet"])[-1]
        raise NonFiniteLossError(
            f"{reason} at {self.stage} step {self.progress.step + 1}; stopped without saving. The "
            f"last good checkpoint is {last}. Lower {self.stage}.learning_rate "
            f"({self.options.learning_rate}) or use mixed_precision=bf16, then run the same "
            "command again."
        )

    # ---- means over micro-batches and processes, which weigh tokens ----

    @property
    def _is_weighed(self) -> bool:
        """Whether an update has several micro-batches, whose tokens must count alike however many
        each has.

        DeepSpeed reduces gradients by itself and gives every micro-batch the same weight.
        """
        several = self.accelerator.num_processes * self.options.gradient_accumulation_steps > 1
        return several and self.accelerator.distributed_type != DistributedType.DEEPSPEED

    @property
    def _unit(self) -> float:
        """A weight that all processes know without talking; a power of two, by which nothing is
        rounded."""
        rows = self.options.batch_size * self.options.sequence_length
        return 2.0 ** round(math.log2(rows))

    def _share_of_update(self, output: TokComOutput) -> torch.Tensor:
        """The loss of a micro-batch in proportion to what it is a mean of."""
        if not self._is_weighed or output.weight is None:
            return output.loss
        return output.loss * (output.weight / self._unit)

    def _weigh_gradients(self, mean_weight: torch.Tensor) -> None:
        """Divide the gradients of an update by the mean weight of its micro-batches on all
        processes."""
        if not self._is_weighed or self.pending[0].weight is None:
            return
        # undoes `_unit`, which only kept the scaled losses near their usual size
        scale = self._unit / mean_weight.clamp_min(1)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # a factor is the same for every shard, so nothing has to be exchanged
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))

    def _mean_parts(self) -> dict[str, torch.Tensor]:
        """Weighed means of the parts of the output over micro-batches and processes, in one
        exchange; nothing is read."""
        return weighed_means(self.pending, lambda sums: self.accelerator.reduce(sums, "mean"))

    @staticmethod
    def _read(
        means: dict[str, torch.Tensor], norm: torch.Tensor | None
    ) -> tuple[dict[str, float], float | None]:
        """Numbers of an update on the host, in one read, for which it waits for the device."""
        values = list(means.values())
        if norm is not None:
            norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            # one tensor of all numbers: each read on its own would be a wait of its own
            values.append(norm.to(values[0]))
        numbers = torch.stack(values).tolist()
        return dict(zip(means, numbers)), None if norm is None else numbers[-1]

    def _update_metrics(self, means: dict[str, float]) -> dict[str, float]:
        metrics = {"loss": means["loss"], "skipped_steps": self.progress.skipped}
        if self.stage == "codec":
            metrics["batch_loss"] = means["loss"]
        else:
            metrics |= {f"batch_{name}": means[name] for name in PARTS[1:] if name in means}
        # a bad loss must not enter the means of the next update
        self.pending = []
        return metrics

    # ---- validation ----

    @torch.no_grad()
    def evaluate(self, bar: tqdm) -> None:
        """Every `eval_steps`: validation loss, best weights and samples, of the averaged weights if
        there are any."""
        progress = self.progress
        if progress.step % self.options.eval_steps and progress.step != self.options.max_steps:
            return
        module = self.module
        if self.ema is not None:
            # the weights that are trained, which `restore` puts back below
            self.ema.store(module.parameters())
            self.ema.copy_to(module.parameters())
        # every process validates the same batches: under FSDP a forward pass needs all of them
        values = self._validate(module)
        if self.accelerator.is_fsdp2:  # all have to find the same ones best
            values = broadcast_object_list([values])[0]
        if not np.isfinite(values["loss"]):
            self._give_up(f"validation loss is {values['loss']}")
        improved = values["loss"] < progress.best
        if improved:
            progress.best = values["loss"]
        metrics = {"train_loss": progress.train_loss / max(1, progress.train_count)}
        metrics |= {f"val_{name}": value for name, value in values.items()}
        metrics["best_val_loss"] = progress.best
        progress.train_loss = 0.0
        progress.train_count = 0
        self.log(metrics)
        summary = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        bar.write(f"{self.stage} step {progress.step}: {summary}")
        # while the averages are in place: the best model that is exported is the averaged one
        copy = None
        if not self.accelerator.is_fsdp2:
            copy = self._full_copy()
        elif improved:
            write_gathered(module, self._export_best)
        if self.ema is not None:
            self.ema.restore(module.parameters())
        if copy is not None:
            self._show(copy, improved)
        self.accelerator.wait_for_everyone()

    def _validate(self, module: TokComModel) -> dict[str, float]:
        """Mean of each part of the output over `eval_batches` batches, whose noise is the same
        every time."""
        module.eval()
        outputs = []
        for index, batch in enumerate(self.validation_loader):
            if index == self.options.eval_batches:
                break
            # the same times and noise at every validation, so that losses can be compared
            torch.manual_seed(index)
            with self.accelerator.autocast():
                outputs.append(module(**send_to_device(batch, self.accelerator.device)))
        means = weighed_means(outputs)
        means.pop("weight")
        return self._read(means, None)[0]

    def _full_copy(self) -> TokComModel | None:
        """The current weights as an ordinary model on the main process; DeepSpeed gathers shards,
        so every rank calls it."""
        state = self.accelerator.get_state_dict(self.model)
        if not self.accelerator.is_main_process:
            return None
        model = TokComModel(TokComConfig.from_dict(self.module.config.to_dict()))
        model.load_state_dict({name: value.float() for name, value in state.items()})
        return model.eval()

    def _export_best(self, model: TokComModel) -> None:
        self._export(model, self.directory / "best")

    def _export(self, model: TokComModel, target: Path) -> None:
        export_repository(model, self.corpus.tokenizer, target, autoencoder=self.corpus.autoencoder)

    def _show(self, model: TokComModel, improved: bool) -> None:
        """Keep the best weights, and log samples."""
        if improved:
            self._export_best(model)
        if not self.config.num_samples:
            return
        pipe = build_pipeline(
            model.to(self.accelerator.device), self.corpus.tokenizer, vae=self.corpus.autoencoder
        )
        pipe.set_progress_bar_config(disable=True)
        self.samples.log(pipe, self.validation_loader, self.progress.step)

    # ---- checkpoints and the end ----

    def extra_state(self) -> dict[str, object]:
        return {**super().extra_state(), "attention": self.attention}

    def relocate(self) -> None:
        progress = self.progress
        batch_size = self.options.batch_size
        processes = self.accelerator.num_processes
        if self.corpus.streamed and progress.processes != processes:
            raise ValueError(
                f"a stream is read in {progress.processes} parts, one for each process that the "
                f"run began with; launch {progress.processes} processes instead of {processes}."
            )
        if self.corpus.streamed and progress.workers != self.config.num_workers:
            raise ValueError(
                f"a stream is read in parts, one for each of the {progress.workers} workers that "
                f"the run began with; set num_workers={progress.workers} instead of "
                f"{self.config.num_workers}."
            )
        sampler = self.corpus.sampler(self.dataset, batch_size, self.config.seed)
        if sampler is not None and batch_size != progress.batch_size:
            raise ValueError(
                "the batches of several streams are composed by their size; keep "
                f"{self.stage}.batch_size={progress.batch_size} instead of {batch_size}."
            )
        rows = None if self.corpus.streamed else len(self.dataset)
        changed = progress.relocate(
            batch_size, processes, self.options.gradient_accumulation_steps, rows
        )
        if changed:
            self.accelerator.step = 0  # micro-batches of the update at hand, which begins here
            self.accelerator.print(
                f"{self.stage}: {changed}; the run goes on with rows that it has not seen in this "
                "epoch"
            )

    def validated(self) -> dict[str, Any]:
        options = self.options
        return {
            "validation data": self.corpus.validation_digest,
            "batch_size": options.batch_size,  # how many windows are measured
            "eval_batches": options.eval_batches,
            "sequence_length": options.sequence_length,
            "objective": dict(options.objective),
        }

    def begin_epoch(self) -> None:
        if self.corpus.streamed:  # which is read from its beginning
            self.progress.micro_batch = 0
            return
        length = len(self.loader)
        # on to the next epoch: row numbers of the old data say nothing about the new
        self.progress.micro_batch = math.ceil(self.progress.micro_batch / length) * length

    def train(self) -> None:
        super().train()
        if not (self.directory / "best" / "config.json").is_file():  # removed since it was damaged
            self.progress.best = float("inf")
            self.evaluate(tqdm(disable=True))

    def export(self, target: Path) -> None:
        best = self.directory / "best"
        if self.accelerator.is_fsdp2 and self.stage == "codec":
            config = self._measure_sharded(best)
            write_gathered(self.module, lambda model: self._export(model, target), config)
        elif self.accelerator.is_main_process:
            check_folder(best)
            if self.accelerator.is_fsdp2:
                copy_repository(best, target)
            else:
                # what validated best, and not what the last update left
                model = TokComModel.from_pretrained(best)
                # the latents are standardised for the weights that are exported, so they are
                # measured last
                if self.stage == "codec":
                    self.corpus.measure(model.to(self.accelerator.device))
                self._export(model.cpu(), target)
        if self.accelerator.is_main_process:
            self.write_summary()  # after the export: it says that the stage is finished
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _measure_sharded(self, best: Path) -> TokComConfig:
        """Give the sharded model the best weights and the latent statistics of its codec; returns
        the configuration as it was loaded."""
        part = Part(self.accelerator.process_index, self.accelerator.num_processes)
        loaded = load_sharded(best, part)
        fill(self.module, shards_of(loaded))
        # the codec is called without the model's own forward, which would gather these
        self.module.unshard()
        self.corpus.measure(self.module)
        self.module.reshard()
        return loaded.config
