"""Distil a TokCom model that regresses latents into a student of one or a few steps.

    accelerate launch distill_accelerate.py --teacher MODEL_DIR --output_dir student num_inference_steps=4 \
        data.train=pictures.parquet

`method=dmd` is distribution matching (Yin et al. 2024), `regression` learns the ends of the teacher's trajectories, `both` (the
default) is the first with a share of the second. The teacher may be of images or of text, bidirectional or block-causal; it must
have `prediction_type="latents"`, which is trained by squared error. Every key of `DistillConfig` is an override `key=value`. A
run that was stopped goes on from its newest checkpoint and ends with the same weights; `output_dir` ends as a model directory
whose scheduler draws new noise at each of its `num_inference_steps`.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.pipeline_media_tokcom import load_pipeline
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.card import WORK
from tokcom.training.checkpoints import CheckpointError, Checkpoints
from tokcom.training.config import DataConfig, StageConfig, TrainConfig, load_overrides, refuse_other_settings
from tokcom.training.corpora import read_data
from tokcom.training.distillation import Distiller, integrate
from tokcom.training.ema import ShardedEMAModel, decay_from_half_life
from tokcom.training.export import export_repository
from tokcom.training.precision import resolve_precision
from tokcom.transformer_tokcom import block_causal_mask

METHODS = {
    "dmd": (1.0, False),
    "regression": (0.0, True),
    "both": (1.0, True),
}  # matching weight, whether pairs are used
STATE = "state.pt"
SETTINGS = "distill_config.json"
MAY_CHANGE = ("max_steps", "checkpoint_steps", "checkpoints_total_limit")  # where a run goes on


@dataclass
class DistillConfig:
    """Everything `distill_accelerate.py` needs to know."""

    teacher: str = ""  # model directory or Hub id
    output_dir: str = "tokcom-student"
    method: str = "both"  # dmd, regression or both
    num_inference_steps: int = 4  # of the student
    guidance_scale: float = 1.0  # of the teacher: the student gives guided samples without guidance
    max_steps: int = 1000  # updates of the student
    fake_updates: int = 5  # of the model of its samples, for each of those
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    sequence_length: int = 256  # tokens, of text
    learning_rate: float = 1e-4
    fake_learning_rate: float = 2e-4
    max_grad_norm: float = 1.0
    regression_weight: float = 0.25
    num_pairs: int = 512  # trajectories of the teacher
    pair_steps: int = 32  # Euler steps of each
    ema_half_life: float = 0.05  # share of max_steps
    checkpoint_steps: int = 100
    checkpoints_total_limit: int = 2
    seed: int = 0
    mixed_precision: str | None = "auto"
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"`method` ({self.method!r}) must be one of {sorted(METHODS)}.")
        if not self.teacher or not self.data.train:
            raise ValueError("give the teacher's directory as `teacher` and what it was trained on as `data.train`.")
        counts = ("num_inference_steps", "max_steps", "fake_updates", "batch_size", "gradient_accumulation_steps")
        for key in (*counts, "num_pairs", "pair_steps", "checkpoint_steps", "checkpoints_total_limit"):
            if getattr(self, key) < 1:
                raise ValueError(f"`{key}` ({getattr(self, key)}) must be at least 1.")
        if self.mixed_precision is False:  # YAML 1.1 reads a bare `no` as false
            self.mixed_precision = "no"
        if self.mixed_precision not in (None, "auto", "no", "bf16"):
            raise ValueError(
                f"`mixed_precision` ({self.mixed_precision!r}) must be auto, no or bf16; no loss is scaled here."
            )
        if self.data.streaming:
            raise ValueError("a stream has no rows to draw from; set data.streaming=false.")


class ModelDenoiser(nn.Module):
    """A model as the estimate `(x (B, N, C), t (B,), context) -> x1 (B, N, C)`, given captions or the clean text before each block."""

    def __init__(self, model: TokComModel, guidance_scale: float = 1.0):
        super().__init__()
        self.model, self.guidance_scale = model, guidance_scale

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: dict[str, torch.Tensor]) -> torch.Tensor:
        guided = self._estimate(x, t, context, sees_context=True)
        if self.guidance_scale == 1.0:
            return guided
        free = self._estimate(x, t, context, sees_context=False)
        return free + self.guidance_scale * (guided - free)

    def _estimate(self, x, t, context, sees_context: bool) -> torch.Tensor:
        model, length = self.model, x.shape[1]
        if model.config.transformer_config.block_size is None:
            prefix, known, times = None, context.get("known"), t[:, None].expand(-1, length)
            if sees_context and model.condition_embedding is not None:
                prefix = model.condition(context["input_ids"], context["attention_mask"])
            if known is not None and sees_context:
                x, times = torch.where(known[..., None], context["latents"], x), torch.where(known, 1.0, times)
            where = model.codec.positions(torch.arange(length, device=x.device)).expand(len(x), -1, -1)
            seen = context.get("valid")
            if known is not None and not sees_context:  # as the pipeline guides: without what is given in the sequence
                seen = ~known if seen is None else seen & ~known
            estimate = model.denoise(x, times, where, seen, prefix=prefix).latents.float()
            return estimate if known is None else torch.where(known[..., None], context["latents"], estimate)
        clean, order, valid = context["latents"], context["order"], context["valid"]
        sees = torch.full((len(x),), sees_context, device=x.device)
        positions = model.codec.positions(torch.arange(length, device=x.device).expand(len(x), -1))
        times = torch.cat((t.new_ones(len(x), length), t[:, None].expand(-1, length)), dim=1)
        mask = block_causal_mask(order, valid, sees)
        inputs = torch.cat((clean, x), dim=1), times, positions.repeat(1, 2, 1), mask
        return model.denoise(*inputs, num_context=length).latents[:, -length:].float()

    @torch.no_grad()
    def context(self, batch: dict[str, torch.Tensor], rows: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """What the estimate depends on, of a batch of the data; all blocks of a text or clip are estimated at once, and of a
        bidirectional model of clips row i of the data is given its first i mod F moments."""
        model, codec = self.model, self.model.config.codec_config
        captions = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        block_size = model.config.transformer_config.block_size
        if codec.has_tokens:
            clean = model.codec.encode(batch["input_ids"], batch["attention_mask"])
        elif block_size is None and codec.group_size == 1:
            return captions
        else:
            clean = model.codec.encode(batch["pixel_values"])
        length = clean.mask.shape[1]
        if not codec.has_tokens and block_size is None:
            moments = torch.arange(length, device=clean.mask.device) // codec.group_size
            given = torch.as_tensor(rows, device=clean.mask.device) % (length // codec.group_size)
            return {**captions, "latents": clean.latents, "known": moments < given[:, None]}
        order = torch.arange(length, device=clean.mask.device) // (block_size or length)
        return {"latents": clean.latents, "order": order.expand(len(clean.mask), -1), "valid": clean.mask}


def load_teacher(config: DistillConfig) -> TokComBasePipeline:
    """The teacher, frozen, with its tokenizer and autoencoder; raises `ValueError` for one that cannot be distilled."""
    pipe = load_pipeline(config.teacher)
    model = pipe.model.float().eval()
    if model.config.codec_config.modality == "several":
        raise ValueError(
            f"{config.teacher} has several streams, whose tasks no student is trained for yet; give a model of one."
        )
    if model.config.prediction_type != "latents":
        raise ValueError(
            f"{config.teacher} has `prediction_type={model.config.prediction_type!r}`: it is trained by cross-entropy, and its head "
            "sees nothing of pure noise, so that a student of few steps cannot turn noise into text. Train a teacher with "
            "`model.prediction_type=latents`."
        )
    if model.config.noise_std != 1:
        raise ValueError(f"`noise_std` ({model.config.noise_std}) of the teacher must be 1.")
    model.requires_grad_(False)
    return pipe


class Distillation:
    """One run: teacher, student, the model of the student's samples, their optimizers, average and checkpoints."""

    def __init__(self, config: DistillConfig):
        self.config, self.step = config, 0
        self.directory = Path(config.output_dir) / WORK / "distill"
        settings, file = json.loads(json.dumps(dataclasses.asdict(config))), self.directory / SETTINGS
        if file.is_file():
            started = json.loads(file.read_text())
            refuse_other_settings(
                config.output_dir, started, {k: v for k, v in settings.items() if k not in MAY_CHANGE}
            )
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = resolve_precision(config.mixed_precision, PartialState(cpu=cpu).device.type)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
        self.pipe = load_teacher(config)
        teacher = self.pipe.model
        self.real = ModelDenoiser(teacher, config.guidance_scale).to(self.accelerator.device)
        with self.accelerator.main_process_first():
            data = TrainConfig(
                output_dir=config.output_dir, init_from=config.teacher, seed=config.seed, data=config.data
            )
            options = StageConfig(sequence_length=config.sequence_length)
            corpus = read_data(data)
            corpus.autoencoder = getattr(self.pipe, "vae", None)
            self.dataset = corpus.datasets(teacher, data, options, self.accelerator)[0]
            captioned = teacher.condition_embedding is not None
            if captioned and "input_ids" not in self.dataset[0]:
                raise ValueError(
                    f"the teacher reads captions but the data have no field {config.data.caption_column!r}; set `data.caption_column`."
                )
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.accelerator.is_main_process:
                file.write_text(json.dumps(settings, indent=2) + "\n")
        self.student, self.fake = (ModelDenoiser(self._copy(teacher)).to(self.accelerator.device) for _ in range(2))
        matching, paired = METHODS[config.method]
        parts = {"student": (self.student, config.learning_rate), "fake": (self.fake, config.fake_learning_rate)}
        self.parameters = {
            name: [p for p in part.parameters() if p.requires_grad] for name, (part, _) in parts.items()
        }
        self.optimizers = {
            name: torch.optim.AdamW(self.parameters[name], rate, (0.0, 0.99), weight_decay=0.0)
            for name, (_, rate) in parts.items()
        }
        self.ema = ShardedEMAModel(
            self.parameters["student"],
            decay=decay_from_half_life(config.ema_half_life * config.max_steps),
            foreach=True,
        )
        self.checkpoints = Checkpoints(self.directory, config.checkpoints_total_limit)
        self.pairs = self._pairs() if paired else None
        self.distiller = Distiller(
            self.real,
            self.fake,
            self.student,
            times=[i / config.num_inference_steps for i in range(config.num_inference_steps)],
            fake_updates=config.fake_updates,
            matching_weight=matching,
            regression_weight=config.regression_weight if paired else 0.0,
            pairs=self.pairs,
        )

    @staticmethod
    def _copy(teacher: TokComModel) -> TokComModel:
        model = TokComModel(type(teacher.config).from_dict(teacher.config.to_dict()))
        model.load_state_dict(teacher.state_dict())
        model.set_stage("flow")
        return model.eval()  # nothing is dropped: the student must give what it gives later

    # ---- what is drawn ----

    def _context(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """What the estimates of these rows of the data depend on."""
        batch = default_collate([self.dataset[int(i)] for i in rows])
        return self.real.context({name: value.to(self.accelerator.device) for name, value in batch.items()}, rows)

    def _seed(self, *words: int) -> np.random.Generator:
        """Everything drawn in a micro-batch depends on the seed and its place in the run alone."""
        sequence = np.random.SeedSequence([self.config.seed, *words])
        state = int(sequence.generate_state(1)[0])
        torch.manual_seed(state)
        random.seed(state)
        return np.random.default_rng(sequence)

    def _shape(self, batch_size: int, context: dict[str, torch.Tensor]) -> tuple[int, int, int]:
        codec = self.real.model.config.codec_config
        length = context["latents"].shape[1] if "latents" in context else codec.num_tokens
        return batch_size, length, codec.latent_channels

    @torch.no_grad()
    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and the ends of the teacher's trajectories `(M, N, C)`; pair i is of row i of the data, cyclically."""
        config, ends = self.config, []
        file = self.directory / "pairs.pt"
        if self.accelerator.is_main_process and not file.is_file():
            starts = range(0, config.num_pairs, config.batch_size)
            for start in tqdm(starts, desc="teacher's trajectories", unit="batch"):
                rows = np.arange(start, min(start + config.batch_size, config.num_pairs))
                context = self._context(rows % len(self.dataset))
                self._seed(0, start)
                noise = torch.randn(self._shape(len(rows), context), device=self.accelerator.device)
                with self.accelerator.autocast():
                    end = integrate(lambda x, t, c=context: self.real(x, t, c), noise, config.pair_steps)
                ends.append((noise.cpu(), end.cpu()))
            torch.save(tuple(torch.cat(parts) for parts in zip(*ends)), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
        self.accelerator.wait_for_everyone()
        noise, end = torch.load(file, map_location="cpu", weights_only=True)
        return noise.to(self.accelerator.device), end.to(self.accelerator.device)

    # ---- the loop ----

    def run(self) -> Path:
        """Distil to `max_steps` and write the student; returns `output_dir`."""
        self._resume()
        main, losses = self.accelerator.is_main_process, {}
        bar = tqdm(
            total=self.config.max_steps, initial=self.step, desc="distillation", unit="update", disable=not main
        )
        while self.step < self.config.max_steps:
            for place, name in enumerate(self.distiller.schedule()):
                losses[name] = self._update(name, place)
            self.ema.step(self.parameters["student"])
            self.step += 1
            bar.update(1)
            bar.set_postfix_str(", ".join(f"{name} {value:.4f}" for name, value in losses.items()), refresh=False)
            if self.step % self.config.checkpoint_steps == 0 or self.step == self.config.max_steps:
                self._save()
        bar.close()
        return self._export()

    def _update(self, name: str, place: int) -> float:
        """One update of `name` from all micro-batches of all processes; returns their mean loss."""
        config, accelerator, total = self.config, self.accelerator, 0.0
        for micro in range(config.gradient_accumulation_steps):
            loss = self._loss(name, place, micro * accelerator.num_processes + accelerator.process_index)
            (loss / config.gradient_accumulation_steps).backward()
            total += loss.detach() / config.gradient_accumulation_steps
        parameters = self.parameters[name]
        for parameter in parameters if accelerator.num_processes > 1 else ():
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        total = float(accelerator.reduce(total, "mean"))
        if not np.isfinite(total):
            raise ValueError(
                f"the loss of the {name} became {total} in update {self.step + 1}; lower its learning rate."
            )
        return total

    def _loss(self, name: str, place: int, micro_batch: int) -> torch.Tensor:
        draws = self._seed(1, self.step, place, micro_batch)
        size, device = self.config.batch_size, self.accelerator.device
        context = self._context(draws.integers(len(self.dataset), size=size))
        with self.accelerator.autocast():
            if name == "fake":
                return self.distiller.fake_loss(self._shape(size, context), device, context)
            pairs, pairs_context = None, None
            if self.pairs is not None:
                chosen = draws.integers(len(self.pairs[0]), size=size)
                pairs = tuple(part[torch.from_numpy(chosen).to(device)] for part in self.pairs)
                pairs_context = self._context(chosen % len(self.dataset))
            return self.distiller.student_loss(self._shape(size, context), device, context, pairs, pairs_context)

    # ---- checkpoints ----

    def _state(self) -> dict:
        parts = {"student": self.student, "fake": self.fake}
        state = {
            name: {k: v for k, v in part.state_dict().items() if ".codec." not in k} for name, part in parts.items()
        }
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {**state, "optimizers": optimizers, "average": self.ema.state_dict(), "step": self.step}

    def _save(self) -> None:
        def save(folder: str) -> None:
            if self.accelerator.is_main_process:
                Path(folder).mkdir(parents=True)
                torch.save(self._state(), Path(folder) / STATE)

        accelerator = self.accelerator
        self.checkpoints.write(self.step, save, accelerator.is_main_process, accelerator.wait_for_everyone)

    def _resume(self) -> None:
        found = [str(self.checkpoints.newest() or "") if self.accelerator.is_main_process else ""]
        newest = broadcast_object_list(found)[0]
        if not newest:
            return
        state = torch.load(Path(newest) / STATE, map_location="cpu", weights_only=True)
        self.student.load_state_dict(state["student"], strict=False)
        self.fake.load_state_dict(state["fake"], strict=False)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.ema.load_state_dict(state["average"])
        self.step = state["step"]
        self.accelerator.print(f"resumed from {newest}")

    def _export(self) -> Path:
        output = Path(self.config.output_dir)
        if self.accelerator.is_main_process:
            model = self.student.model
            self.ema.copy_to(self.parameters["student"])
            model.config.num_inference_steps = self.config.num_inference_steps
            scheduler = TokComFlowMatchScheduler(stochastic_sampling=True)
            parts = self.pipe.tokenizer, self.directory / "final", scheduler, getattr(self.pipe, "vae", None)
            export_repository(model.cpu(), *parts)
            shutil.copytree(self.directory / "final", output, dirs_exist_ok=True)
            print(f"student of {self.config.num_inference_steps} step(s) written to {output}")
        self.accelerator.wait_for_everyone()
        return output


def parse_config(argv: list[str] | None) -> DistillConfig:
    """The configuration that a command line asks for; raises `ValueError`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="model directory or Hub id")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. num_inference_steps=1")
    args = parser.parse_intermixed_args(argv)
    given = [f"teacher={args.teacher}", f"output_dir={args.output_dir}"]
    return load_overrides(DistillConfig, {}, args.overrides + given)


def main(argv: list[str] | None = None) -> None:
    try:
        Distillation(parse_config(argv)).run()
    except (ValueError, FileNotFoundError, CheckpointError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
