"""Measure a TokCom model, and autoregressive peers beside it, on held-out text.

    tokcom evaluate --checkpoint . --data sample_data/stories_validation.jsonl --output_dir outputs/evaluation
    tokcom evaluate --data held_out.parquet --train_data books.parquet --judge judge/ --judge stories15M/ \
        --peer "equal FLOPs=peer/" --output_dir outputs/evaluation

Writes `results.json`, `results.md` and PNG plots. A `--judge` with TokCom's tokenizer scores token ids; any other
causal language model scores detokenised text. Without one, a small judge is trained on `--train_data` first.
`--sections` chooses parts: reconstruction, unconditional, continuation, frontier, likelihood, brier, memorisation,
latency. Files of predictions and references are scored instead if there are any:

    tokcom evaluate predictions.json                  # exact match, BLEU-4, ROUGE-L, METEOR
    tokcom evaluate codebook --model model --data held_out.parquet    # how a quantiser's codes are used
    tokcom evaluate a=a_seed_0.json a=a_seed_1.json b=b_seed_0.json b=b_seed_1.json
"""

import argparse
import dataclasses
import json
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokcom.evaluation import autoregressive, codebook, protocol, report
from tokcom.evaluation.judges import TextJudge, TokenJudge
from tokcom.evaluation.metrics import unigram_entropy
from tokcom.evaluation.reconstruction import (
    cross_entropy_at,
    prefers_true_prompt,
    rarest_ids,
    reconstruction_accuracy,
    share_of_informative_draws,
)
from tokcom.evaluation.reference import compare
from tokcom.evaluation.samplers import AutoregressiveSampler, TokComSampler
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.processing_tokcom import decode_ids
from tokcom.training.config import DataConfig
from tokcom.training.data import PackedDataset, WindowShape, load_documents, tokenize_documents

SECTIONS = (
    "reconstruction",
    "unconditional",
    "continuation",
    "frontier",
    "likelihood",
    "brier",
    "memorisation",
    "latency",
)
JUDGE_STEPS = 200  # of the judge that is trained when none is given


def reconstruction(pipe: TokComPipeline, held_out: np.ndarray, train: np.ndarray, max_tokens: int, seed: int) -> dict:
    """Accuracy against latent noise, CE(t), and whether true continuations are preferred."""
    model = pipe.model.eval()
    model.set_stage("flow")
    length = min(512, pipe.max_length)
    shape = WindowShape.of(pipe.model.config, length)
    dataset = PackedDataset(held_out, shape, pipe.tokenizer.eos_token_id, seed=0, training=False)
    count = max(1, min(len(dataset), max_tokens // length))
    spread = np.linspace(0, len(dataset) - 1, count).round().astype(int)  # windows of every book, not of the first
    rows = torch.stack([dataset[i]["input_ids"] for i in spread.tolist()])
    rows = rows[: len(rows) // 8 * 8 or len(rows)].to(model.device)  # equal batches: means need no weights
    batches = list(rows.split(8))
    results = {"tokens": rows.numel()}
    results |= reconstruction_accuracy(model.codec, batches, seed, rarest_ids(train))
    results["unigram_entropy"] = unigram_entropy(held_out)  # of the whole text: few tokens would estimate it too low
    results |= cross_entropy_at(model, batches, seed)
    results["informative_share_of_t"] = share_of_informative_draws(model, results, results["unigram_entropy"])
    pairs = rows[:, : length // 128 * 128].reshape(-1, min(length, 128))
    split = protocol.PROMPT // pipe.chunk_size * pipe.chunk_size
    if len(pairs) > 1 and split < pairs.shape[1]:
        known, real = pairs[:256, :split], pairs[:256, split : split + protocol.CONTINUATION]
        results["prefers_true_prompt"] = prefers_true_prompt(model, known, real, seed)
    return results


def load_judges(args: argparse.Namespace, tokenizer, train: np.ndarray) -> tuple[TokenJudge, dict[str, TextJudge]]:
    """The first judge that shares the tokenizer scores ids, all others text; trains one if there is none."""
    token_judge, text_judges = None, {}
    for path in args.judge:
        if AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab() and token_judge is None:
            token_judge = TokenJudge(path, args.device)
        else:
            text_judges[Path(path).name] = TextJudge(path, args.device)
    if token_judge is None:
        path = Path(args.output_dir) / "judge"
        if not (path / "config.json").is_file():
            print(f"training a judge for {JUDGE_STEPS} steps in {path}")
            autoregressive.train(train, tokenizer, path, 256, 4, max_steps=JUDGE_STEPS, learning_rate=2e-3, seed=1234)
        token_judge = TokenJudge(str(path), args.device)
    return token_judge, text_judges


PROBABILITY_SWEEPS = {
    "temperature": ("temperature", (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)),
    "top-p": ("top_p", (1.0, 0.98, 0.95, 0.9, 0.8)),
}


def sweep_settings(sampler, sweeps: dict[str, tuple[str, tuple]]) -> dict:
    """Copies of `sampler` by setting, "name value", for `{name: (field, values)}`."""
    return {
        f"{name} {value}": dataclasses.replace(sampler, **{field: value})
        for name, (field, values) in sweeps.items()
        for value in values
    }


def tokcom_settings(pipe: TokComPipeline, steps: int) -> dict[str, TokComSampler]:
    """The settings whose NLL and entropy the frontier shows."""
    sweeps = {"guidance": ("guidance_scale", (1.0, 1.5, 2.0))}
    if pipe.model.token_head is not None:
        sweeps |= PROBABILITY_SWEEPS
    else:
        sweeps |= {"noise": ("noise_scale", (1.0, 0.9, 0.8, 0.7)), "churn": ("eta", (0.0, 0.5, 1.0))}
    sweeps["steps"] = ("num_inference_steps", (2, 4, 8, 16, 32, 64))
    return sweep_settings(TokComSampler(pipe, steps), sweeps)


def peer_settings(sampler: AutoregressiveSampler) -> dict[str, AutoregressiveSampler]:
    return sweep_settings(AutoregressiveSampler(sampler.model, sampler.start_token), PROBABILITY_SWEEPS)


def evaluate(args: argparse.Namespace) -> dict:
    """Run the sections that `args` asks for; `results.json` is rewritten after each."""
    pipe = TokComPipeline.from_pretrained(args.checkpoint).to(args.device)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    def read(source: str, name: str) -> np.ndarray:
        documents = load_documents(source, DataConfig(text_column=args.text_column), "train")
        return tokenize_documents(documents, pipe.tokenizer, args.text_column, name)

    held_out, train = read(args.data, "held-out text"), read(args.train_data, "training text")
    results = {
        "about": {
            "checkpoint": str(args.checkpoint),
            "data": str(args.data),
            "command": "python " + " ".join(map(str, args.command)),
            "seed": args.seed,
            "date": str(date.today()),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {args.device}",
        }
    }

    def keep(name: str, facts: dict) -> None:
        results[name] = facts
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    if "reconstruction" in args.sections:
        keep("reconstruction", reconstruction(pipe, held_out, train, args.max_tokens, args.seed))
    if set(args.sections) - {"reconstruction"}:
        token_judge, text_judges = load_judges(args, pipe.tokenizer, train)
        study = protocol.Study(
            train,
            held_out,
            lambda row: decode_ids(pipe.tokenizer, row.tolist()),
            token_judge,
            text_judges,
            pipe.chunk_size,
            args.length,
            args.samples,
            args.seeds,
        )
        ours = TokComSampler(
            pipe, args.steps, args.guidance_scale, args.noise_scale, temperature=args.temperature, top_p=args.top_p
        )
        systems = {"TokCom": ours}
        for peer in args.peer:
            name, path = peer.split("=", 1)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device).eval()
            systems[name] = AutoregressiveSampler(model, pipe.tokenizer.eos_token_id, args.peer_temperature)
        _measure_systems(args, study, pipe, systems, keep)
    (output / "results.md").write_text(report.markdown(results))
    report.plots(results, output)
    return results


def _measure_systems(args: argparse.Namespace, study: protocol.Study, pipe, systems: dict, keep) -> None:
    for name, function in (("unconditional", protocol.unconditional), ("continuation", protocol.continuation)):
        if name in args.sections:
            keep(name, function(study, systems))
    if "frontier" in args.sections:
        settings = {
            n: tokcom_settings(pipe, args.steps) if n == "TokCom" else peer_settings(s) for n, s in systems.items()
        }
        keep("frontier", protocol.frontier(study, settings, min(args.samples, 500)))
    if "brier" in args.sections:
        keep("brier", protocol.brier(study, systems, 8 * args.samples))
    if "likelihood" in args.sections:
        keep("likelihood", protocol.likelihood(study, systems))
    if "memorisation" in args.sections:
        keep("memorisation", protocol.memorisation(study, systems))
    if "latency" in args.sections:
        keep("latency", protocol.latency(study, systems))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="*", help="files of {id, reference, prediction} records, or NAME=FILE")
    parser.add_argument("--checkpoint", default=".", help="model directory or Hub id")
    parser.add_argument("--data", default="sample_data/stories_validation.jsonl", help="held-out text")
    parser.add_argument(
        "--train_data", default="sample_data/stories_train.jsonl", help="what the model was trained on"
    )
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--judge", action="append", default=[], help="causal language model, path or name; repeatable")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="autoregressive peer; repeatable"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--output_dir", default="outputs/evaluation")
    for name, value in {
        "max_tokens": 65536,
        "samples": 1000,
        "seeds": 3,
        "length": 128,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, help="denoising steps per block; by default the model's own")
    for name in ("guidance_scale", "noise_scale", "temperature", "top_p", "peer_temperature"):
        parser.add_argument(f"--{name}", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["codebook"]:
        return codebook.main(given[1:])
    args = parser.parse_args(argv)
    if args.predictions:
        print(compare(args.predictions))
        return {}
    args.command = ["tokcom evaluate", *given]
    try:
        results = evaluate(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print((Path(args.output_dir) / "results.md").read_text())
    return results


if __name__ == "__main__":
    main()
