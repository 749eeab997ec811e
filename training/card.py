"""The model card of a training run: its data, settings, losses and unselected samples, read from
what the run wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard

from tokcom.configuration_tokcom import TokComConfig
from tokcom.modeling_tokcom import TokComModel
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.training.config import STAGES, DataConfig, TrainConfig
from tokcom.training.data import read_sources
from tokcom.training.directory import WORK, RunDirectory
from tokcom.training.modalities import MODALITIES
from tokcom.training.pipelines import load_pipeline

PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
LIMITATIONS = (
    "A language model repeats what its training text says, errors and prejudice included, and "
    "states falsehoods as fluently as facts. The losses above are of this run's own validation "
    "text; no other quality was measured unless a section says so."
)
COLUMNS = (
    "stage",
    "steps",
    "tokens seen",
    "minutes",
    "AdamW rate",
    "Muon rate",
    "window",
    "best validation loss",
)


def publish(
    config: TrainConfig, directory: RunDirectory, device: torch.device, has_weights: bool = True
) -> None:
    """Make `output_dir` a repository of what the last stage left, with its card, and push it if the
    settings ask for it; without `has_weights` the model is not loaded for it."""
    directory.publish(directory.latest(config.stages[-1]))
    # what was published, not what is in memory: samples and card tell of the files
    if has_weights:
        pipe = load_pipeline(directory.root).to(device)  # samples take minutes on a CPU
    else:
        with torch.device("meta"):
            model = TokComModel(TokComConfig.from_pretrained(directory.root))
        pipe = load_pipeline(directory.root, model=model)
    card = training_card(config, pipe)
    directory.write_card(card)
    print(f"model written to {directory.root}")
    if config.push_to_hub:
        name = config.hub_model_id or directory.root.resolve().name
        print(
            f"pushed to {pipe.to('cpu').push_to_hub(name, private=config.hub_private, card=card)}"
        )


def source_names(data: DataConfig) -> list[str]:
    """Where the training data come from: Hub names as they are, of local files only the name."""
    names = [source.path for source in read_sources(data.train)]
    return [Path(name).resolve().name if Path(name).exists() else name for name in names]


def training_card(config: TrainConfig, pipe: TokComBasePipeline) -> str:
    """The card for what `config` trained in `config.output_dir`."""
    summaries = read_summaries(config)
    name = (config.hub_model_id or Path(config.output_dir).resolve().name).split("/")[-1]
    sections = {
        "Training data": "\n".join(f"- `{source}`" for source in source_names(config.data)),
        "Training": _training(config, summaries),
        "Samples": _samples(pipe),
        "Limitations": LIMITATIONS,
        "Licence": f"`{config.hub_license}`"
        if config.hub_license
        else "Not stated by whoever trained this model.",
    }
    card = ModelCard(pipe.model_card(name, sections))
    card.data.license = config.hub_license
    # a Hub id, which readers of the card can follow; a local path means nothing to them
    if config.init_from and not Path(config.init_from).exists():
        card.data.base_model = config.init_from
    card.data.eval_results = _results(config, card.data.pipeline_tag, summaries)
    # results without a name are an error to huggingface_hub
    card.data.model_name = name if card.data.eval_results else None
    return str(card)


def _samples(pipe: TokComBasePipeline) -> str:
    if pipe.model.device.type == "meta":
        return "None: the model was trained in shards, and no process has loaded all of it."
    return MODALITIES[pipe.modality].card_samples(pipe)


def read_summaries(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What each finished stage wrote about itself: steps, tokens and its best validation loss, if
    it has one."""
    files = {stage: Path(config.output_dir) / WORK / stage / "summary.json" for stage in STAGES}
    return {
        stage: json.loads(file.read_text(encoding="utf-8"))
        for stage, file in files.items()
        if file.is_file()
    }


def _results(
    config: TrainConfig, task: str, summaries: dict[str, dict[str, Any]]
) -> list[EvalResult] | None:
    """The validation losses, in the form that the Hub reads."""
    # without validation data of its own, the run has held out the end of the training data
    validation = config.data.validation or config.data.train
    names = source_names(DataConfig(train=validation))
    results = [
        EvalResult(
            task_type=task,
            dataset_type="validation",
            dataset_name=", ".join(names),
            metric_type="loss",
            metric_name=f"validation loss of stage {stage}",
            metric_value=round(facts["best_validation_loss"], 4),
        )
        for stage, facts in summaries.items()
        if "best_validation_loss" in facts
    ]
    return results or None


def _training(config: TrainConfig, summaries: dict[str, dict[str, Any]]) -> str:
    """How the model was trained: a sentence, and a row for each stage."""
    started = f"Preset `{config.preset}`, seed {config.seed}, {_ran(summaries)}."
    if config.stage == "distill":
        scale = config.distill.guidance_scale
        guidance = "the teacher's own guidance" if scale is None else f"guidance {scale:g}"
        started = (
            f"Student of `{Path(config.init_from).name}` in {config.distill.num_inference_steps} "
            f"step(s), method `{config.distill.method}`, {guidance}, seed {config.seed}, "
            f"{_ran(summaries)}."
        )
    elif config.init_from:
        started += f" Started from `{Path(config.init_from).name}`."
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for stage, facts in summaries.items():
        options = getattr(config, stage)
        # stage distill has none
        muon = getattr(options, "muon_learning_rate", 0.0)
        best = facts.get("best_validation_loss")
        cells = [
            stage,
            f"{facts['steps']:,}",
            f"{facts['tokens']:,}",
            # of updates; older runs did not count them
            f"{facts['seconds'] / 60:.1f}" if "seconds" in facts else "-",
            f"{options.learning_rate:g}",
            f"{muon:g}",
        ]
        cells += [str(options.sequence_length), "-" if best is None else f"{best:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return started + "\n\n" + "\n".join(lines)


def _ran(summaries: dict[str, dict[str, Any]]) -> str:
    """What the stages ran on and in which precision, as they found it; stages of version 0.2 did
    not note it."""
    found = []
    for facts in summaries.values():
        if "precision" in facts:
            name = PRECISION_NAMES.get(facts["precision"], facts["precision"])
            found.append(f"{name} on {facts['processes']} x {facts['device']}")
    return ", then ".join(dict.fromkeys(found)) or "precision not noted"


def evaluation_section(directory: Path) -> str:
    """What `tokcom evaluate --output_dir` wrote, as a section; raises `ValueError` if it wrote
    nothing there."""
    file = directory / "results.md"
    if not file.is_file():
        raise ValueError(
            f"{directory} has no results.md; run tokcom evaluate --output_dir {directory} first."
        )
    # one level deeper, below the card's own heading
    return "\n".join(
        f"#{line}" if line.startswith("##") else line
        for line in file.read_text(encoding="utf-8").splitlines()
    )
