"""Train and measure one row of the ablation table at a fixed number of training operations.

    python -m evaluation.ablation --row split --train books.parquet --validation held_out.parquet --judge judge/
    python -m evaluation.ablation --table docs/ablations.md

Rows are in `evaluation/ablations.yaml`. A row trains the flow stage for `--training_flops` operations on a codec that
rows share, continues held-out prompts of 32 tokens by 64, and writes `WORK_DIR/rows/ROW-SEED.json`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from evaluation.flops import optimizer_flops, training_flops_per_token
from evaluation.judges import TokenJudge
from evaluation.metrics import sample_entropy
from evaluation.protocol import at_entropy
from evaluation.samplers import TokComSampler
from pipeline_tokcom import TokComPipeline
from train_accelerate import build_model, run
from training.config import load_train_config
from training.data import get_tokenizer, load_documents, tokenize_documents
from training.optimizer import build_optimizer

ROWS = yaml.safe_load((Path(__file__).parent / "ablations.yaml").read_text())
PROMPT, CONTINUATION, PROMPTS = 32, 64, 256
NOISE_SCALES = (1.0, 0.9, 0.8)


def held_out_prompts(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows `(count, length)` spread evenly over `tokens (T,)`."""
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def train_row(args: argparse.Namespace) -> tuple[Path, dict]:
    """Train the row's codec, if no other row has, and its flow stage; returns the model and what it cost."""
    row, work = ROWS["rows"][args.row], Path(args.work_dir)
    data = [f"data.train={args.train}", f"data.validation={args.validation}", f"tokenizer={args.checkpoint}"]
    codec = work / "codecs" / row["codec"]
    if not (codec / "config.json").is_file():
        run(
            load_train_config(
                "tiny", [*ROWS["codec_common"], *ROWS["codecs"][row["codec"]], *data, f"output_dir={codec}"]
            )
        )
    output = work / "models" / f"{args.row}-{args.seed}"
    overrides = [*ROWS["common"], *row.get("overrides", []), *data, f"codec_from={codec}", f"seed={args.seed}"]
    config = load_train_config("tiny", [*overrides, f"output_dir={output}"])
    model = build_model(config, get_tokenizer(args.checkpoint, 0, [], ""))
    model.set_stage("flow")
    per_token = training_flops_per_token(model, torch.zeros(1, config.flow.sequence_length, dtype=torch.long))
    per_step = per_token * config.flow.batch_size * config.flow.sequence_length
    options = config.flow
    rates = options.learning_rate, options.muon_learning_rate, options.weight_decay
    per_step += optimizer_flops(model, lambda m: build_optimizer(m, *rates))
    config.flow.max_steps = steps = max(1, round(args.training_flops / per_step))
    config.flow.eval_steps = config.flow.checkpoint_steps = steps
    started = time.perf_counter()
    run(config)
    return output, {
        "row": args.row,
        "seed": args.seed,
        "steps": steps,
        "tokens": steps * config.flow.batch_size * config.flow.sequence_length,
        "training_flops": per_step * steps,
        "seconds": time.perf_counter() - started,
        "flow_parameters": sum(p.numel() for p in model.transformer.parameters()),
    }


def measure(checkpoint: Path, judge: TokenJudge, tokens: np.ndarray, **sampling) -> dict:
    """Conditional judge NLL, by place in the chunk and at the entropy of real text, over several noise scales."""
    windows = held_out_prompts(tokens, PROMPTS, PROMPT + CONTINUATION)
    prompts, real = windows[:, :PROMPT], windows[:, PROMPT:]
    pipe = TokComPipeline.from_pretrained(checkpoint)
    facts = {"real_nll": float(judge.nll(real, prompts).mean()), "real_entropy": sample_entropy(real)}
    curve = []
    for scale in NOISE_SCALES:
        samples = TokComSampler(pipe, noise_scale=scale, **sampling).sample(prompts, CONTINUATION, seed=0)
        nll = judge.nll(samples, prompts)
        places = nll.reshape(len(nll), -1, pipe.chunk_size).mean((0, 1))
        curve.append({"setting": f"noise {scale}", "entropy": sample_entropy(samples), "nll": float(nll.mean())})
        facts[f"noise_{scale}"] = {**curve[-1], "places": places.tolist()}
    facts["nll_at_real_entropy"] = at_entropy(curve, facts["real_entropy"])  # None: outside what was measured
    return facts


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_table(work: Path, file: str) -> None:
    """Collect all rows measured so far into a Markdown table."""
    rows = sorted((json.loads(f.read_text()) for f in (work / "rows").glob("*.json")), key=lambda r: r["row"])
    lines = [
        "| row | seed | M tokens | TFLOP | seconds | NLL at real entropy | NLL | entropy | by place |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = row["noise_1.0"]
        lines.append(
            f"| {row['row']} | {row['seed']} | {row['tokens'] / 1e6:.2f} | {row['training_flops'] / 1e12:.1f} | "
            f"{row['seconds']:.0f} | {_number(row['nll_at_real_entropy'])} | {plain['nll']:.2f} | {plain['entropy']:.2f} | "
            f"{', '.join(f'{v:.2f}' for v in plain['places'])} |"
        )
    Path(file).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS["rows"])
    parser.add_argument("--table", help="Markdown file that collects all rows measured in --work_dir")
    parser.add_argument("--checkpoint", default=".", help="where the tokenizer comes from")
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--judge", help="autoregressive judge with the same tokenizer")
    parser.add_argument("--work_dir", default="outputs/ablation")
    parser.add_argument("--training_flops", type=float, default=4.5e13)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.row:
        if not (args.train and args.validation and args.judge):
            parser.error("--row needs --train, --validation and --judge")
        model, facts = train_row(args)
        documents = load_documents(args.validation, load_train_config("tiny", []).data, "validation")
        tokens = tokenize_documents(documents, TokComPipeline.from_pretrained(model).tokenizer, "text", "held-out")
        facts |= measure(model, TokenJudge(args.judge), tokens)
        file = Path(args.work_dir) / "rows" / f"{args.row}-{args.seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=2) + "\n")
        print(json.dumps(facts, indent=2))
    if args.table:
        write_table(Path(args.work_dir), args.table)


if __name__ == "__main__":
    main()
