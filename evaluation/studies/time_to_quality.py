"""Likelihood of held-out text against training operations and training time, TokCom beside a Llama.

    python -m tokcom.evaluation.studies.time_to_quality --train stories.parquet \\
        --validation held_out.parquet --budgets 2e13 --rate_factors 0.5 1 2
    python -m tokcom.evaluation.studies.time_to_quality --train stories.parquet \\
        --validation held_out.parquet --budgets 1e13 4e13 8e13 1.6e14

Every point is a run of its own, whose learning rate falls to 0 at its end. Both systems have as many
parameters and layers, the same width, text, batches, optimizer and number of runs; the rates of both
are multiplied by each of `--rate_factors`, and of a budget the best run counts among the factors
that both have tried. What is finished is kept in `WORK_DIR/runs` and not run again. Writes
`time_to_quality.md`.

*Hours* are steps times the processor time of a step, measured at the end with the steps of both
systems in alternation, so that other work on the machine is not counted. TokCom's include its codec
stage, as its operations do. Evaluation is excluded. `--batch_size` and `--torch_compile` change the
steps that are timed, not the runs: models that were trained elsewhere have other batches.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tokcom.cli.errors import report_errors
from tokcom.evaluation.ablation import (
    ROWS,
    data_settings,
    row_overrides,
    train_row,
    trained_codec,
)
from tokcom.evaluation.flops import training_flops_per_step
from tokcom.evaluation.report import table
from tokcom.evaluation.studies.curve import (
    RATES,
    AutoregressiveSystem,
    TurnSystem,
    train_autoregressive,
)
from tokcom.evaluation.texts import likelihood_windows, read_tokens, study_parser
from tokcom.modeling_tokcom import TokComModel
from tokcom.training.attention import ATTENTIONS
from tokcom.training.config import TrainConfig, load_train_config
from tokcom.training.optimizer import build_optimizer
from tokcom.training.precision import has_fast_bfloat16
from tokcom.training.tokens import load_tokenizer

ROW = "recipe"
SYSTEMS = {"TokCom": TurnSystem, "Llama": AutoregressiveSystem}
STEPS = 6  # of each system that are timed
WARM_UP = 3  # steps in which memory is allocated, kernels are chosen and graphs are compiled


def train(system: str, flops: float, factor: float, args: argparse.Namespace) -> tuple[Path, dict]:
    """The directory of a model that was trained for `flops` operations, and what it cost."""
    name = f"{system}-{flops:g}-{factor:g}"
    options = argparse.Namespace(**vars(args), row=ROW, init_from=None, training_flops=flops)
    if system == "Llama":
        return train_autoregressive(options, name, factor)
    rates = [f"flow.{key}={value * factor}" for key, value in RATES.items()]
    return train_row(options, rates, name)


# ---- time ----


def stage_model(config: TrainConfig, directory: Path, stage: str) -> TokComModel:
    """A trained model that is ready for more steps of a stage."""
    model = TokComModel.from_pretrained(directory).train()
    model.set_stage(stage, **getattr(config, stage).objective)
    return model


def stepper(model, optimizer: torch.optim.Optimizer, batch: dict) -> Callable[[], None]:
    """One training step, as both trainers make it."""
    half = has_fast_bfloat16("cpu")

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def processor_seconds(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def seconds_per_step(args: argparse.Namespace, models: dict[str, Path]) -> dict[str, float]:
    """Processor seconds of a step of TokCom's two stages and of the Llama, in alternation; each
    with the attention function that is fastest here."""
    data = data_settings(args)
    codec_config = load_train_config("tiny", [*ROWS["codec_common"], *data])
    flow_config = load_train_config("tiny", [*row_overrides(ROWS["rows"][ROW]), *data])
    codec = stage_model(codec_config, models["codec"], "codec")
    flow = stage_model(flow_config, models["TokCom"], "flow")
    llama = AutoregressiveSystem(models["Llama"], "cpu").model.train()
    llama.requires_grad_()
    shape = (args.batch_size or flow_config.flow.batch_size, flow_config.flow.sequence_length)
    ids = torch.randint(0, llama.config.vocab_size - 1, shape)
    codec_shape = (codec_config.codec.batch_size, codec_config.codec.sequence_length)
    codec_ids = torch.randint(0, llama.config.vocab_size - 1, codec_shape)
    batches = {
        "codec": (codec, {"input_ids": codec_ids}, ("sdpa",)),
        "TokCom": (flow, {"input_ids": ids}, ATTENTIONS),
        "Llama": (llama, {"input_ids": ids, "labels": ids}, ("sdpa", "eager")),
    }
    steps = {}
    for name, (model, batch, attentions) in batches.items():
        muon = 0.0 if name == "codec" else 1e-3  # times do not depend on rates, only on having one
        optimizer = build_optimizer(model, 1e-4, muon, weight_decay=0.01)
        if args.torch_compile:
            own = isinstance(model, TokComModel)
            # in place: as `torch_compile=true` does it, or the whole model
            for part in model.objective.compilable_parts(model) if own else (model,):
                part.compile()
        step = stepper(model, optimizer, batch)
        found = {}
        for attention in attentions:
            model.set_attn_implementation(attention)
            for _ in range(WARM_UP):
                step()
            found[attention] = processor_seconds(step)
        model.set_attn_implementation(min(found, key=found.get))
        steps[name] = step
    # in turn, so that a machine that slows down does not slow one system alone
    times = {name: [] for name in steps}
    for _ in range(STEPS):
        for name, step in steps.items():
            times[name].append(processor_seconds(step))
    return {name: statistics.median(found) for name, found in times.items()}


def codec_cost(args: argparse.Namespace) -> dict:
    """Steps and operations of the codec stage that all models of TokCom share."""
    config = load_train_config("tiny", [*ROWS["codec_common"], *data_settings(args)])
    options = config.codec
    model = stage_model(config, codec_directory(args), "codec")
    per_step = training_flops_per_step(
        model,
        options.batch_size,
        options.sequence_length,
        lambda m: build_optimizer(m, options.learning_rate, 0.0, options.weight_decay),
    )
    return {"steps": options.max_steps, "training_flops": per_step * options.max_steps}


def codec_directory(args: argparse.Namespace) -> Path:
    return trained_codec(ROWS["rows"][ROW]["codec"], data_settings(args), Path(args.work_dir))


# ---- report ----


def finished_runs(work: Path, seed: int) -> list[dict]:
    files = sorted((work / "runs").glob(f"*-{seed}.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def best_run(runs: list[dict], system: str, budget: float) -> tuple[dict, int] | None:
    """The run of a budget with the lowest loss among the rate factors that every system has tried,
    and how many these are; None unless all have."""
    same = [run for run in runs if run["budget"] == budget]
    tried = [{run["factor"] for run in same if run["system"] == name} for name in SYSTEMS]
    factors = set.intersection(*tried)
    own = [run for run in same if run["system"] == system and run["factor"] in factors]
    return (min(own, key=lambda run: run["own_nll"]), len(own)) if own else None


def write_report(args: argparse.Namespace) -> None:
    """The best run of each system and budget as a table."""
    work = Path(args.work_dir)
    runs = finished_runs(work, args.seed)
    for run in runs:
        print(f"{run['system']} {run['budget']:g} x{run['factor']:g}: {run['own_nll']:.4f}")
    models = {run["system"]: Path(run["directory"]) for run in runs}
    if set(models) != set(SYSTEMS):
        print("no table yet: it compares the runs of both systems")
        return
    models["codec"] = codec_directory(args)
    codec = codec_cost(args)
    seconds = seconds_per_step(args, models)
    rows = []
    for budget in sorted({run["budget"] for run in runs}):
        for system in SYSTEMS:
            found = best_run(runs, system, budget)
            if found is None:
                continue
            best, count = found
            flops = best["training_flops"]
            spent = best["steps"] * seconds[system]
            if system == "TokCom":
                flops += codec["training_flops"]
                spent += codec["steps"] * seconds["codec"]
            cost = (f"{flops:.3g}", round(best["tokens"] / 1e6, 2), round(spent / 3600, 3))
            rows.append([system, f"{budget:g}", *cost, count, best["factor"], best["own_nll"]])
    columns = ["system", "budget", "operations", "M tokens", "hours", "runs", "best rate factor"]
    text = table([*columns, "own NLL, nats per token"], rows)
    text += "\nProcessor seconds of a step: "
    text += ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()) + "\n"
    (work / "time_to_quality.md").write_text(text, encoding="utf-8")
    print(text)


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = study_parser(__doc__, "outputs/quality")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[], help="training operations; none: report"
    )
    parser.add_argument(
        "--rate_factors", type=float, nargs="+", default=[1.0], help="default: %(default)s"
    )
    parser.add_argument(
        "--num_parameters",
        type=int,
        default=12_296_098,
        help="of the Llama (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, help="of the flow's and the Llama's timed steps")
    parser.add_argument(
        "--torch_compile", action="store_true", help="time steps of compiled networks"
    )
    args = parser.parse_args(argv)
    folder = Path(args.work_dir) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = read_tokens(args.validation, load_tokenizer(args.checkpoint), "validation")
    windows = likelihood_windows(tokens)
    for budget in args.budgets:
        for factor in args.rate_factors:
            for system in args.systems:
                file = folder / f"{system}-{budget:g}-{factor:g}-{args.seed}.json"
                # finished runs are not made again, so a stopped study goes on
                if file.is_file():
                    continue
                directory, cost = train(system, budget, factor, args)
                own = SYSTEMS[system](directory, "cpu").own_nll(windows)
                facts = {"system": system, "budget": budget, "factor": factor, **cost}
                facts |= {"directory": str(directory), "own_nll": own}
                file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_report(args)


if __name__ == "__main__":
    main()
