"""Compare few-step students of a text model with their teacher: quality at the entropy of real
text, and time.

    python -m tokcom.evaluation.students --teacher text --students student-1 student-4 \
        --steps 1 2 4 8 16 32 --judge judge --data held_out.parquet --peer peer \
        --output_dir results

Texts continue 32 held-out tokens by 64. A sweep over the size of the noise trades quality for
diversity; *at real entropy* interpolates it. `--peer` is an autoregressive model whose time with a
key/value cache is measured too. Writes `results.json`, `results.md` and `steps.png`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.judges import TokenJudge, check_tokens, load_peer
from tokcom.evaluation.metrics import sample_entropy
from tokcom.evaluation.protocol import (
    CONTINUATION,
    LATENCY_BATCHES,
    PROMPT,
    at_entropy,
    held_out_windows,
    latency,
    measure_setting,
)
from tokcom.evaluation.report import short_names, table
from tokcom.evaluation.samplers import AutoregressiveSampler, TokComSampler
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents, tokenize_documents


def measure(
    name: str, sampler: TokComSampler, judge: TokenJudge, windows: np.ndarray, scales: list[float]
) -> dict:
    """The row of a system: NLL and entropy at noise 1, and NLL at the entropy of real text over all
    noise sizes."""
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    curve = []
    for scale in scales:
        sampler.noise_scale = scale
        curve.append(
            measure_setting(judge, prompts, f"noise {scale}", sampler, sampler.pipe.chunk_size)
        )
    # as it was: the sampler is timed afterwards
    sampler.noise_scale = 1.0
    plain = min(curve, key=lambda point: abs(float(point["setting"].split()[1]) - 1))
    config = sampler.pipe.model.config
    steps = sampler.num_inference_steps or config.num_inference_steps
    # guidance evaluates the network twice a step
    row = {"system": name, "evaluations a chunk": steps * (1 + (sampler.guidance_scale != 1))}
    row |= {"NLL": plain["nll"], "entropy": plain["entropy"]}
    # a student that writes less diverse text has a lower NLL for that alone
    row["NLL at real entropy"] = at_entropy(curve, sample_entropy(real))
    return row | {"by place": plain["nll_by_place"], "curve": curve}


def report(facts: dict) -> str:
    keys = ["system", "evaluations a chunk", "NLL", "entropy", "NLL at real entropy"]
    cells = [["real text", "-", facts["real_nll"], facts["real_entropy"], facts["real_nll"]]]
    cells += [["-" if row[key] is None else row[key] for key in keys] for row in facts["rows"]]
    text = "## Continuing 32 held-out tokens by 64\n\n" + table(keys, cells)
    names = list(next(iter(facts["latency"].values())))
    times = [[name, *(found[key] for key in names)] for name, found in facts["latency"].items()]
    return text + "\n\n## Time\n\n" + table(["system", *names], times) + "\n"


def plot(facts: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    groups: dict[str, list[dict]] = {}
    for row in facts["rows"]:
        groups.setdefault(row["system"], []).append(row)
    for name, rows in groups.items():
        steps = [row["evaluations a chunk"] for row in rows]
        (line,) = axes.plot(steps, [row["NLL"] for row in rows], "o-", label=f"{name}, noise 1")
        matched = [
            # a gap in the line where no noise reaches that entropy
            np.nan if row["NLL at real entropy"] is None else row["NLL at real entropy"]
            for row in rows
        ]
        axes.plot(steps, matched, "s--", color=line.get_color(), label=f"{name}, at real entropy")
    axes.axhline(facts["real_nll"], color="grey", label="real text")
    axes.set(xlabel="evaluations of the network a chunk", ylabel="judge NLL, nats a token")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--students", nargs="*", default=[])
    parser.add_argument(
        "--judge", required=True, help="autoregressive judge with the same tokenizer"
    )
    parser.add_argument("--data", required=True, help="held-out text")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--peer", help="autoregressive model whose time is measured, too")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 32], help="of the teacher")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of the teacher")
    parser.add_argument("--noise_scales", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="of the measurement of time")
    parser.add_argument("--output_dir", type=Path, required=True)
    add_device_option(parser)
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> dict:
    args = build_parser().parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    teacher, *students = (
        TokComPipeline.from_pretrained(name).to(args.device)
        for name in (args.teacher, *args.students)
    )
    documents = load_documents(args.data, DataConfig(text_column=args.text_column), "train")
    tokens = tokenize_documents(documents, teacher.tokenizer, args.text_column, "held-out text")
    windows = held_out_windows(tokens, PROMPT + CONTINUATION, args.samples)
    judge = TokenJudge(args.judge, teacher.tokenizer, args.device)
    for name in args.students:
        check_tokens(name, teacher.tokenizer)
    systems = [
        ("teacher", TokComSampler(teacher, steps, args.guidance_scale)) for steps in args.steps
    ]
    systems += [
        # at the steps that each student was made for
        (name, TokComSampler(pipe))
        for name, pipe in zip(short_names(args.students), students)
    ]
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    facts = {
        "real_nll": float(judge.nll(real, prompts).mean()),
        "real_entropy": sample_entropy(real),
    }
    facts["rows"] = [
        measure(name, sampler, judge, windows, args.noise_scales) for name, sampler in systems
    ]
    timed = {f"{name}, {s.num_inference_steps or 'own'} steps": s for name, s in systems}
    if args.peer:
        peer = load_peer(args.peer, teacher.tokenizer, args.device)
        timed["autoregressive peer"] = AutoregressiveSampler(peer, teacher.tokenizer.eos_token_id)
    timed_prompts = held_out_windows(tokens, PROMPT, max(LATENCY_BATCHES))
    facts["latency"] = latency(timed_prompts, timed, repeats=args.repeats)
    # times mean nothing without
    facts["threads"] = torch.get_num_threads()
    facts["settings"] = {name: str(value) for name, value in vars(args).items()}
    (args.output_dir / "results.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="utf-8"
    )
    (args.output_dir / "results.md").write_text(report(facts), encoding="utf-8")
    plot(facts, args.output_dir / "steps.png")
    print(report(facts))
    return facts


if __name__ == "__main__":
    main()
