"""The model card of a training run: its data, settings, losses and unselected samples, read from what the run wrote."""

import json
from pathlib import Path

import torch

from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.training.config import DataConfig, TrainConfig
from tokcom.training.data import read_sources

WORK = "run"  # checkpoints, logs and tokenizer, inside output_dir
SAMPLES = 3
LIMITATIONS = (
    "A language model repeats what its training text says, errors and prejudice included, and states falsehoods as fluently as "
    "facts. The losses above are of this run's own validation text; no other quality was measured unless a section says so."
)


def source_names(data: DataConfig) -> list[str]:
    """Where the training text comes from: Hub names as they are, of local files only the name."""
    names = [source.path for source in read_sources(data.train)]
    return [Path(name).resolve().name if Path(name).exists() else name for name in names]


def training_card(config: TrainConfig, pipe: TokComBasePipeline) -> str:
    """The card for what `config` trained in `config.output_dir`."""
    run = Path(config.output_dir) / WORK
    rows = []
    for stage in ("codec", "flow", "head"):
        file = run / stage / "summary.json"
        if file.is_file():
            facts, options = json.loads(file.read_text()), getattr(config, stage)
            rows.append(
                f"| {stage} | {facts['steps']:,} | {facts['tokens']:,} | {options.learning_rate:g} | "
                f"{options.muon_learning_rate:g} | {options.sequence_length} | {facts['best_validation_loss']:.4f} |"
            )
    head = "| stage | steps | tokens seen | AdamW rate | Muon rate | window | best validation loss |\n|---|---|---|---|---|---|---|\n"
    started = f"Preset `{config.preset}`, seed {config.seed}, mixed precision {config.mixed_precision or 'no'}."
    if config.init_from:
        started += f" Started from `{Path(config.init_from).name}`."
    sections = {
        "Training data": "\n".join(f"- `{name}`" for name in source_names(config.data)),
        "Training": started + "\n\n" + head + "\n".join(rows),
        "Samples": _samples(pipe),
        "Limitations": LIMITATIONS,
        "Licence": f"`{config.hub_license}`" if config.hub_license else "Not stated by whoever trained this model.",
    }
    name = (config.hub_model_id or Path(config.output_dir).resolve().name).split("/")[-1]
    base = config.init_from if config.init_from and not Path(config.init_from).exists() else None
    return pipe.model_card(name, sections, license=config.hub_license, base_model=base)


def _samples(pipe: TokComBasePipeline) -> str:
    pipe.set_progress_bar_config(disable=True)
    if not pipe.model.config.codec_config.has_tokens:
        return "Samples are in the folder of the run; none was added to this card."
    window = pipe.model.config.transformer_config.max_position_embeddings
    texts = [
        pipe.generate(min(16, window), generator=torch.Generator().manual_seed(seed)).texts[0]
        for seed in range(SAMPLES)
    ]
    shown = "\n".join(f"{seed}: {text.strip()!r}" for seed, text in enumerate(texts))
    return f"Not selected: `pipe.generate(...)` with seeds 0 to {SAMPLES - 1}.\n\n```text\n{shown}\n```"


def evaluation_section(directory: Path) -> str:
    """What `tokcom evaluate --output_dir` wrote, as a section; raises `ValueError` if it wrote nothing there."""
    file = directory / "results.md"
    if not file.is_file():
        raise ValueError(f"{directory} has no results.md; run tokcom evaluate --output_dir {directory} first.")
    return "\n".join(f"#{line}" if line.startswith("##") else line for line in file.read_text().splitlines())
