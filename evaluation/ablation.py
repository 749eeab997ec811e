"""Train and measure one row of the ablation table at a fixed number of training operations.

    python -m tokcom.evaluation.ablation --row recipe --train books.parquet \
        --validation held_out.parquet --judge judge/
    python -m tokcom.evaluation.ablation --table outputs/ablation/table.md

Rows are in `evaluation/ablations.yaml`. A row trains the flow stage for `--training_flops`
operations on a codec that rows share. Its likelihood of held-out tokens is measured, and with
`--judge` also the samples with which it continues held-out prompts of 32 tokens by 64. Writes
`WORK_DIR/rows/ROW-SEED.json`. Rows of pixel models need no codec; they are measured by the tokens
that they recover from noise.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from tokcom.cli.errors import report_errors
from tokcom.evaluation.flops import training_flops_per_step
from tokcom.evaluation.judges import TokenJudge
from tokcom.evaluation.metrics import sample_entropy
from tokcom.evaluation.protocol import (
    CONTINUATION,
    PROMPT,
    at_entropy,
    held_out_windows,
    measure_setting,
)
from tokcom.evaluation.reconstruction import held_out_nll, token_recovery
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import TokComSampler
from tokcom.evaluation.texts import likelihood_windows, read_tokens
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.train_accelerate import run
from tokcom.training.build import build_model
from tokcom.training.config import as_override, load_train_config
from tokcom.training.data import get_tokenizer
from tokcom.training.directory import WORK
from tokcom.training.optimizer import build_optimizer

ROWS = yaml.safe_load((Path(__file__).parent / "ablations.yaml").read_text(encoding="utf-8"))
PROMPTS = 256  # held-out prompts that are continued
RECOVERY_WINDOWS = 64  # held-out windows of pixel models
SWEEPS = {"tokens": "temperature", "latents": "noise_scale"}  # what trades quality for diversity
VALUES = (1.0, 0.9, 0.8)  # of the setting that is swept; 1 is the model as it is


def row_overrides(row: dict) -> list[str]:
    """Overrides that a row of the file applies to its training preset."""
    return [*ROWS["common"], *ROWS["bases"][row.get("base", "recipe")], *row.get("overrides", [])]


def data_settings(args: argparse.Namespace) -> list[str]:
    """Overrides that name the text and the tokenizer of a row."""
    return [
        as_override("data.train", args.train),
        as_override("data.validation", args.validation),
        as_override("tokenizer", args.checkpoint),
    ]


def trained_codec(name: str, data: list[str], work: Path) -> Path:
    """Directory of a codec that rows share; trains it if no other row has."""
    codec = work / "codecs" / name
    # one codec for all rows that have it, so that they differ in the flow alone
    if not (codec / "config.json").is_file():
        overrides = [
            *ROWS["codec_common"],
            *ROWS["codecs"][name],
            *data,
            as_override("output_dir", codec),
        ]
        run(load_train_config("tiny", overrides))
    return codec


def train_row(
    args: argparse.Namespace, settings: Sequence[str] = (), name: str | None = None
) -> tuple[Path, dict]:
    """Train the codec of a row, unless another row has, and its flow stage.

    `settings` are further overrides, and `name` that of the model's directory, by default the
    row's.

    Returns: the directory of the model, and what it cost.
    """
    row = ROWS["rows"][args.row]
    work = Path(args.work_dir)
    data = data_settings(args)
    output = work / "models" / f"{name or args.row}-{args.seed}"
    start = []
    if args.init_from:
        # a model that goes on from another one learns at lower rates
        start = [as_override("init_from", args.init_from), *ROWS["tuning"]]
    elif "codec" in row:
        start = [as_override("codec_from", trained_codec(row["codec"], data, work))]
    place = [f"seed={args.seed}", as_override("output_dir", output)]
    overrides = [*row_overrides(row), *data, *start, *settings, *place]
    config = load_train_config(row.get("preset", "tiny"), overrides)
    # a model only to count operations: the budget sets the number of steps
    model = build_model(config, get_tokenizer(args.checkpoint, 0, [], ""))
    flow = config.flow
    # with the settings of the run: noise draws are most of the head's operations
    model.set_stage("flow", **flow.objective)
    rates = flow.learning_rate, flow.muon_learning_rate, flow.weight_decay
    per_step = training_flops_per_step(
        model, flow.batch_size, flow.sequence_length, lambda m: build_optimizer(m, *rates)
    )
    # equal operations, not equal steps: a cheaper step may be taken more often
    steps = max(1, round(args.training_flops / per_step))
    # one validation and one checkpoint, at the end
    flow.max_steps = flow.eval_steps = flow.checkpoint_steps = steps
    run(config)
    summary = output / WORK / "flow" / "summary.json"
    return output, {
        "row": args.row,
        "seed": args.seed,
        "steps": steps,
        "tokens": steps * flow.batch_size * flow.sequence_length,
        "training_flops": per_step * steps,
        # of updates alone
        "seconds": json.loads(summary.read_text(encoding="utf-8"))["seconds"],
        "flow_parameters": sum(p.numel() for p in model.transformer.parameters()),
    }


def measure_likelihood(pipe: TokComPipeline, tokens: np.ndarray) -> dict:
    """The model's own nats per held-out token."""
    # without the first tokens of a window, which lack the context that others have
    return {"held_out_nll": held_out_nll(pipe.model, likelihood_windows(tokens), PROMPT)}


def measure_samples(pipe: TokComPipeline, judge: TokenJudge, tokens: np.ndarray) -> dict:
    """Judge NLL of continuations over a sweep: by place in the chunk, and at the entropy of real
    text."""
    windows = held_out_windows(tokens, PROMPT + CONTINUATION, PROMPTS)
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    facts = {
        "real_nll": float(judge.nll(real, prompts).mean()),
        "real_entropy": sample_entropy(real),
    }
    curve = []
    setting = SWEEPS[pipe.model.config.prediction_type]
    for value in VALUES:
        sampler = TokComSampler(pipe, **{setting: value})
        curve.append(
            measure_setting(judge, prompts, f"{setting} {value}", sampler, pipe.chunk_size)
        )
    facts |= {"curve": curve, "plain": curve[0]}
    # None if the entropy of real text lies outside the sweep
    facts["nll_at_real_entropy"] = at_entropy(curve, facts["real_entropy"])
    return facts


def measure_recovery(checkpoint: Path, tokens: np.ndarray) -> dict:
    """Tokens of held-out windows that a bidirectional model recovers from noise, and that decoding
    the noisy latents recovers."""
    model = TokComPipeline.from_pretrained(checkpoint).model
    windows = held_out_windows(tokens, 512, RECOVERY_WINDOWS)
    return {"recovery": token_recovery(model, windows, seed=0)}


def write_recovery_table(rows: list[dict]) -> str:
    signals = list(rows[0]["recovery"])
    cells = []
    for row in rows:
        cell = [row["row"], row["seed"], row["tokens"] / 1e6, row["training_flops"] / 1e12]
        for signal in signals:
            found = row["recovery"][signal]
            # percent of tokens: by the model, and in brackets by decoding what is noisy as it is
            cell.append(f"{100 * found['model']:.1f} ({100 * found['alone']:.1f})")
        cells.append(cell)
    return table(["row", "seed", "M tokens", "TFLOP", *(f"t = {s}" for s in signals)], cells)


def write_table(work: Path, file: str) -> None:
    """Collect all rows measured so far into a Markdown table."""
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in (work / "rows").glob("*.json")]
    rows.sort(key=lambda row: row["row"])
    recovery = [row for row in rows if "recovery" in row]
    rows = [row for row in rows if "recovery" not in row]
    columns = [
        "row",
        "seed",
        "M tokens",
        "TFLOP",
        "seconds",
        "own NLL",
        "judge NLL at real entropy",
        "judge NLL",
        "entropy",
    ]
    cells = []
    for row in rows:
        # at temperature or noise scale 1; rows that were measured without a judge have no samples
        plain = {key: row.get("plain", {}).get(key) for key in ("nll", "entropy")}
        cost = (row["tokens"] / 1e6, row["training_flops"] / 1e12, round(row["seconds"]))
        measured = (row["held_out_nll"], row.get("nll_at_real_entropy"))
        quality = ("-" if value is None else value for value in (*measured, *plain.values()))
        cells.append([row["row"], row["seed"], *cost, *quality])
    text = table(columns, cells) + (write_recovery_table(recovery) if recovery else "")
    Path(file).write_text(text, encoding="utf-8")
    print(text)


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", choices=ROWS["rows"])
    parser.add_argument(
        "--table", help="Markdown file that collects all rows measured in --work_dir"
    )
    parser.add_argument("--checkpoint", default=".", help="where the tokenizer comes from")
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument(
        "--judge",
        help="autoregressive judge of samples, with the same tokenizer; default: no samples",
    )
    parser.add_argument("--work_dir", default="outputs/ablation")
    parser.add_argument("--init_from", help="trained model to go on from, at lower learning rates")
    parser.add_argument("--training_flops", type=float, default=4.5e13)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.row:
        if not (args.train and args.validation):
            parser.error("--row needs --train and --validation")
        model, facts = train_row(args)
        tokenizer = TokComPipeline.from_pretrained(model).tokenizer
        tokens = read_tokens(args.validation, tokenizer, "validation")
        if "codec" in ROWS["rows"][args.row]:
            pipe = TokComPipeline.from_pretrained(model)
            facts |= measure_likelihood(pipe, tokens)
            if args.judge:
                facts |= measure_samples(pipe, TokenJudge(args.judge, tokenizer), tokens)
        else:
            facts |= measure_recovery(model, tokens)
        file = Path(args.work_dir) / "rows" / f"{args.row}-{args.seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(facts, indent=2))
    if args.table:
        write_table(Path(args.work_dir), args.table)


if __name__ == "__main__":
    main()
