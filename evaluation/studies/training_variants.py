"""Ways of training that the recipe does not have: would they pay, on fresh text and on repeated text?

    python -m tokcom.evaluation.studies.training_variants --train stories.parquet \\
        --validation held_out.parquet --variants recipe dropout soap
    python -m tokcom.evaluation.studies.training_variants --train stories.parquet \\
        --validation held_out.parquet --documents 800 --variants recipe dropout weight_decay_1

Each variant is the row `recipe` of the ablations with one thing exchanged while its flow trains, for
as many updates; the model that comes out is an ordinary one. The codec is that of the row.
`--documents` cuts the text of the flow, so that as many updates read it several times. `soap` needs
the package pytorch-optimizer, whose operations are not counted. Writes
`WORK_DIR/variants/VARIANT-DOCUMENTS-OPERATIONS-SEED.json`, and goes on where it was stopped.
"""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import nn

from tokcom.cli.errors import report_errors
from tokcom.evaluation.ablation import (
    ROWS,
    data_settings,
    measure_likelihood,
    train_row,
    trained_codec,
)
from tokcom.evaluation.report import table
from tokcom.evaluation.texts import read_tokens, study_parser
from tokcom.layers_tokcom import TokComMLP
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training import stage
from tokcom.training.optimizer import ChainedOptimizer, build_optimizer, build_schedule

DROPOUT = 0.1
DECAY = 0.3  # of cautious weight decay; the recipe's plain one is 0.05


# ---- what is exchanged ----


@contextlib.contextmanager
def dropout() -> Iterator[None]:
    """Feed-forward layers drop a share of their output while they train."""
    forward = TokComMLP.forward

    def dropping(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.dropout(forward(self, hidden_states), DROPOUT, self.training)

    with mock.patch.object(TokComMLP, "forward", dropping):
        yield


@contextlib.contextmanager
def linear_cooldown() -> Iterator[None]:
    """The rate falls over the last fifth as a line, not as `1 - sqrt(progress)`."""
    schedule = functools.partial(build_schedule, decay_type="linear")
    with mock.patch.object(stage, "build_schedule", schedule):
        yield


@contextlib.contextmanager
def cautious_decay() -> Iterator[None]:
    """Weights decay only where their update moves them towards 0 as well (Chen et al. 2025)."""

    def build(model: nn.Module, learning_rate, muon_learning_rate, weight_decay, *device):
        optimizer = build_optimizer(model, learning_rate, muon_learning_rate, 0.0, *device)
        before: list[torch.Tensor] = []

        def remember(optimizer, *_) -> None:
            before[:] = [parameter.detach().clone() for _, parameter in matrices(optimizer)]

        @torch.no_grad()
        def decay(optimizer, *_) -> None:
            for (rate, parameter), old in zip(matrices(optimizer), before, strict=True):
                shrinks = (parameter - old) * old < 0
                parameter.sub_(old * shrinks, alpha=rate * DECAY)

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(decay)
        return optimizer

    with mock.patch.object(stage, "build_optimizer", build):
        yield


def matrices(optimizer: torch.optim.Optimizer) -> list[tuple[float, nn.Parameter]]:
    """What decays, and the rate that it has now."""
    return [
        # groups are read at every step, since loading a state replaces them
        (group["lr"], parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.ndim >= 2
    ]


@contextlib.contextmanager
def soap() -> Iterator[None]:
    """SOAP (Vyas et al. 2024), at the rate of AdamW, on the matrices that Muon has."""
    from pytorch_optimizer import SOAP

    def build(model: nn.Module, learning_rate, muon_learning_rate, weight_decay, *device):
        rates = learning_rate, muon_learning_rate, weight_decay
        adamw, muon = build_optimizer(model, *rates, *device).parts
        # betas of its authors; the eigenbases are renewed every ten updates
        found = SOAP(
            [parameter for _, parameter in matrices(muon)],
            learning_rate,
            (0.95, 0.95),
            weight_decay=weight_decay,
            precondition_frequency=10,
        )
        return ChainedOptimizer([adamw, found])

    with mock.patch.object(stage, "build_optimizer", build):
        yield


class Variant(NamedTuple):
    """A context in which the recipe is trained, and overrides of its settings."""

    training: Callable = contextlib.nullcontext
    overrides: tuple[str, ...] = ()


VARIANTS = {
    "recipe": Variant(),
    "weight_decay_0.3": Variant(overrides=("flow.weight_decay=0.3",)),
    "weight_decay_1": Variant(overrides=("flow.weight_decay=1.0",)),
    "cautious_decay": Variant(cautious_decay),
    "dropout": Variant(dropout),
    "linear_cooldown": Variant(linear_cooldown),
    "soap": Variant(soap),
}


# ---- runs ----


def cut_text(file: str, documents: int, work: Path) -> Path:
    """A parquet file with the first documents of another."""
    target = work / f"train-{documents}.parquet"
    if not target.is_file():
        rows = pyarrow.parquet.read_table(file).slice(0, documents)
        pyarrow.parquet.write_table(rows, target)
    return target


def run_variant(name: str, args: argparse.Namespace, tokenizer, unique: int) -> dict:
    """What a variant cost, and its likelihood of held-out text."""
    variant = VARIANTS[name]
    # not the name of a row, whose model lies in the same folder
    label = f"variant-{name}-{args.documents or 'all'}-{args.training_flops:g}"
    with variant.training():
        directory, facts = train_row(args, variant.overrides, label)
    pipe = TokComPipeline.from_pretrained(directory)
    facts |= measure_likelihood(pipe, read_tokens(args.validation, tokenizer, "validation"))
    return facts | {"variant": name, "epochs": facts["tokens"] / unique}


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = study_parser(__doc__, "outputs/ablation")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--documents", type=int, help="training texts that are used (default: all of them)"
    )
    parser.add_argument("--training_flops", type=float, default=4e13, help="default: %(default)s")
    args = parser.parse_args(argv, argparse.Namespace(row="recipe", init_from=None))
    folder = Path(args.work_dir) / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    if "soap" in args.variants:
        import pytorch_optimizer  # noqa: F401  # said before the other variants have run
    # not inside of a variant, and of all the text
    trained_codec(ROWS["rows"][args.row]["codec"], data_settings(args), Path(args.work_dir))
    if args.documents:
        args.train = str(cut_text(args.train, args.documents, folder))
    tokenizer = TokComPipeline.from_pretrained(args.checkpoint).tokenizer
    unique = len(read_tokens(args.train, tokenizer, "train"))
    rows = []
    for name in args.variants:
        budget = f"{args.documents or 'all'}-{args.training_flops:g}"
        file = folder / f"{name}-{budget}-{args.seed}.json"
        if not file.is_file():
            facts = run_variant(name, args, tokenizer, unique)
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        facts = json.loads(file.read_text(encoding="utf-8"))
        cost = facts["steps"], facts["epochs"], round(facts["seconds"])
        rows.append([name, *cost, facts["held_out_nll"]])
    print(table(["variant", "steps", "epochs", "seconds", "own NLL, nats per token"], rows))


if __name__ == "__main__":
    main()
