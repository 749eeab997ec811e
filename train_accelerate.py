"""Train TokCom: stage "codec" (tokens <-> latents), then stage "flow" (noise -> latents, codec frozen), one loop.

    accelerate launch train_accelerate.py --preset debug
    accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml train_accelerate.py --preset base \
        data.train=my_texts/ data.validation=held_out.jsonl output_dir=my-model flow.max_steps=50000

A preset is a YAML file in presets/; every key can be overridden as `dotted.key=value`. A run that was stopped, even by
SIGKILL, continues from its newest checkpoint when the same command is given again and ends with the same weights.
`output_dir` ends as a Hub repository: AutoModel, DiffusionPipeline and tokcom.load_pipeline load it.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
    send_to_device,
    set_seed,
)
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tokcom.codec_video_tokcom import decode_clips
from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.objective_tokcom import STAGES
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.pipeline_media_tokcom import build_pipeline, load_pipeline
from tokcom.processing_tokcom import vocabulary_size
from tokcom.training.card import WORK, training_card
from tokcom.training.checkpoints import CheckpointError, Checkpoints
from tokcom.training.config import StageConfig, TrainConfig, load_train_config, refuse_other_settings
from tokcom.training.corpora import Corpus, read_data
from tokcom.training.ema import ShardedEMAModel, decay_from_half_life, embeddings_in_the_root
from tokcom.training.export import export_repository
from tokcom.training.images import picture_grid
from tokcom.training.optimizer import build_optimizer, build_schedule
from tokcom.training.perceptual import FeatureLoss
from tokcom.training.precision import resolve_precision
from tokcom.training.presets import merge_overrides, preset_config
from tokcom.training.tracking import check_tracker, log_picture, log_table

ATTENTIONS = ("sdpa", "sdpa_float32", "eager")  # what `attention=auto` chooses from
EXTRA = "extra.pt"  # of a checkpoint: progress, schedule and average
SPIKES_AFTER = 50  # updates before the average gradient norm means something
SAME_RUN = ("preset", "model", "tokenizer", "tokenizer_vocab_size", "init_from", "codec_from", "seed", "data")
METRIC_PREFIX = {"codec": "vae", "flow": "diffusion", "head": "head"}  # the names of the published training script


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; training stopped before anything was overwritten."""


class TrainingStopped(Exception):
    """A signal asked the run to end; a checkpoint was written, and the same command continues from it."""


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None) -> TokComModel:
    """A new model of the preset, or one that starts from `init_from` (all weights) or `codec_from` (the codec's).

    `config.model` overrides the preset's configuration, or that of `init_from`. Raises `ValueError` when weights do not
    fit the configuration or the tokenizer has another vocabulary.
    """
    donor, size = config.init_from or config.codec_from, None if tokenizer is None else vocabulary_size(tokenizer)
    if donor is None:
        model = TokComModel(preset_config(config.preset, size, **config.model))
    else:
        source = TokComModel.from_pretrained(donor, dtype=torch.float32)
        model = TokComModel(derived_config(config, source.config, size))
        weights = source.state_dict() if config.init_from else source.codec.state_dict()
        if model.latent_head is not None and source.latent_head is None and config.init_from:
            weights |= {f"latent_head.{name}": value for name, value in model.latent_head.state_dict().items()}
        try:
            (model if config.init_from else model.codec).load_state_dict(weights)
        except RuntimeError as error:
            problem = str(error).splitlines()[1].strip()
            raise ValueError(f"the weights of {donor} do not fit the overrides in `model`: {problem}") from error
    if model.config.text_vocab_size != (0 if size is None else size + 1):
        raise ValueError(
            f"the model has {model.config.text_vocab_size} tokens (with its mask token) but the "
            f"tokenizer has {size}; use the tokenizer saved beside the model."
        )
    return model


def derived_config(config: TrainConfig, source: TokComConfig, vocab_size: int | None = None) -> TokComConfig:
    """The configuration of a model that starts from one with configuration `source`, or from its codec only.

    `vocab_size` is the number of ids of text, which a codec of pictures does not know.
    """
    codec = source.codec_config.to_dict()
    if config.init_from:
        fields = source.to_dict()
    else:
        fields = preset_config(config.preset, vocab_size).to_dict()
        fields["transformer_config"]["latent_channels"] = source.codec_config.latent_channels
    fields["codec_config"] = codec
    merge_overrides(fields, config.model)
    return TokComConfig(**fields)


class Progress:
    """What a checkpoint remembers besides weights: counters, the best validation loss, and running sums."""

    def __init__(self):
        self.step, self.micro_batch, self.tokens = 0, 0, 0
        self.skipped, self.skipped_in_row = 0, 0  # updates left out
        self.norm = 0.0  # moving average of the gradient norm
        self.best, self.train_loss, self.train_count = float("inf"), 0.0, 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class StageTrainer:
    """One stage of training: the loop, validation, checkpoints, samples and the final weights."""

    def __init__(self, config: TrainConfig, stage: str, model: TokComModel, corpus: Corpus):
        self.config, self.stage, self.corpus, self.tokenizer = config, stage, corpus, corpus.tokenizer
        self.options: StageConfig = getattr(config, stage)
        self.directory = Path(config.output_dir) / WORK / stage
        self.prefix, self.stop_signal = METRIC_PREFIX[stage], 0
        self.checkpoints = Checkpoints(self.directory, self.options.checkpoints_total_limit)
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(config.mixed_precision, PartialState().device.type),
            # windows left over at the end of an epoch count towards the next step, so a step has one size
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=self.options.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(self.directory), logging_dir=str(self.directory / "logs")),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        )
        self._check_launch()
        model.set_stage(stage, **self.options.objective)
        if stage == "codec" and config.perceptual_model:
            if model.config.codec_config.modality != "image":
                raise ValueError(
                    "`perceptual_model` compares pictures; remove it for texts, clips and several streams."
                )
            features = FeatureLoss(config.perceptual_model, config.perceptual_weight, self.accelerator.device)
            model.codec.feature_loss = features
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.dataset, held_out = corpus.datasets(model, config, self.options, self.accelerator)
        self.validation_loader = DataLoader(held_out, self.options.batch_size)
        self.attention = self._choose_attention(model)
        model.set_attn_implementation(self.attention)
        if config.torch_compile:
            for part in model.compilable_parts():
                part.compile()
        self._prepare(model)

    def _choose_attention(self, model: TokComModel) -> str:
        """The attention function of this run: what the configuration says, what the run began with, or the fastest here.

        Different functions differ in rounding, so a run that goes on keeps its own.
        """
        if self.config.attention != "auto":
            return self.config.attention
        newest = self.checkpoints.newest()
        if newest is not None:
            return torch.load(Path(newest) / EXTRA, map_location="cpu", weights_only=True).get("attention", "sdpa")
        if self.accelerator.device.type != "cpu" or self.stage == "codec":
            return "sdpa"
        batch = next(iter(DataLoader(self.dataset, self.options.batch_size)))
        seconds = {name: self._time_step(model, batch, name) for name in ATTENTIONS}
        fastest = broadcast_object_list([min(seconds, key=seconds.get)])[0]
        times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        self.accelerator.print(f"{self.stage}: attention {fastest!r} (a step takes {times})")
        return fastest

    def _time_step(self, model: TokComModel, batch: dict[str, torch.Tensor], attention: str) -> float:
        """Seconds of one forward and backward pass with an attention function, the faster of two."""
        model.set_attn_implementation(attention)
        model.train()
        seconds = []
        for _ in range(2):
            torch.manual_seed(0)
            started = time.perf_counter()
            with self.accelerator.autocast():
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _check_launch(self) -> None:
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world != self.accelerator.num_processes:
            raise RuntimeError(
                f"{world} processes were launched but accelerate formed a group of {self.accelerator.num_processes}, so "
                "they would overwrite each other; on CPU set ACCELERATE_USE_CPU=true (accelerate_configs/cpu_2proc.yaml)."
            )

    def _loader(self) -> DataLoader:
        """The loader of the training data; raises `ValueError` when a batch does not fit them."""
        batch_size, workers = self.options.batch_size, self.config.num_workers
        if self.corpus.streamed:
            return DataLoader(self.dataset, batch_size, drop_last=True, num_workers=workers)
        if len(self.dataset) < batch_size * self.accelerator.num_processes:
            raise ValueError(
                f"the training data give {len(self.dataset)} {self.corpus.rows.format(self.options.sequence_length)}, fewer than "
                f"one batch of {batch_size} on {self.accelerator.num_processes} process(es); lower {self.stage}.batch_size or "
                f"{self.stage}.sequence_length, or give more data."
            )
        sampler = self.corpus.sampler(self.dataset, batch_size, self.config.seed)
        return DataLoader(
            self.dataset, batch_size, sampler is None, sampler=sampler, drop_last=True, num_workers=workers
        )

    def _prepare(self, model: TokComModel) -> None:
        options = self.options
        loader = self._loader()
        sharded = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if options.muon_learning_rate and sharded:
            raise ValueError(
                f"`{self.stage}.muon_learning_rate` ({options.muon_learning_rate}) needs whole matrices on every "
                f"process; set it to 0 under {self.accelerator.distributed_type.value}, or use multi_gpu_ddp.yaml."
            )
        rates = options.learning_rate, options.muon_learning_rate, options.weight_decay
        optimizer = build_optimizer(model, *rates, self.accelerator.device)
        schedule = options.max_steps, options.warmup_steps, options.cooldown_share
        self.lr_scheduler = build_schedule(optimizer, *schedule)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # it sees no loader to ask
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size
        with embeddings_in_the_root(model):
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.loader = loader if self.corpus.streamed else self.accelerator.prepare(loader)
        self.progress, self.ema = Progress(), None
        if options.ema_half_life:
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise ValueError(
                    f"`{self.stage}.ema_half_life` ({options.ema_half_life}) cannot average the shards of DeepSpeed; "
                    f"set {self.stage}.ema_half_life=0 or use accelerate_configs/fsdp2.yaml."
                )
            decay = decay_from_half_life(options.ema_half_life * options.max_steps)
            # EMAModel starts with a short memory and lengthens it, so early weights do not linger
            self.ema = ShardedEMAModel(self.module.parameters(), decay=decay, foreach=True)

    @property
    def module(self) -> TokComModel:
        return self.accelerator.unwrap_model(self.model)

    # ---- the loop ----

    def train(self) -> Path:
        """Train to `max_steps` and return the directory of the best weights."""
        accelerator, options, progress = self.accelerator, self.options, self.progress
        if self.config.report_to != "none":
            accelerator.init_trackers("tokcom", config={"stage": self.stage, **vars(options)})
        self._resume()
        bar = tqdm(
            total=options.max_steps,
            initial=progress.step,
            desc=self.stage,
            unit="step",
            disable=not accelerator.is_local_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
        )
        self.started, self.started_tokens, self.pending = time.perf_counter(), progress.tokens, []
        with self._signals():
            while progress.step < options.max_steps:
                for batch in self._epoch():
                    self._step(batch, bar)
                    if progress.step >= options.max_steps:
                        break
        bar.close()
        for tracker in accelerator.trackers:
            tracker.finish()
        if accelerator.is_main_process:
            facts = {"steps": progress.step, "tokens": progress.tokens, "best_validation_loss": progress.best}
            (self.directory / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
        return self.directory / "best"

    @contextlib.contextmanager
    def _signals(self):
        """Note SIGTERM and SIGUSR1, which schedulers send before they take a machine away; `_after_update` obeys them."""

        def note(number: int, frame) -> None:
            self.stop_signal = number

        numbers = (signal.SIGTERM, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_told(self) -> None:
        """Write a checkpoint and raise `TrainingStopped` if any process has had a signal."""
        number = self.stop_signal
        if self.accelerator.num_processes > 1:
            told = torch.tensor([float(number)], device=self.accelerator.device)
            number = int(self.accelerator.gather(told).max())
        if not number:
            return
        self._save_checkpoint()
        raise TrainingStopped(
            f"stopped by {signal.Signals(number).name} after {self.stage} step {self.progress.step}; run the same command "
            "again to go on from there."
        )

    def _epoch(self):
        """Batches from where `progress.micro_batch` stands to the end of that epoch."""
        try:
            epoch, done = divmod(self.progress.micro_batch, len(self.loader))
        except TypeError:  # a stream: its length is known only by reading it
            yield from self._stream()
            return
        self.loader.set_epoch(epoch)
        self.dataset.set_epoch(epoch)  # the loaders of several processes do not pass it on
        yield from self.accelerator.skip_first_batches(self.loader, done) if done else self.loader

    def _stream(self):
        """Epoch after epoch of this process's part of a stream, passing over what was already seen; processes whose parts
        are shorter begin their next epoch earlier."""
        seen, epoch = self.progress.micro_batch, 0
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
                    f"the data stream gave no full batch; lower {self.stage}.batch_size or give more text."
                )
            epoch += 1

    def _seed_step(self) -> None:
        """Noise depends on (seed, stage, which micro-batch of the whole run) alone, which makes a resumed run exact, and N
        processes equal to one that accumulates N micro-batches.

        Python's generator, which decides what all micro-batches of an update must do alike, depends on the update.
        """
        accelerator, micro_batch = self.accelerator, self.progress.micro_batch
        words = [self.config.seed, STAGES.index(self.stage), micro_batch // self.options.gradient_accumulation_steps]
        random.seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        words[-1] = micro_batch * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(int(np.random.SeedSequence([*words, 1]).generate_state(1)[0]))

    def _step(self, batch: dict[str, torch.Tensor], bar: tqdm) -> None:
        accelerator, progress = self.accelerator, self.progress
        self.model.train()
        self._seed_step()
        with accelerator.accumulate(self.model):
            output = self.model(**batch)
            accelerator.backward(output.loss)
            self.pending.append(output)
            mean, skip = 0.0, False
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
                mean = self._reduced("loss")
                skip = self._is_bad(mean, norm)
            if not skip:
                self.optimizer.step()
            elif accelerator.scaler is not None:
                accelerator.scaler.update()  # it has unscaled the gradients of this update, and expects to hear of it
            self.optimizer.zero_grad()
        progress.micro_batch += 1
        progress.tokens += self.corpus.count(batch, self.module.config.codec_config) * accelerator.num_processes
        if skip:
            self.pending = []
        elif accelerator.sync_gradients:
            self._after_update(mean, bar)

    def _is_bad(self, loss: float, norm: torch.Tensor | None) -> bool:
        """Whether an update must be left out: loss or gradient is NaN or infinite, or the gradient far above its average.

        Raises `NonFiniteLossError` after `max_skipped_steps` in a row, or where the optimizer cannot leave one out.
        """
        progress, options = self.progress, self.options
        if self.accelerator.scaler is not None:  # it expects overflows, and skips them itself
            norm = None
        norm = None if norm is None else float(norm)
        reason = None
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if reason is None and value is not None and not np.isfinite(value):
                reason = f"{name} is {value}"
        limit = options.spike_factor * progress.norm
        if reason is None and norm is not None:
            if limit and progress.step >= SPIKES_AFTER and norm > limit:
                reason = f"gradient norm {norm:.3g} is more than {options.spike_factor:g} times its average"
            else:
                progress.norm = norm if not progress.norm else 0.98 * progress.norm + 0.02 * norm
        if reason is None:
            progress.skipped_in_row = 0
            return False
        progress.skipped, progress.skipped_in_row = progress.skipped + 1, progress.skipped_in_row + 1
        steps_by_itself = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if progress.skipped_in_row > options.max_skipped_steps or steps_by_itself:
            self._give_up(reason)
        self.accelerator.print(
            f"{self.stage} step {progress.step + 1}: {reason}; left out ({progress.skipped} so far)"
        )
        return True

    def _give_up(self, reason: str) -> NoReturn:
        last = (self.checkpoints.all() or ["none yet"])[-1]
        raise NonFiniteLossError(
            f"{reason} at {self.stage} step {self.progress.step + 1}; stopped without saving. The last good checkpoint is {last}. "
            f"Lower {self.stage}.learning_rate ({self.options.learning_rate}) or use mixed_precision=bf16, then run the same "
            "command again."
        )

    def _reduced(self, name: str) -> float:
        """Mean of one output over micro-batches and processes."""
        values = torch.stack([getattr(o, name).detach().float() for o in self.pending])
        return self.accelerator.reduce(values.mean(), "mean").item()

    def _after_update(self, mean: float, bar: tqdm) -> None:
        progress, options = self.progress, self.options
        self.lr_scheduler.step()
        if self.ema:
            self.ema.step(self.module.parameters())
        progress.step += 1
        progress.train_loss, progress.train_count = progress.train_loss + mean, progress.train_count + 1
        metrics = {f"{self.prefix}/learning_rate": self.lr_scheduler.get_last_lr()[0]}
        metrics[f"{self.prefix}/skipped_steps"] = progress.skipped
        if self.stage == "codec":
            metrics["vae/batch_loss"] = mean
        else:
            for name in ("ce_loss", "mse_loss"):
                if getattr(self.pending[0], name) is not None:
                    metrics[f"{self.prefix}/batch_{name}"] = self._reduced(name)
        self.pending = []
        self.accelerator.log(metrics, step=progress.step)
        elapsed = max(time.perf_counter() - self.started, 1e-9)  # a clock may jump
        speed = (progress.tokens - self.started_tokens) / elapsed
        bar.update(1)
        bar.set_postfix_str(f"loss {mean:.4f}, {speed:,.0f} tokens/s", refresh=False)
        last = progress.step == options.max_steps
        if progress.step % options.eval_steps == 0 or last:
            self._evaluate(bar)
        if progress.step % options.checkpoint_steps == 0 or last:
            self._save_checkpoint()
        if not last:
            self._stop_if_told()

    # ---- validation and samples ----

    @torch.no_grad()
    def _evaluate(self, bar: tqdm) -> None:
        """Validation loss with fixed noise, best weights, sample tables; uses the averaged weights if there are any."""
        accelerator, progress = self.accelerator, self.progress
        module = self.module
        if self.ema:
            self.ema.store(module.parameters())
            self.ema.copy_to(module.parameters())
        module.eval()
        outputs = []
        for index, batch in enumerate(self.validation_loader):
            if index == self.options.eval_batches:
                break
            torch.manual_seed(index)
            with accelerator.autocast():
                outputs.append(module(**send_to_device(batch, accelerator.device)))
        values = {name: [getattr(o, name) for o in outputs] for name in ("loss", "ce_loss", "mse_loss")}
        values = {name: [value.float() for value in found if value is not None] for name, found in values.items()}
        values = {name: torch.stack(found).mean().item() for name, found in values.items() if found}
        metrics = {f"{self.prefix}/train_loss": progress.train_loss / max(1, progress.train_count)}
        metrics[f"{self.prefix}/val_loss"] = values["loss"]
        metrics |= {f"{self.prefix}/val_{name}": value for name, value in values.items() if name != "loss"}
        progress.train_loss, progress.train_count = 0.0, 0
        if not np.isfinite(values["loss"]):
            self._give_up(f"validation loss is {values['loss']}")
        improved = values["loss"] < progress.best
        if improved:
            progress.best = values["loss"]
        metrics[f"{self.prefix}/best_val_loss"] = progress.best
        accelerator.log(metrics, step=progress.step)
        summary = ", ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in metrics.items())
        bar.write(f"{self.stage} step {progress.step}: {summary}")
        copy = self._full_copy()
        if self.ema:
            self.ema.restore(module.parameters())
        if accelerator.is_main_process:
            if improved:
                export_repository(copy, self.tokenizer, self.directory / "best", autoencoder=self.corpus.autoencoder)
            if self.config.num_samples:
                self._log_samples(copy.to(accelerator.device))
        accelerator.wait_for_everyone()

    def _log_samples(self, module: TokComModel) -> None:
        step, count = self.progress.step, self.config.num_samples
        pipe = build_pipeline(module, self.tokenizer, vae=self.corpus.autoencoder)
        pipe.set_progress_bar_config(disable=True)
        if module.config.codec_config.modality == "several":
            return self._log_streams(pipe) if self.stage != "codec" else None
        if not module.config.codec_config.has_tokens:
            return self._log_pictures(pipe, next(iter(self.validation_loader)))
        ids = next(iter(self.validation_loader))["input_ids"][:count, :128]
        texts = [self.tokenizer.decode(row) for row in ids]

        def compare(outputs: list[str]) -> list[list]:
            return [[i + 1, text, output] for i, (text, output) in enumerate(zip(texts, outputs))]

        columns = ["Sample", "Original", "Reconstructed"]
        if self.stage == "codec":
            log_table(self.accelerator, "vae/samples", columns, compare(pipe.reconstruct(texts).texts), step)
            return
        generator = torch.Generator().manual_seed(0)
        chunks = module.config.transformer_config.max_position_embeddings // 2
        row = module.config.codec_config.latents_multiple
        chunks = max(row, chunks // row * row)
        samples = pipe.generate(num_chunks=chunks, batch_size=count, generator=generator).texts
        rows = [[i + 1, text] for i, text in enumerate(samples)]
        log_table(self.accelerator, "diffusion/generated", ["Sample", "Generated Text"], rows, step)
        if hasattr(pipe.scheduler, "alphas_cumprod"):  # a diffusion cannot start between noise and text
            return
        rebuilt = pipe.denoise_reconstruct(texts, noise_level=0.5, generator=generator).texts
        log_table(self.accelerator, "diffusion/reconstructed", columns, compare(rebuilt), step)

    def _log_pictures(self, pipe: TokComBasePipeline, batch: dict[str, torch.Tensor]) -> None:
        """A picture of some originals above their reconstructions, or of what is generated for their captions; of a clip, after
        its first frame."""
        batch = {name: value[: 4 * self.config.num_samples] for name, value in batch.items()}
        pixels, generator = batch["pixel_values"], torch.Generator().manual_seed(0)
        prompt = self.tokenizer and self.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        if pixels.ndim == 5:
            rows = self._sample_clips(pipe, pixels[: self.config.num_samples], prompt, generator)
        else:
            rows = [pipe.image_processor.postprocess(pixels)]
            if self.stage == "codec":
                rows.append(pipe.reconstruct(rows[0]).images)
            else:
                rows.append(pipe(prompt, batch_size=len(rows[0]), generator=generator).images)
        grid, name = picture_grid(rows, scale=2), {"codec": "vae/samples"}.get(self.stage, "diffusion/generated")
        grid.save(self.directory / f"samples-{self.progress.step}.png")
        log_picture(self.accelerator, name, grid, self.progress.step)

    def _log_streams(self, pipe: TokComBasePipeline) -> None:
        """Of some records: what is made of each stream that is given alone; texts as a table, pictures as a picture."""
        dataset, generator = self.validation_loader.dataset, torch.Generator().manual_seed(0)
        contents = [dataset.content(i) for i in range(min(4 * self.config.num_samples, len(dataset)))]
        kinds = {name: codec.kind for name, codec in pipe.model.config.codec_config.stream_configs().items()}
        table, rows = [], []
        for name in kinds:
            found = [content for content in contents if name in content]
            others = [other for other in kinds if other != name and kinds[other] in ("text", "image")]
            if not found or not others:
                continue
            made = pipe({name: [c[name] for c in found]}, others, generator=generator).streams
            for other in others:
                if kinds[other] == "image":
                    rows.append(made[other])
                else:
                    table += [[name, content.get(other, ""), text] for content, text in zip(found, made[other])]
        step = self.progress.step
        log_table(self.accelerator, "diffusion/generated", ["Given", "Original", "Generated Text"], table, step)
        if rows:
            grid = picture_grid(rows, scale=2)
            grid.save(self.directory / f"samples-{step}.png")
            log_picture(self.accelerator, "diffusion/pictures", grid, step)

    def _sample_clips(self, pipe: TokComBasePipeline, clips, prompt, generator) -> list[list]:
        """Strips of clips `(B, c, F, H, W)`, as the data hold them, each above what is made of it."""
        clips = clips.to(pipe.model.device)
        pixels = clips if pipe.vae is None else decode_clips(pipe.vae, clips)
        real = [pipe.image_processor.postprocess(clip.transpose(0, 1)) for clip in pixels]
        if self.stage == "codec":
            made = pipe.decode(pipe.model.encode(pixel_values=clips).latents).videos
        elif pipe.model.config.condition_vocab_size:
            made = pipe(prompt[: len(clips)], generator=generator).videos
        else:
            made = pipe(frames=[frames[:1] for frames in real], generator=generator).videos
        return [row for pair in zip(real, made) for row in pair]

    # ---- checkpoints ----

    def _extra_state(self) -> dict[str, object]:
        """What a checkpoint holds besides what accelerate saves; gathers shards, so every rank calls it."""
        extra = {"progress": self.progress, "scheduler": self.lr_scheduler, "average": self.ema}
        state = {name: part.state_dict() for name, part in extra.items() if part is not None}
        return state | {"attention": self.attention}

    def _save_checkpoint(self) -> None:
        accelerator, extra = self.accelerator, self._extra_state()

        def save(folder: str) -> None:
            accelerator.save_state(folder)
            if accelerator.is_main_process:
                torch.save(extra, Path(folder) / EXTRA)

        self.checkpoints.write(self.progress.step, save, accelerator.is_main_process, accelerator.wait_for_everyone)

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, whose files are read without running code of theirs."""
        found = [str(self.checkpoints.newest() or "") if self.accelerator.is_main_process else ""]
        newest = broadcast_object_list(found)[0]
        if not newest:
            return
        if not self.config.resume:
            raise ValueError(f"{newest} exists and `resume` is false; choose another output_dir or remove it.")
        self.accelerator.load_state(newest)
        extra = torch.load(Path(newest) / EXTRA, map_location="cpu", weights_only=True)
        self.progress.load_state_dict(extra["progress"])
        self.lr_scheduler.load_state_dict(extra["scheduler"])
        if self.ema:
            self.ema.load_state_dict(extra["average"])
        self.accelerator.print(f"resumed {self.stage} from {newest}")

    def _full_copy(self) -> TokComModel | None:
        """The current weights as an ordinary model on the main process; gathers shards, so every rank calls it."""
        state = self.accelerator.get_state_dict(self.model)
        if not self.accelerator.is_main_process:
            return None
        model = TokComModel(TokComConfig.from_dict(self.module.config.to_dict()))
        model.load_state_dict({name: value.float() for name, value in state.items()})
        return model.eval()


def check_same_run(config: TrainConfig, file: Path) -> None:
    """Compare with what `output_dir` was started with; other weights or data cannot be continued."""
    if not file.is_file():
        return
    started, now = json.loads(file.read_text()), json.loads(json.dumps(config, default=vars))
    if started.get("data"):  # settings that are younger than the run are at their defaults
        now["data"] = {name: value for name, value in now["data"].items() if name in started["data"]}
    refuse_other_settings(config.output_dir, started, {key: now[key] for key in SAME_RUN})


def run(config: TrainConfig) -> Path:
    """Run the stages that `config.stage` asks for; returns `output_dir`, a Hub repository."""
    output = Path(config.output_dir)
    check_tracker(config.report_to)
    check_same_run(config, output / WORK / "train_config.json")
    AcceleratorState._reset_state()  # each run has its own precision, also several in one process
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first():
        corpus = read_data(config)
        tokenizer = corpus.tokenizer
        if state.is_main_process and not (output / WORK / "train_config.json").is_file():
            (output / WORK).mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                shutil.rmtree(output / WORK / "tokenizer", ignore_errors=True)
                tokenizer.save_pretrained(output / WORK / "tokenizer.tmp")
                (output / WORK / "tokenizer.tmp").rename(output / WORK / "tokenizer")
            (output / WORK / "train_config.json").write_text(json.dumps(config, default=vars, indent=2) + "\n")
    set_seed(config.seed)
    source, donor = None, config.init_from or config.codec_from
    for stage in ("codec", "flow") if config.stage == "all" else (config.stage,):
        final = output / WORK / stage / "final"
        if (final / "config.json").is_file() and state.is_main_process:
            print(f"stage {stage} is already finished in {final}")
        if not (final / "config.json").is_file():
            codec = output / WORK / "codec" / "final"
            if stage == "flow" and not donor and (codec / "config.json").is_file():
                source = str(codec)
            if source is None:
                model = build_model(config, tokenizer)
            else:
                model = TokComModel.from_pretrained(source, dtype=torch.float32)
            untrained = source is None and not donor and bool(list(model.codec.parameters()))
            if stage == "flow" and untrained:
                raise ValueError(
                    f"stage 'flow' needs a trained codec and {output} has none; train it first (stage=codec or stage=all), or "
                    "give `codec_from` or `init_from`."
                )
            if config.stage == "all" and stage == "codec" and not list(model.codec.parameters()):
                continue  # nothing to train: the flow stage builds the same model
            several = model.config.codec_config.modality == "several"
            if stage == "flow" and source is None and not donor and (several or hasattr(model.codec, "latent_mean")):
                corpus.measure(model)  # all there is to know of a codec without a network
            trainer = StageTrainer(config, stage, model, corpus)
            best = trainer.train()
            if trainer.accelerator.is_main_process:
                model = TokComModel.from_pretrained(best)
                if stage == "codec":
                    corpus.measure(model)
                export_repository(model, tokenizer, final, autoencoder=corpus.autoencoder)
            trainer.accelerator.wait_for_everyone()
            trainer.accelerator.free_memory()
        source = str(final)
    if state.is_main_process:
        shutil.copytree(source, output, dirs_exist_ok=True)
        pipe = load_pipeline(output)
        card = training_card(config, pipe)
        (output / "README.md").write_text(card)
        print(f"model written to {output}")
        if config.push_to_hub:
            name = config.hub_model_id or output.resolve().name
            print(f"pushed to {pipe.push_to_hub(name, private=config.hub_private, card=card)}")
    state.wait_for_everyone()
    state.destroy_process_group()
    return output


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug", help="name of a file in presets/, or a path to a YAML file")
    parser.add_argument("--output_dir", help="where checkpoints and the final model go")
    parser.add_argument(
        "--push_to_hub",
        nargs="?",
        const="",
        metavar="USER/NAME",
        help="push the finished model; default name: output_dir's",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. flow.max_steps=100")
    return parser


def parse_config(argv: list[str] | None) -> TrainConfig:
    """The configuration that a command line asks for; raises `ValueError`."""
    args = build_parser().parse_intermixed_args(argv)
    overrides = args.overrides + ([f"output_dir={args.output_dir}"] if args.output_dir else [])
    if args.push_to_hub is not None:
        name = "" if "=" in args.push_to_hub else args.push_to_hub  # an override that follows the bare option
        overrides += [args.push_to_hub] if args.push_to_hub and not name else []
        overrides += ["push_to_hub=true", *([f"hub_model_id={name}"] if name else [])]
    return load_train_config(args.preset, overrides)


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_config(argv))
    except TrainingStopped as stopped:
        print(stopped)
    except (ValueError, FileNotFoundError, NonFiniteLossError, CheckpointError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
