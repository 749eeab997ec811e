"""Rate and distortion of quantised codecs: bits per token against the share of tokens kept.

    python -m tokcom.evaluation.compression --train books.parquet --validation held_out.parquet \
        --max_steps 600 --rows vq_k4_1k fsq_k4
    python -m tokcom.evaluation.compression --table table.md

Rows are in ROWS. Each trains one codec in `WORK_DIR/NAME` with the settings of the preset `tiny`
and measures it on held-out text. For comparison, gzip and zstd compress the same text without loss;
their bits are divided by the same number of tokens.
"""

import argparse
import gzip
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
import zstandard

from tokcom.cli.errors import report_errors
from tokcom.evaluation.report import table
from tokcom.modeling_tokcom import TokComModel
from tokcom.quantization_tokcom import code_statistics
from tokcom.train_accelerate import run
from tokcom.training.config import DataConfig, as_override, load_train_config
from tokcom.training.data import get_tokenizer, load_documents, tokenize_documents

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CHANNELS = 64  # of the latent of a chunk, in all rows but that of fsq
TEXTS = 65_536  # tokens of held-out text


def _vq(chunk_size: int, num_codes: int, num_quantizers: int = 1) -> dict:
    codes = {"quantizer": "vq", "num_codes": num_codes, "num_quantizers": num_quantizers}
    return {"chunk_size": chunk_size, "latent_channels": CHANNELS, **codes}


ROWS: dict[str, dict] = {
    **{f"vq_k{k}_1k": _vq(k, 1024) for k in (2, 4, 8, 16)},
    **{f"vq_k4_{n // 1024}k": _vq(4, n) for n in (4096, 16384, 65536)},
    **{f"rvq{r}_k4_1k": _vq(4, 1024, r) for r in (2, 4, 8)},
    **{f"rvq{r}_k8_1k": _vq(8, 1024, r) for r in (8, 16)},
    "rvq4_k2_1k": _vq(2, 1024, 4),
    # 24 channels of 5 levels: 24 log2(5) = 55.7 bits a chunk
    "fsq_k4": {"chunk_size": 4, "latent_channels": 24, "quantizer": "fsq", "fsq_levels": [5] * 24},
    "none_k4": {"chunk_size": 4, "latent_channels": CHANNELS},
}


def train_row(name: str, args: argparse.Namespace) -> TokComModel:
    """Train the codec of a row."""
    output = Path(args.work_dir) / name
    overrides = [
        as_override("data.train", args.train),
        as_override("data.validation", args.validation),
        as_override("tokenizer", args.checkpoint),
    ]
    overrides += [
        "stage=codec",
        "num_samples=0",
        "report_to=none",
        f"seed={args.seed}",
        as_override("output_dir", output),
    ]
    overrides += [
        f"codec.max_steps={args.max_steps}",
        f"codec.eval_steps={args.max_steps}",
        "codec.eval_batches=4",
    ]
    # a codec of chunks has no table of tokens, which predicting tokens would need
    overrides += [f"codec.checkpoint_steps={args.max_steps}", "model.prediction_type=latents"]
    overrides += [
        "model.transformer_config.head_attention=true",
        "model.transformer_config.start_latents=false",
        "model.codec_config.encoder_type=chunk",
    ]
    overrides += [f"model.codec_config.{key}={value}" for key, value in ROWS[name].items()]
    overrides += [f"model.transformer_config.latent_channels={ROWS[name]['latent_channels']}"]
    run(load_train_config("tiny", overrides))
    return TokComModel.from_pretrained(output).eval()


@torch.no_grad()
def measure(model: TokComModel, ids: torch.Tensor, picture: Path) -> dict:
    """Bits per token, share of `ids (1, T)` that the codec returns, and usage of the codes."""
    config = model.config.codec_config
    encoded = model.encode(ids)
    decoded = model.to_ids(encoded.latents)  # (1, T)
    kept = (decoded == ids).float().mean().item()
    facts = {
        "K": config.chunk_size,
        "bits per token": config.bits_per_token,
        "token accuracy": kept,
    }
    if encoded.codes is None:
        return facts
    # what a file of codes alone gives back must be what the codec gave
    stored = model.to_ids(model.codec.from_codes(encoded.codes))
    facts["same from codes"] = bool(torch.equal(stored, decoded))
    if config.quantizer == "fsq":  # it has more codes than any text could use: no usage
        used = len(encoded.codes.unique())
        return facts | {"usage": None, "perplexity": None, "distinct codes": used}
    uses = [
        code_statistics(encoded.codes[..., level], config.num_codes)
        for level in range(config.num_quantizers)
    ]
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for level in range(config.num_quantizers):
        counts = torch.bincount(encoded.codes[..., level].flatten(), minlength=config.num_codes)
        axes.loglog(
            range(1, config.num_codes + 1),
            # half a use more, so that unused codes stay on a logarithmic axis
            counts.sort(descending=True).values + 0.5,
            label=f"level {level}",
        )
    axes.set_xlabel("code, by frequency")
    axes.set_ylabel("uses (+ 0.5)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    # levels as if independent: an upper bound of what an entropy coder needs
    facts["entropy, bits per token"] = sum(use["entropy_bits"] for use in uses) / config.chunk_size
    mean = {key: float(np.mean([use[key] for use in uses])) for key in ("usage", "perplexity")}
    return facts | mean | {"distinct codes": None}


def draw_rates(rows: list[dict], file: str) -> None:
    """Plot token accuracy against bits per token, one colour for each K.

    Hollow points are the rates after entropy coding.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row in rows:
        bits = row["bits per token"]
        accuracy = row["token accuracy"]
        size = row.get("K")
        if bits is None:
            continue
        color = "black"  # lossless compressors have no K
        if size is not None:
            color = plt.cm.viridis({2: 0.0, 4: 0.3, 8: 0.6, 16: 0.9}.get(size, 1.0))
        axes.scatter(bits, accuracy, color=color)
        entropy = row.get("entropy, bits per token")
        if entropy:
            axes.scatter(entropy, accuracy, facecolors="none", edgecolors=[color])
            axes.plot([entropy, bits], [accuracy] * 2, color=color, linewidth=0.7)
        axes.annotate(
            row["row"], (bits, accuracy), xytext=(5, -3), textcoords="offset points", fontsize=7
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bits per token (hollow: entropy of the codes)")
    axes.set_ylabel("tokens that survive")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def lossless(text: str, tokens: int) -> list[dict]:
    """Bits per token of the text as UTF-8, and after gzip and zstd."""
    raw = text.encode()
    sizes = {
        "UTF-8": len(raw),
        "gzip -9": len(gzip.compress(raw, 9)),
        # the strongest usual levels, for a fair comparison with a trained codec
        "zstd -19": len(zstandard.compress(raw, 19)),
    }
    return [
        {"row": name, "bits per token": 8 * size / tokens, "token accuracy": 1.0}
        for name, size in sizes.items()
    ]


def write_table(work: Path, file: str, picture: str | None) -> None:
    """Collect all rows measured so far into a Markdown table, and draw them if asked to."""
    found = [
        row
        for path in sorted(work.glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    # a codec without a quantiser has no rate and comes last
    found.sort(key=lambda row: row["bits per token"] or float("inf"))
    columns = [
        "row",
        "K",
        "bits per token",
        "entropy, bits per token",
        "token accuracy",
        "usage",
        "perplexity",
        "distinct codes",
        "steps",
    ]
    text = table(columns, [[row.get(column) for column in columns] for row in found])
    Path(file).write_text(text, encoding="utf-8")
    print(text)
    if picture:
        draw_rates(found, picture)


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=[])
    parser.add_argument(
        "--table", help="Markdown file that collects all rows measured in --work_dir"
    )
    parser.add_argument(
        "--picture", help="PNG of the same rows: token accuracy against bits per token"
    )
    parser.add_argument("--checkpoint", default=".", help="where the tokenizer comes from")
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--work_dir", default="outputs/compression")
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.rows and not (args.train and args.validation):
        parser.error("--rows needs --train and --validation")
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    if args.rows:
        tokenizer = get_tokenizer(args.checkpoint, 0, [], "")
        documents = load_documents(args.validation, DataConfig(train=args.train), "validation")
        tokens = tokenize_documents(documents, tokenizer, "text", "held-out text")[:TEXTS]
        # whole chunks of every row's K, so all rows see the same text
        ids = torch.from_numpy(tokens[: len(tokens) // 16 * 16].astype(np.int64))[None]
        # the very text of these tokens, so that bits are divided by as many
        baselines = lossless(tokenizer.decode(ids[0], skip_special_tokens=True), ids.numel())
        (work / "lossless.json").write_text(
            json.dumps(baselines, indent=2) + "\n", encoding="utf-8"
        )
    for name in args.rows:
        facts = {"row": name, "steps": args.max_steps} | measure(
            train_row(name, args), ids, work / f"{name}.png"
        )
        (work / f"{name}.json").write_text(json.dumps([facts], indent=2) + "\n", encoding="utf-8")
        print(json.dumps(facts))
    if args.table:
        write_table(work, args.table, args.picture)


if __name__ == "__main__":
    main()
