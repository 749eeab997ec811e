"""What the flow earns: quality against evaluations of the head, for turns, flows and masks.

    python -m tokcom.evaluation.studies.curve --train stories.parquet --validation held_out.parquet \
        --judge judge --work_dir outputs/curve

Every system is trained for `--training_flops` on the same text: rows of `evaluation/ablations.yaml`,
masked diffusion in the same network (`masked.py`), an autoregressive model of as many parameters,
and a trained model that learns masks. Each then continues held-out prompts with several numbers of steps and temperatures.
What is finished is kept in `WORK_DIR/curve/SYSTEM-SEED.json` and not run again. Writes `curve.md`
and `curve.png`.

*NLL at real entropy* is the judge's, interpolated over temperatures to the entropy of real text.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import numpy as np

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation import autoregressive
from tokcom.evaluation.ablation import PROMPTS, train_row
from tokcom.evaluation.judges import TokenJudge, load_language_model, token_nll
from tokcom.evaluation.metrics import sample_entropy
from tokcom.evaluation.protocol import (
    CONTINUATION,
    PROMPT,
    at_entropy,
    held_out_windows,
    measure_setting,
)
from tokcom.evaluation.reconstruction import held_out_nll
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import AutoregressiveSampler, TokComSampler
from tokcom.evaluation.studies.masked import (
    MaskedObjective,
    MaskedPipeline,
    held_out_masked_nll,
    masked_training,
)
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents, tokenize_documents
from tokcom.training.tokens import load_tokenizer

STEPS = (1, 2, 4, 8, 16, 64)
TEMPERATURES = (1.0, 0.9, 0.8, 0.7)
THRESHOLDS = (0.1, 0.3, 1.0)  # nats below which a masked token is decided with others
SYSTEMS = {  # name -> the row of the ablations that is trained
    "turns": "recipe",
    "half turns": "stagger_0.5",
    "no turns": "stagger_0",
    "turns, K = 2": "k2",
    "turns, K = 8": "k8",
    "masks": "recipe",
    "autoregressive": None,
    "turns, trained": None,
    "masks, tuned": "recipe",
}


# ---- training ----


def train_system(name: str, args: argparse.Namespace) -> tuple[Path, dict]:
    """The directory of the trained model, and what it cost."""
    if name == "autoregressive":
        return train_autoregressive(args)
    if name == "turns, trained":
        return Path(args.init_from), {}
    options = argparse.Namespace(**vars(args))
    options.row = SYSTEMS[name]
    trains_masks = name.startswith("masks")
    if trains_masks:
        options.work_dir = str(Path(args.work_dir) / name)
    if name != "masks, tuned":
        options.init_from = None
    with masked_training() if trains_masks else contextlib.nullcontext():
        return train_row(options)


def train_autoregressive(args: argparse.Namespace) -> tuple[Path, dict]:
    directory = Path(args.work_dir) / "models" / f"autoregressive-{args.seed}"
    tokenizer = load_tokenizer(args.checkpoint)
    documents = load_documents(args.train, DataConfig(), "train")
    tokens = tokenize_documents(documents, tokenizer, "text", "training text")
    autoregressive.train(
        tokens,
        tokenizer,
        directory,
        hidden_size=320,
        num_hidden_layers=8,
        num_parameters=args.num_parameters,
        training_flops=args.training_flops,
        learning_rate=3e-3,
        muon_learning_rate=1.2e-2,
        seed=args.seed,
    )
    return directory, json.loads((directory / "training.json").read_text(encoding="utf-8"))


# ---- measuring ----


def settings(name: str, size: int) -> list[dict]:
    """The ways in which a system is sampled; what is no sampler's option is the masks' own."""
    if name == "autoregressive":
        return [{}]
    if not name.startswith("masks"):
        wanted = STEPS if size == 4 else (size // 2, size, 2 * size)
        return [{"num_inference_steps": steps} for steps in wanted]
    found = [
        {"order": order, "num_inference_steps": steps}
        for order in ("random", "confidence")
        for steps in (1, 2, 4)
    ]
    return found + [{"order": "confidence", "threshold": bound} for bound in THRESHOLDS]


def label(setting: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "one token at a time"


class Measured:
    """A trained system that can be sampled and timed."""

    def __init__(self, name: str, directory: Path, device: str):
        self.name = name
        if name == "autoregressive":
            self.model = load_language_model(str(directory), device)
            self.chunk_size = 1
            self.has_masks = False
            return
        self.has_masks = name.startswith("masks")
        pipeline = MaskedPipeline if self.has_masks else TokComPipeline
        self.pipe = pipeline.from_pretrained(directory).to(device)
        self.chunk_size = self.pipe.chunk_size
        if self.has_masks:
            self.pipe.model.objective = MaskedObjective()

    def own_nll(self, tokens: np.ndarray) -> float | None:
        """Exact nats per held-out token; None where only a bound exists."""
        windows = held_out_windows(tokens, 512, 48)
        if self.name == "autoregressive":
            return float(np.nanmean(token_nll(self.model, windows)))
        if self.has_masks:
            return held_out_masked_nll(self.pipe.model, windows, PROMPT)
        return held_out_nll(self.pipe.model, windows, PROMPT)

    def sampler(self, setting: dict, temperature: float):
        if self.name == "autoregressive":
            return AutoregressiveSampler(self.model, 0, temperature)
        options = dict(setting)
        if self.has_masks:
            self.pipe.order = options.pop("order")
            self.pipe.threshold = options.pop("threshold", None)
        return TokComSampler(self.pipe, temperature=temperature, **options)

    def evaluations(self, setting: dict) -> float:
        """Evaluations of the head per token of the last samples."""
        if self.name == "autoregressive":
            return 1.0
        if self.has_masks:
            sampler = self.pipe.sampler
            return sampler.evaluations / sampler.chunks / self.chunk_size
        return setting["num_inference_steps"] / self.chunk_size

    def milliseconds(self, setting: dict, prompts: np.ndarray) -> float:
        """Per generated token, the median of three runs."""
        found = []
        for seed in range(3):
            started = time.perf_counter()
            self.sampler(setting, 1.0).sample(prompts, CONTINUATION, seed)
            found.append(1000 * (time.perf_counter() - started) / prompts.shape[0] / CONTINUATION)
        return float(np.median(found))


def measure(name: str, directory: Path, args: argparse.Namespace) -> dict:
    """Quality, evaluations and time of a system at every setting."""
    system = Measured(name, directory, args.device)
    judge = TokenJudge(args.judge, args.device)
    tokenizer = load_tokenizer(args.checkpoint)
    documents = load_documents(args.validation, DataConfig(), "validation")
    tokens = tokenize_documents(documents, tokenizer, "text", "held-out text")
    windows = held_out_windows(tokens, PROMPT + CONTINUATION, args.prompts)
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    facts = {
        "real_nll": float(judge.nll(real, prompts).mean()),
        "real_entropy": sample_entropy(real),
        "own_nll": system.own_nll(tokens),
        "points": [],
    }
    for setting in settings(name, system.chunk_size):
        sweep = [
            measure_setting(
                judge,
                prompts,
                f"temperature {value}",
                system.sampler(setting, value),
                system.chunk_size,
            )
            for value in TEMPERATURES
        ]
        facts["points"].append(
            {
                "setting": label(setting),
                "evaluations per token": system.evaluations(setting),
                "NLL at real entropy": at_entropy(sweep, facts["real_entropy"]),
                "NLL": sweep[0]["nll"],
                "entropy": sweep[0]["entropy"],
                "ms per token, batch 1": system.milliseconds(setting, prompts[:1]),
                "ms per token, batch 32": system.milliseconds(setting, prompts[:32]),
                "sweep": sweep,
            }
        )
    return facts


# ---- reporting ----


COLUMNS = (
    "evaluations per token",
    "NLL at real entropy",
    "NLL",
    "entropy",
    "ms per token, batch 1",
    "ms per token, batch 32",
)


def write_report(work: Path, seed: int) -> None:
    """Collect what is finished into a table and a picture."""
    finished = {}
    for name in SYSTEMS:
        file = work / "curve" / f"{name}-{seed}.json"
        if file.is_file():
            finished[name] = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for name, facts in finished.items():
        own = "-" if facts["own_nll"] is None else facts["own_nll"]
        for point in facts["points"]:
            cells = ["-" if point[key] is None else point[key] for key in COLUMNS]
            rows.append([name, point["setting"], own, *cells])
    text = table(["system", "setting", "own NLL", *COLUMNS], rows)
    facts = next(iter(finished.values()))
    text += f"\nReal text: NLL {facts['real_nll']:.3f}, entropy {facts['real_entropy']:.3f}\n"
    (work / "curve.md").write_text(text, encoding="utf-8")
    if any(p["NLL at real entropy"] for facts in finished.values() for p in facts["points"]):
        plot(finished, work / "curve.png")
    print(text)


def plot(finished: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    key = "evaluations per token"
    for name, facts in finished.items():
        points = [p for p in facts["points"] if p["NLL at real entropy"] is not None]
        if not points:  # no temperature brings these samples to the entropy of real text
            continue
        points.sort(key=lambda point: point[key])
        quality = [point["NLL at real entropy"] for point in points]
        axes.plot([point[key] for point in points], quality, "o-", label=name)
    axes.axhline(facts["real_nll"], color="grey", label="real text")
    axes.set(xlabel="evaluations of the head per token, of the network for the Llama")
    axes.set(ylabel="judge's nats per token at the entropy of real text")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=90)


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="parquet file with training text")
    parser.add_argument("--validation", required=True, help="parquet file with held-out text")
    parser.add_argument("--judge", required=True, help="autoregressive, with the same tokenizer")
    parser.add_argument("--checkpoint", default=".", help="tokenizer (default: %(default)s)")
    parser.add_argument("--work_dir", default="outputs/curve", help="default: %(default)s")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all"
    )
    parser.add_argument(
        "--init_from",
        default=".",
        help="trained text model, measured as it is and after training on masks (default: %(default)s)",
    )
    parser.add_argument(
        "--training_flops", type=float, default=4e13, help="of each (default: %(default)s)"
    )
    parser.add_argument(
        "--num_parameters",
        type=int,
        default=12_296_098,
        help="of the autoregressive model (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts", type=int, default=PROMPTS, help="that are continued (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_device_option(parser)
    args = parser.parse_args(argv)
    work = Path(args.work_dir)
    (work / "curve").mkdir(parents=True, exist_ok=True)
    for name in args.systems:
        file = work / "curve" / f"{name}-{args.seed}.json"
        if file.is_file():
            continue
        directory, cost = train_system(name, args)
        facts = {"cost": cost, **measure(name, directory, args)}
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_report(work, args.seed)


if __name__ == "__main__":
    main()
