"""The stage `distill`: a student of one or a few sampling steps learns from a finished model, the
teacher.

`method=dmd` is distribution matching (Yin et al. 2024), `regression` learns the ends of the
teacher's trajectories, `both` is the first with a share of the second; `student_losses.py` has the
losses. The teacher may be of images, clips or text, bidirectional or block-causal; it must have
`prediction_type="latents"`, which is trained by squared error. Besides the student a third copy of
the network, the *fake* model, is trained on the student's samples.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.scheduling_tokcom import TokComFlowMatchScheduler
from tokcom.training.checks import check_moves
from tokcom.training.config import DistillConfig, TrainConfig
from tokcom.training.corpora import Corpus
from tokcom.training.denoiser import Context, ModelDenoiser
from tokcom.training.export import export_repository
from tokcom.training.modalities import MODALITIES
from tokcom.training.pipelines import load_pipeline
from tokcom.training.progress import NonFiniteLossError
from tokcom.training.student_losses import Distiller, integrate
from tokcom.training.trainer import Trainer

# what each method uses: weight of the matching loss, and whether there are pairs for the regression
PARTS = {"dmd": (1.0, False), "regression": (0.0, True), "both": (1.0, True)}


def load_teacher(name: str) -> TokComBasePipeline:
    """The teacher, frozen, with its tokenizer and autoencoder; raises `ValueError` for one that
    cannot be distilled."""
    pipe = load_pipeline(name)
    model = pipe.model.float().eval()
    MODALITIES[pipe.modality].check_teacher(name)
    if model.config.prediction_type != "latents":
        raise ValueError(
            f"{name} has `prediction_type={model.config.prediction_type!r}`: it is trained by "
            "cross-entropy and reads nothing from pure noise, so no student can turn noise into "
            "text in a few steps. Train a teacher with `model.prediction_type=latents`."
        )
    # the losses mix `x_t = (1 - t) x0 + t x1` with standard noise
    if model.config.noise_std != 1:
        raise ValueError(f"`noise_std` ({model.config.noise_std}) of the teacher must be 1.")
    model.requires_grad_(False)
    return pipe


class DistillTrainer(Trainer):
    """Trains a student of `config.init_from`; its averaged weights are what the stage ends with."""

    options: DistillConfig

    def __init__(self, config: TrainConfig, corpus: Corpus):
        # the student is called more than once before each backward pass, between which its buffers
        # must not be written
        super().__init__(
            config, "distill", corpus, [DistributedDataParallelKwargs(broadcast_buffers=False)]
        )
        if self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            distribution = self.accelerator.distributed_type.value
            raise ValueError(
                "stage distill needs whole models on every process; use multi_gpu_ddp.yaml "
                f"instead of {distribution}."
            )
        self.pipe = load_teacher(config.init_from)
        # `auto` times a step of one model, and here three take turns
        self.attention = "sdpa" if config.attention == "auto" else config.attention
        self.pipe.model.set_attn_implementation(self.attention)
        guidance = self.options.guidance_scale
        if guidance is None:
            guidance = self.pipe.model.config.sampling_guidance_scale
        self.real = ModelDenoiser(self.pipe.model, guidance).to(self.accelerator.device)
        self.dataset = self._read_dataset(self.pipe.model)
        self.models: dict[str, torch.nn.Module] = {}
        self.parameters: dict[str, list[torch.nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        rates = {"student": self.options.learning_rate, "fake": self.options.fake_learning_rate}
        for name, rate in rates.items():
            self._prepare(name, rate)
        self.start_average()

    # ---- set-up ----

    def _read_dataset(self, teacher: TokComModel) -> torch.utils.data.Dataset:
        config = self.config
        # the teacher's latents are those of its own autoencoder
        self.corpus.autoencoder = getattr(self.pipe, "vae", None)
        check_moves(self.corpus, self.stage, self.options)
        if config.gradient_checkpointing:
            self.accelerator.print(
                "distill: gradient_checkpointing does nothing here; lower distill.batch_size to "
                "save memory"
            )
        # a student has no validation loss: nothing is held out for one
        dataset = self.corpus.datasets(teacher, config, self.options, self.accelerator)[0]
        if not len(dataset):
            raise ValueError(
                "the training data give no "
                f"{self.corpus.rows.format(self.options.sequence_length)}; give more."
            )
        if teacher.condition_embedding is not None and "input_ids" not in dataset[0]:
            raise ValueError(
                f"the teacher reads captions but the data have no field {config.data.captions!r}; "
                "set `data.caption_column`."
            )
        return dataset

    def _prepare(self, name: str, rate: float) -> None:
        """A copy of the teacher whose flow is trained, with its optimizer, as accelerate
        distributes them."""
        teacher = self.pipe.model
        # a configuration of its own: the export writes the student's number of steps into it
        model = TokComModel(type(teacher.config).from_dict(teacher.config.to_dict()))
        model.load_state_dict(teacher.state_dict())
        model.set_attn_implementation(self.attention)
        model.set_stage("flow")
        model.eval()  # nothing is dropped: the student must give what it gives later
        denoiser = ModelDenoiser(model)
        parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        # No momentum: the two models chase each other, and an average of old gradients points to
        # where the other one was. The student should stay near the teacher, not near 0.
        optimizer = torch.optim.AdamW(parameters, rate, (0.0, 0.99), weight_decay=0.0)
        self.models[name], self.optimizers[name] = self.accelerator.prepare(denoiser, optimizer)
        self.parameters[name] = parameters

    def averaged_parameters(self) -> list[torch.nn.Parameter]:
        return self.parameters["student"]

    def _set_up_losses(self) -> None:
        """What the method minimises, with the teacher's trajectories if it needs them."""
        options = self.options
        matching, is_paired = PARTS[options.method]
        self.pairs = self._pairs() if is_paired else None
        self.distiller = Distiller(
            self.real,
            self.models["fake"],
            self.models["student"],
            # evenly from 0, where the exported scheduler, which has no shift, puts its steps
            times=[i / options.num_inference_steps for i in range(options.num_inference_steps)],
            fake_updates=options.fake_updates,
            matching_weight=matching,
            regression_weight=options.regression_weight if is_paired else 0.0,
            pairs=self.pairs,
        )

    @torch.no_grad()
    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and the ends of the teacher's trajectories `(M, N, C)`; pair i is of row i of the
        data, cyclically.

        The main process computes them once and keeps them in a file.
        """
        options = self.options
        accelerator = self.accelerator
        file = self.directory / "pairs.pt"
        if accelerator.is_main_process and not file.is_file():
            ends = []
            starts = range(0, options.num_pairs, options.batch_size)
            for start in tqdm(starts, desc="teacher's trajectories", unit="batch"):
                rows = np.arange(start, min(start + options.batch_size, options.num_pairs))
                context = self._context(rows % len(self.dataset))
                # the first word 0 keeps this noise apart from that of updates, whose first word is
                # 1
                self._seed(0, start)
                noise = torch.randn(self._shape(len(rows), context), device=accelerator.device)
                with accelerator.autocast():
                    end = integrate(
                        lambda x, t, c=context: self.real(x, t, c), noise, options.pair_steps
                    )
                ends.append((noise.cpu(), end.cpu()))
            partial = file.with_suffix(".tmp")
            partial.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tuple(torch.cat(parts) for parts in zip(*ends)), partial)
            # a run that is killed in between computes the trajectories again
            partial.rename(file)
        accelerator.wait_for_everyone()
        noise, end = torch.load(file, map_location="cpu", weights_only=True)
        return noise.to(accelerator.device), end.to(accelerator.device)

    # ---- what is drawn ----

    def _context(self, rows: np.ndarray) -> Context:
        """What the estimates of these rows of the data depend on."""
        batch = default_collate([self.dataset[int(i)] for i in rows])
        return self.real.context(
            {name: value.to(self.accelerator.device) for name, value in batch.items()}, rows
        )

    def _seed(self, *words: int) -> np.random.Generator:
        """Everything drawn in a micro-batch depends on the seed and its place in the run alone."""
        sequence = np.random.SeedSequence([self.config.seed, *words])
        state = int(sequence.generate_state(1)[0])
        torch.manual_seed(state)
        random.seed(state)
        return np.random.default_rng(sequence)

    def _shape(self, batch_size: int, context: Context) -> tuple[int, int, int]:
        codec = self.real.model.config.codec_config
        length = context["latents"].shape[1] if "latents" in context else codec.num_tokens
        return batch_size, length, codec.latent_channels

    # ---- updates ----

    def updates(self) -> Iterator[dict[str, float]]:
        """Rounds of `fake_updates` updates of the fake model and one of the student."""
        self._set_up_losses()
        while True:
            losses = {}
            for place, name in enumerate(self.distiller.schedule()):
                # the place in the round tells the noise of several updates of one model apart
                losses[name] = self._update(name, place)
            yield {
                "loss": losses["student"],
                **{f"{name}_loss": loss for name, loss in losses.items()},
            }

    def _update(self, name: str, place: int) -> float:
        """One update of `name` from all micro-batches of all processes; returns their mean loss.

        DDP averages the gradients over processes, after the last micro-batch only.
        """
        accelerator = self.accelerator
        optimizer = self.optimizers[name]
        count = self.options.gradient_accumulation_steps
        total = torch.zeros((), device=accelerator.device)
        for micro in range(count):
            with accelerator.accumulate(self.models[name]):
                # N processes with one micro-batch draw what one process with N would
                number = micro * accelerator.num_processes + accelerator.process_index
                loss = self._loss(name, place, number)
                accelerator.backward(loss)
                total += loss.detach() / count
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.parameters[name], self.options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        mean = float(accelerator.reduce(total, "mean"))
        if not np.isfinite(mean):
            raise NonFiniteLossError(
                f"the loss of the {name} became {mean} in update {self.progress.step + 1}; lower "
                "its learning rate."
            )
        return mean

    def _loss(self, name: str, place: int, micro_batch: int) -> torch.Tensor:
        draws = self._seed(1, self.progress.step, place, micro_batch)
        size = self.options.batch_size
        device = self.accelerator.device
        # rows with replacement: the student learns from noise, and the data only condition it
        context = self._context(draws.integers(len(self.dataset), size=size))
        shape = self._shape(size, context)
        self.progress.tokens += shape[0] * shape[1] * self.accelerator.num_processes
        with self.accelerator.autocast():
            if name == "fake":
                return self.distiller.fake_loss(shape, device, context)
            pairs = None
            pairs_context = None
            if self.pairs is not None:
                # pair i belongs to row i modulo the number of rows, which `_pairs` has used
                chosen = draws.integers(len(self.pairs[0]), size=size)
                pairs = tuple(part[torch.from_numpy(chosen).to(device)] for part in self.pairs)
                pairs_context = self._context(chosen % len(self.dataset))
            return self.distiller.student_loss(shape, device, context, pairs, pairs_context)

    # ---- the end ----

    def export(self, target: Path) -> None:
        """Write the student with its averaged weights and a scheduler that draws all noise anew at
        each step."""
        if self.accelerator.is_main_process:
            if self.ema is not None:
                # the last thing that is done with these weights, so nobody has to restore them
                self.ema.copy_to(self.parameters["student"])
            model = self.accelerator.unwrap_model(self.models["student"]).model.cpu()
            model.config.num_inference_steps = self.options.num_inference_steps
            # it has learnt what the teacher says under guidance
            model.config.sampling_guidance_scale = 1.0
            # between its steps the student sees fresh noise in training, and so in sampling
            scheduler = TokComFlowMatchScheduler(stochastic_sampling=True)
            export_repository(
                model, self.pipe.tokenizer, target, scheduler, self.corpus.autoencoder
            )
            self.write_summary()
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
