"""What the flow earns: quality against evaluations of the head, for turns, flows and masks.

    python -m tokcom.evaluation.studies.curve --train stories.parquet --validation held_out.parquet \
        --judge judge --work_dir outputs/curve

Every system is trained for `--training_flops` on the same text (the codec stage of TokCom comes on
top; `time_to_quality.py` counts it): rows of `evaluation/ablations.yaml`, masked diffusion in the
same network (`masked.py`), an autoregressive model of as many parameters, and a trained model that
learns masks. Each then continues held-out prompts with several numbers of steps and temperatures.
What is finished is kept in `WORK_DIR/curve/SYSTEM-SEED.json` and not run again. At the end all that
is finished is timed in turn. Writes `curve.md` and `curve.png`.

*NLL at real entropy* is the judge's, interpolated over temperatures to the entropy of real text.
"""

import argparse
import contextlib
import copy
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation import autoregressive
from tokcom.evaluation.ablation import PROMPTS, train_row
from tokcom.evaluation.judges import TokenJudge, load_language_model, token_nll
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
from tokcom.evaluation.reconstruction import held_out_nll
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import AutoregressiveSampler, TokComSampler
from tokcom.evaluation.studies.masked import (
    MaskedObjective,
    MaskedPipeline,
    held_out_objective_nll,
    masked_training,
)
from tokcom.evaluation.texts import likelihood_windows, read_tokens, study_parser
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.tokens import load_tokenizer

RATES = {"learning_rate": 3e-3, "muon_learning_rate": 1.2e-2}  # of all systems
STEPS = (1, 2, 4, 8, 16, 64)  # denoising steps of a chunk of four tokens
TEMPERATURES = (1.0, 0.9, 0.8, 0.7)  # between which NLL is interpolated
THRESHOLDS = (0.1, 0.3, 1.0)  # nats below which a masked token is decided with others

# ---- training ----


def train_system(name: str, args: argparse.Namespace) -> tuple[Path, dict]:
    """The directory of the trained model, and what it cost."""
    entry = SYSTEMS[name]
    if entry.row is None:
        return entry.system.train(args)
    # a copy, since the rows of several systems differ
    options = argparse.Namespace(**vars(args))
    options.row = entry.row
    options.init_from = args.init_from if entry.is_tuned else None
    if entry.system.has_own_work_dir:
        options.work_dir = str(Path(args.work_dir) / name)
    with entry.system.training():
        return train_row(options)


def train_autoregressive(
    args: argparse.Namespace, name: str = "autoregressive", factor: float = 1.0
) -> tuple[Path, dict]:
    """A Llama with the width, depth, rates times `factor`, schedule and average of `tiny`."""
    directory = Path(args.work_dir) / "models" / f"{name}-{args.seed}"
    tokenizer = load_tokenizer(args.checkpoint)
    tokens = read_tokens(args.train, tokenizer, "train")
    autoregressive.train(
        tokens,
        tokenizer,
        directory,
        hidden_size=320,
        num_hidden_layers=8,
        num_parameters=args.num_parameters,
        training_flops=args.training_flops,
        **{key: value * factor for key, value in RATES.items()},
        seed=args.seed,
        ema_half_life=0.05,
        cooldown_share=0.2,
    )
    return directory, json.loads((directory / "training.json").read_text(encoding="utf-8"))


# ---- systems ----


class TurnSystem:
    """A text model of TokCom that can be sampled and timed."""

    pipeline = TokComPipeline
    training = contextlib.nullcontext  # in which its row is trained
    has_own_work_dir = False

    def __init__(self, directory: Path, device: str):
        self.pipe = self.pipeline.from_pretrained(directory).to(device)
        self.chunk_size = self.pipe.chunk_size

    @staticmethod
    def train(args: argparse.Namespace) -> tuple[Path, dict]:
        """A model that is measured as it is."""
        return Path(args.init_from), {}

    def settings(self) -> list[dict]:
        """The ways in which the system is sampled."""
        size = self.chunk_size
        if self.pipe.model.config.transformer_config.local_head:
            return [{"num_inference_steps": size}]  # other numbers change nothing, or lose
        return [
            {"num_inference_steps": steps}
            for steps in (STEPS if size == 4 else (size // 2, size, 2 * size))
        ]

    def own_nll(self, windows: np.ndarray) -> float | None:
        """Exact nats per held-out token; None where only a bound exists."""
        return held_out_nll(self.pipe.model, windows, PROMPT)

    def sampler(self, setting: dict, temperature: float):
        return TokComSampler(self.pipe, temperature=temperature, **setting)

    def evaluations(self, setting: dict) -> float:
        """Evaluations of the head per token of the last samples."""
        return setting["num_inference_steps"] / self.chunk_size


class MaskSystem(TurnSystem):
    pipeline = MaskedPipeline
    training = masked_training
    # its rows have the names of those that are trained on turns, and would overwrite them
    has_own_work_dir = True

    def __init__(self, directory: Path, device: str):
        super().__init__(directory, device)
        self.pipe.model.objective = MaskedObjective()

    def settings(self) -> list[dict]:
        found = [
            {"order": order, "num_inference_steps": steps}
            for order in ("random", "confidence")
            for steps in (1, 2, 4)
        ]
        return found + [{"order": "confidence", "threshold": bound} for bound in THRESHOLDS]

    def own_nll(self, windows: np.ndarray) -> float:
        return held_out_objective_nll(self.pipe.model, windows, PROMPT)

    def sampler(self, setting: dict, temperature: float):
        options = dict(setting)
        # samplers take turns when they are timed, so each keeps its own order
        self.pipe = copy.copy(self.pipe)
        self.pipe.order = options.pop("order")
        self.pipe.threshold = options.pop("threshold", None)
        return TokComSampler(self.pipe, temperature=temperature, **options)

    def evaluations(self, setting: dict) -> float:
        sampler = self.pipe.sampler
        return sampler.evaluations / sampler.chunks / self.chunk_size


class AutoregressiveSystem:
    """A Llama, which evaluates its whole network for every token."""

    chunk_size = 1

    def __init__(self, directory: Path, device: str):
        self.model = load_language_model(str(directory), device)

    @staticmethod
    def train(args: argparse.Namespace) -> tuple[Path, dict]:
        return train_autoregressive(args)

    def settings(self) -> list[dict]:
        return [{}]

    def own_nll(self, windows: np.ndarray) -> float:
        # the first tokens have less context than others, and no system is asked for them
        return float(token_nll(self.model, windows)[:, PROMPT:].mean())

    def sampler(self, setting: dict, temperature: float):
        return AutoregressiveSampler(self.model, 0, temperature)

    def evaluations(self, setting: dict) -> float:
        return 1.0


class Entry(NamedTuple):
    """A system of the study: what it is, and the row of the ablations that trains it, if one
    does; `is_tuned` rows go on from `--init_from`."""

    system: type
    row: str | None = None
    is_tuned: bool = False


SYSTEMS = {
    "turns": Entry(TurnSystem, "recipe"),
    "half turns": Entry(TurnSystem, "stagger_0.5"),
    "no turns": Entry(TurnSystem, "stagger_0"),
    "turns, K = 2": Entry(TurnSystem, "k2"),
    "turns, K = 8": Entry(TurnSystem, "k8"),
    "local head": Entry(TurnSystem, "local_7_1"),
    "local head, K = 8": Entry(TurnSystem, "local_k8_7_1"),
    "masks": Entry(MaskSystem, "recipe"),
    "autoregressive": Entry(AutoregressiveSystem),
    "turns, trained": Entry(TurnSystem),
    "masks, tuned": Entry(MaskSystem, "recipe", is_tuned=True),
}


# ---- measuring ----


def chosen_settings(system, steps: list[int] | None) -> list[dict]:
    """Those with one of these numbers of steps, or without any; all for `None`."""
    return [
        setting
        for setting in system.settings()
        if steps is None or setting.get("num_inference_steps", steps[0]) in steps
    ]


def label(setting: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "one token at a time"


def time_systems(finished: dict[str, dict], args: argparse.Namespace) -> dict:
    """Milliseconds per token of what was measured, by system and setting, in turn."""
    tokens = read_tokens(args.validation, load_tokenizer(args.checkpoint), "validation")
    samplers = {}
    for name, facts in finished.items():
        system = SYSTEMS[name].system(Path(facts["directory"]), args.device)
        measured = {point["setting"] for point in facts["points"]}
        for setting in system.settings():
            if label(setting) in measured:
                samplers[name, label(setting)] = system.sampler(setting, 1.0)
    prompts = held_out_windows(tokens, PROMPT, max(LATENCY_BATCHES))
    return latency(prompts, samplers, length=CONTINUATION, repeats=3)


def measure(name: str, directory: Path, args: argparse.Namespace) -> dict:
    """Quality and evaluations of a system at every setting."""
    system = SYSTEMS[name].system(directory, args.device)
    tokenizer = load_tokenizer(args.checkpoint)
    judge = TokenJudge(args.judge, tokenizer, args.device)
    tokens = read_tokens(args.validation, tokenizer, "validation")
    windows = held_out_windows(tokens, PROMPT + CONTINUATION, args.prompts)
    prompts = windows[:, :PROMPT]
    real = windows[:, PROMPT:]
    facts = {
        "real_nll": float(judge.nll(real, prompts).mean()),
        "real_entropy": sample_entropy(real),
        "own_nll": system.own_nll(likelihood_windows(tokens)),
        "directory": str(directory),
        "points": [],
    }
    for setting in chosen_settings(system, args.steps):
        sweep = []
        for value in TEMPERATURES:
            sampler = system.sampler(setting, value)
            name = f"temperature {value}"
            sweep.append(measure_setting(judge, prompts, name, sampler, system.chunk_size))
            # after the samples, since some systems count while they sample
            sweep[-1]["evaluations per token"] = system.evaluations(setting)
        facts["points"].append(
            {
                "setting": label(setting),
                # at temperature 1, as the columns but that of the interpolated NLL
                "evaluations per token": sweep[0]["evaluations per token"],
                "NLL at real entropy": at_entropy(sweep, facts["real_entropy"]),
                "NLL": sweep[0]["nll"],
                "entropy": sweep[0]["entropy"],
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
    *(f"ms_per_token_batch_{size}" for size in LATENCY_BATCHES),
)


def read_finished(work: Path, seed: int) -> dict[str, dict]:
    """What was measured of each system that is finished."""
    files = {name: work / "curve" / f"{name}-{seed}.json" for name in SYSTEMS}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.is_file()
    }


def write_report(finished: dict[str, dict], times: dict, work: Path) -> None:
    """Collect what is finished into a table and a picture."""
    rows = []
    for name, facts in finished.items():
        own = "-" if facts["own_nll"] is None else facts["own_nll"]
        for point in facts["points"]:
            point |= times[name, point["setting"]]
            cells = ["-" if point[key] is None else point[key] for key in COLUMNS]
            rows.append([name, point["setting"], own, *cells])
    text = table(["system", "setting", "own NLL", *COLUMNS], rows)
    facts = next(iter(finished.values()))
    text += f"\nReal text: NLL {facts['real_nll']:.3f}, entropy {facts['real_entropy']:.3f}\n"
    (work / "curve.md").write_text(text, encoding="utf-8")
    if any(p["NLL at real entropy"] for facts in finished.values() for p in facts["points"]):
        plot(finished, work / "curve.png")
    print(text)


def lines(points: list[dict]) -> list[list[dict]]:
    """Points whose settings differ in one number, without those that no temperature brings to the
    entropy of real text."""
    found: dict[str, list[dict]] = {}
    for point in points:
        if point["NLL at real entropy"] is not None:
            found.setdefault(point["setting"].rstrip("0123456789."), []).append(point)
    return list(found.values())


def plot(finished: dict, file: Path) -> None:
    """Quality against evaluations of the head, and against milliseconds at batch 32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    keys = {
        "evaluations per token": "evaluations of the head per token, of the network for the Llama",
        "ms_per_token_batch_32": "milliseconds per token, batch 32",
    }
    markers = "os^vDPX*<>"
    for axes, (key, meaning) in zip(panels, keys.items()):
        for index, (name, facts) in enumerate(finished.items()):
            style = {"color": f"C{index}", "marker": markers[index % len(markers)], "label": name}
            for line in lines(facts["points"]):
                line.sort(key=lambda point: point[key])
                quality = [point["NLL at real entropy"] for point in line]
                axes.plot([point[key] for point in line], quality, **style)
                style.pop("label", None)  # once per system
        axes.axhline(facts["real_nll"], color="grey", label="real text")
        axes.set(xlabel=meaning)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.set_yticks(range(2, 9), [str(tick) for tick in range(2, 9)])
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="judge's nats per token at the entropy of real text")
    panels[1].legend(fontsize="small")
    figure.savefig(file, dpi=90)


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = study_parser(__doc__, "outputs/curve")
    parser.add_argument("--judge", required=True, help="autoregressive, with the same tokenizer")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        help="numbers of steps per chunk that are measured (default: all of each system)",
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
    add_device_option(parser)
    args = parser.parse_args(argv)
    work = Path(args.work_dir)
    (work / "curve").mkdir(parents=True, exist_ok=True)
    for name in args.systems:
        file = work / "curve" / f"{name}-{args.seed}.json"
        # finished systems are not measured again, so a stopped study goes on
        if file.is_file():
            continue
        directory, cost = train_system(name, args)
        facts = {"cost": cost, **measure(name, directory, args)}
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    finished = read_finished(work, args.seed)
    write_report(finished, time_systems(finished, args), work)


if __name__ == "__main__":
    main()
