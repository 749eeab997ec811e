"""OmniFlow's decoder experiments: latent heads between a frozen transformer and a frozen decoder.

    python -m tokcom.evaluation.heads --checkpoint backbone --train captions.parquet \
        --validation held_out.parquet --seeds 0 1 2

Trains each of EXPERIMENTS on `--checkpoint`, a finished model that regresses latents, once per
seed. Re-denoises held-out texts from `--noise_level`, decodes them from latents alone, and writes
one `predictions.json` each. Prints a table of means and standard deviations, including the model
without a head.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.reference import compare
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.train_accelerate import run
from tokcom.training.config import DataConfig, as_override, load_train_config
from tokcom.training.data import load_documents

EXPERIMENTS = {
    "baseline: mlp": {"latent_head": "mlp"},
    "A: mlp, refiner": {"latent_head": "mlp", "latent_refiner": "mlp"},
    "B: vq": {"latent_head": "vq"},
    "A+B: vq, refiner": {"latent_head": "vq", "latent_refiner": "mlp"},
}
BATCH = 50  # texts that are denoised at once


def held_out_texts(args: argparse.Namespace) -> list[str]:
    """The first words of held-out documents.

    Raises `ValueError` if one of the documents is also in the training data.
    """
    data = DataConfig(train=args.train, text_column=args.text_column)
    column = args.text_column
    sources = {"train": args.train, "validation": args.validation}
    train, validation = (
        load_documents(path, data, split)[column] for split, path in sources.items()
    )
    # a head that has memorised a text would look like one that decodes it
    shared = set(train) & set(validation)
    if shared:
        raise ValueError(
            f"{len(shared)} documents of {args.validation} are training documents, e.g. "
            f"{min(shared)[:60]!r}; hold out others."
        )
    return [" ".join(text.split()[: args.words]) for text in validation if text.strip()][
        : args.samples
    ]


def predict(pipe: TokComPipeline, texts: list[str], noise_level: float, seed: int) -> list[str]:
    """Encode texts, mix them with noise, denoise them, pass them through the head and decode."""
    # the same noise for every experiment of a seed, so that differences are those of the heads
    generator = torch.Generator().manual_seed(seed)
    predictions = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(texts), BATCH), desc="predicting"):
        part = texts[start : start + BATCH]
        predictions += pipe.denoise_reconstruct(part, noise_level, generator=generator).texts
    return predictions


def write_predictions(file: Path, texts: list[str], predictions: list[str]) -> str:
    rows = [
        {"id": i, "reference": r, "prediction": p}
        for i, (r, p) in enumerate(zip(texts, predictions))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(file)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, help="finished model with prediction_type='latents'"
    )
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--words", type=int, default=48, help="length of the held-out texts")
    parser.add_argument(
        "--noise_level", type=float, default=0.5, help="t from which texts are denoised"
    )
    add_device_option(parser)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/heads"))
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    TokComPipeline.from_pretrained(args.checkpoint)  # raises for a model without text
    texts = held_out_texts(args)
    files = []
    for seed in args.seeds:
        plain = predict(
            TokComPipeline.from_pretrained(args.checkpoint).to(args.device),
            texts,
            args.noise_level,
            seed,
        )
        file = write_predictions(args.work_dir / f"none-{seed}" / "predictions.json", texts, plain)
        # the noise has a seed, too, so the model without a head varies
        files.append(f"no head={file}")
    for name, head in EXPERIMENTS.items():
        for seed in args.seeds:
            output = args.work_dir / f"{name.split(':')[0]}-{seed}"
            overrides = [
                as_override("data.train", args.train),
                as_override("data.validation", args.validation),
                "stage=head",
                "num_samples=0",
            ]
            overrides += [
                as_override("data.text_column", args.text_column),
                as_override("init_from", args.checkpoint),
                f"seed={seed}",
            ]
            overrides += [f"model.{key}={value}" for key, value in head.items()]
            overrides += [
                f"head.max_steps={args.max_steps}",
                f"head.eval_steps={args.max_steps}",
                "head.batch_size=8",
            ]
            overrides += [
                "head.sequence_length=128",
                "head.learning_rate=3.0e-4",
                "head.warmup_steps=20",
            ]
            overrides += [
                "head.eval_batches=8",
                "report_to=none",
                as_override("output_dir", output),
            ]
            run(load_train_config("tiny", overrides))
            found = predict(
                TokComPipeline.from_pretrained(output).to(args.device),
                texts,
                args.noise_level,
                seed,
            )
            files.append(f"{name}={write_predictions(output / 'predictions.json', texts, found)}")
    print(compare(files))


if __name__ == "__main__":
    main()
