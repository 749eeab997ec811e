"""`results.json` as Markdown tables and PNG plots."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

# before pyplot is imported, which looks for a screen otherwise
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SAMPLE_COLUMNS = (
    "nll",
    "nll_interval",
    "entropy",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "rep_4",
    "self_bleu_4",
)
SAMPLE_COLUMNS += ("chunks_seen_on_grid", "chunks_seen_off_grid")


def table(columns: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]) + "\n"


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return "-" if value is None else str(value)


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, or whole paths where several end alike."""
    last = [Path(path).name for path in paths]
    return [path if last.count(name) > 1 else name for path, name in zip(paths, last)]


def markdown(results: dict) -> str:
    """All tables of one run, with the command, machine, seed and date."""
    about = results["about"]
    parts = [f"`{about['command']}`, {about['machine']}, seed {about['seed']}, {about['date']}\n"]
    for name, of in results.get("earlier", {}).items():
        parts.append(
            f"{name}: `{of['command']}`, {of['machine']}, seed {of['seed']}, {of['date']}\n"
        )
    if "reconstruction" in results:
        parts += [
            "## Codec and denoiser\n",
            table(["measure", "value"], list(map(list, results["reconstruction"].items()))),
        ]
    for name, title in (
        ("unconditional", "Unconditional samples"),
        ("continuation", "Prefix continuation"),
    ):
        if name in results:
            found = sorted({key for row in results[name].values() for key in row})
            # measures of the judges and of the lengths of prompts that a run has asked for
            extra = [key for key in found if key.startswith("nats_per_character")]
            extra += [key for key in found if key.startswith("nll_prompt")]
            columns = [*SAMPLE_COLUMNS, "nll_by_place", *extra]
            rows = [
                [system, *(row.get(c) for c in columns)] for system, row in results[name].items()
            ]
            parts += [f"## {title}\n", table(["", *columns], rows)]
    for name, title in (
        ("frontier", "Conditional NLL at the entropy of real text"),
        ("likelihood", "Held-out text under the systems' own probabilities"),
        ("brier", "BrierLM"),
        ("memorisation", "Memorisation"),
        ("latency", "Latency"),
    ):
        if name in results:
            # controls lack some measures, so columns are those of any row
            columns = sorted({k for row in results[name].values() for k in row if k != "points"})
            rows = [
                [system, *(row.get(c) for c in columns)] for system, row in results[name].items()
            ]
            parts += [f"## {title}\n", table(["", *columns], rows)]
    return "\n".join(parts)


def plots(results: dict, directory: Path) -> None:
    """Plot the frontier, CE(t), accuracy against latent noise, and NLL by place in the chunk."""
    if "reconstruction" in results:
        _plot_reconstruction(results["reconstruction"], directory)
    if "continuation" in results:
        figure, axes = plt.subplots(figsize=(6, 4))
        for system, row in results["continuation"].items():
            axes.plot(range(len(row["nll_by_place"])), row["nll_by_place"], "o-", label=system)
        _finish(
            figure,
            axes,
            "place in the chunk",
            "conditional judge NLL, nats",
            directory / "nll_by_place.png",
        )
    if "frontier" in results:
        figure, axes = plt.subplots(figsize=(6, 4))
        for system, row in results["frontier"].items():
            # real text is one point
            points = sorted(row.get("points", [row]), key=lambda p: p["entropy"])
            axes.plot(
                [p["entropy"] for p in points], [p["nll"] for p in points], "o-", label=system
            )
        # where systems are compared
        axes.axvline(results["frontier"]["real text"]["entropy"], color="grey", linewidth=0.8)
        _finish(
            figure,
            axes,
            "entropy within a sample, nats",
            "conditional judge NLL, nats",
            directory / "frontier.png",
        )


def _plot_reconstruction(facts: dict, directory: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    curve = {
        # the names of results end with the time or noise level that they are for
        float(k.rsplit("_", 1)[1]): v
        for k, v in facts.items()
        if k.startswith("denoiser_ce_t_") and "pos" not in k
    }
    axes.plot(
        list(curve), list(curve.values()), "o-", label="denoiser, clean text before the block"
    )
    axes.axhline(facts["unigram_entropy"], color="grey", linewidth=0.8, label="unigram entropy")
    _finish(
        figure,
        axes,
        "t (0 is noise, 1 is clean)",
        "cross-entropy, nats per token",
        directory / "ce_of_t.png",
    )
    figure, axes = plt.subplots(figsize=(6, 4))
    for unit in ("token", "chunk"):
        levels = {
            float(k.rsplit("_", 1)[1]): v
            for k, v in facts.items()
            if k.startswith(f"{unit}_accuracy_noise")
        }
        axes.plot(list(levels), list(levels.values()), "o-", label=f"{unit}s")
    _finish(
        figure,
        axes,
        "latent noise, standard deviations",
        "decoded correctly",
        directory / "accuracy_of_noise.png",
    )


def _finish(figure, axes, x: str, y: str, file: Path) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def images_plots(facts: dict, directory: Path) -> None:
    """Plots of `evaluation.images`: the order of the tokens, and how often each code is used."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, key in (
        ("nested dropout", "curve"),
        ("without", "unordered_curve"),
        ("PCA", "pca_curve"),
    ):
        if key in facts:
            axes.plot(facts[key], label=name)
    axes.set(xlabel="tokens kept", ylabel="PSNR, dB")
    axes.legend()
    figure.savefig(directory / "order.png", dpi=120)
    if facts.get("steps"):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for name in dict.fromkeys(row["system"] for row in facts["steps"]):
            rows = [row for row in facts["steps"] if row["system"] == name]
            axes.plot(
                [row["evaluations"] for row in rows],
                [row["Frechet distance"] for row in rows],
                "o-",
                label=name,
            )
        axes.set(
            xlabel="evaluations of the network",
            ylabel="Frechet distance of a classifier's features",
            xscale="log",
        )
        axes.legend()
        figure.savefig(directory / "steps.png", dpi=120)
    if "used" in facts:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.plot(facts["used"])
        axes.set(
            xlabel="code, most used first", ylabel="tokens of held-out pictures", yscale="symlog"
        )
        figure.savefig(directory / "codebook.png", dpi=120)


def benchmark_plot(command: str, rows: list[dict], file: Path) -> None:
    """Scaling plots of one command of `evaluation.benchmark`."""
    if command == "training":
        names = [f"{row['stage']}: {row['system']}" for row in rows]
        panels = [("tokens per second", "tokens_per_second"), ("peak memory, MiB", "peak_mib")]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3))
        for panel, (title, key) in zip(axes, panels):
            panel.barh(names, [row[key] for row in rows])
            panel.set_xlabel(title)
        figure.tight_layout()
        figure.savefig(file, dpi=120)
        plt.close(figure)
        return
    if command == "serving":
        figure, axes = plt.subplots(figsize=(5, 3))
        for name in dict.fromkeys(row["system"] for row in rows):
            own = [row for row in rows if row["system"] == name]
            x = [row["clients"] for row in own]
            axes.semilogx(x, [row["tokens per second"] for row in own], "o-", label=name)
        _finish(figure, axes, "clients at once", "tokens per second", file)
        return
    if command == "length":
        figure, axes = plt.subplots(figsize=(5, 3.5))
        axes.semilogx(
            [row["tokens"] for row in rows],
            [row["ms_per_token"] for row in rows],
            "o-",
            label="TokCom",
        )
        # from 0, or small differences would look like growth
        axes.set_ylim(bottom=0)
        _finish(figure, axes, "generated tokens", "ms per token", file)
        return
    _plot_sampling(rows, file)


def _plot_sampling(rows: list[dict], file: Path) -> None:
    """Milliseconds per token against length, batch, steps and chunk size."""
    plain = [row for row in rows if row["steps"] == "default"]
    # each panel varies one thing, and keeps the others at their smallest
    first = min(row["batch"] for row in rows)
    smallest = min(row["tokens"] for row in rows)
    panels = [
        ("generated tokens", "tokens", [row for row in plain if row["batch"] == first]),
        ("batch", "batch", [row for row in plain if row["tokens"] == smallest]),
        (
            "steps per block",
            "steps",
            [row for row in rows if row["steps"] != "default" and "chunk_size" not in row],
        ),
        ("K (with K steps)", "chunk_size", [row for row in rows if "chunk_size" in row]),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.5))
    for panel, (title, key, found) in zip(axes, panels):
        systems = dict.fromkeys(name for row in found for name in row if name.endswith(" ms/token"))
        for name in systems:
            panel.loglog(
                [r[key] for r in found],
                [r[name] for r in found],
                "o-",
                label=name.removesuffix(" ms/token"),
            )
        panel.set_xlabel(title)
        panel.set_ylabel("ms per token")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
