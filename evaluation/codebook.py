"""Measure how a quantised codec uses its codes, and show what they stand for.

    tokcom evaluate codebook --model model --data held_out.parquet --output_dir outputs/codebook

Reports for every quantiser the share of codes used, perplexity, entropy and dead codes on held-out
texts, pictures or clips. Draws `usage.png`, and for clips `codes.png`: what the most used codes
decode to.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.report import table
from tokcom.pipeline_base_tokcom import TokComBasePipeline
from tokcom.quantization_tokcom import FiniteScalarQuantizer, code_statistics
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents, tokenize_documents
from tokcom.training.images import picture_grid, read_pictures
from tokcom.training.pipelines import load_pipeline

BATCH = 64  # pictures or clips that are encoded at once


@torch.no_grad()
def held_out_codes(pipe: TokComBasePipeline, args: argparse.Namespace) -> torch.Tensor:
    """Codes `(M, R)` of the data. Raises `ValueError` for a codec without a quantiser."""
    if getattr(pipe.model.codec, "quantizer", None) is None:
        raise ValueError(
            f"{args.model} has no quantiser, so there are no codes to count; train one with "
            "`quantizer=vq` or `fsq`, or of several streams a model of one."
        )
    # by what the codec reads, whatever it is called
    read = {"input_ids": codes_of_texts, "pixel_values": codes_of_pictures}
    return read[pipe.model.config.codec_config.input_name](pipe, args)


def codes_of_texts(pipe: TokComBasePipeline, args: argparse.Namespace) -> torch.Tensor:
    model = pipe.model
    size = model.config.codec_config.chunk_size
    documents = load_documents(args.data, DataConfig(text_column=args.text_column), "train")
    tokens = tokenize_documents(documents, pipe.tokenizer, args.text_column, "held-out text")
    whole = len(tokens) // size * size
    chunks = torch.from_numpy(tokens)[:whole].long().view(-1, size)  # (M, K)
    # as many chunks as the codes of `limit` pictures, about
    batches = chunks[: args.limit * BATCH].split(16 * BATCH)
    return torch.cat(
        [
            model.encode(part.to(model.device)).codes.flatten(0, 1).cpu()
            for part in tqdm(batches, desc="encoding")
        ]
    )


def codes_of_pictures(pipe: TokComBasePipeline, args: argparse.Namespace) -> torch.Tensor:
    """Codes of pictures or clips."""
    model = pipe.model
    data = read_pictures(
        args.data,
        model.config.codec_config,
        args.image_column,
        limit=args.limit,
        autoencoder=getattr(pipe, "vae", None),
    )
    parts = []
    for start in tqdm(range(0, len(data), BATCH), desc="encoding"):
        pixels = torch.stack(
            [data[i]["pixel_values"] for i in range(start, min(start + BATCH, len(data)))]
        )
        codes = model.encode(pixel_values=pixels.to(model.device)).codes  # (B, N, R)
        parts.append(codes.flatten(0, 1).cpu())
    return torch.cat(parts)


def sizes(pipe: TokComBasePipeline, levels: int) -> list[int]:
    """Number of possible codes in each of the `levels` columns of codes."""
    quantizer = pipe.model.codec.quantizer
    if isinstance(quantizer, FiniteScalarQuantizer):
        return [quantizer.num_codes]
    # each level of a residual quantiser has a codebook of the same size
    return [quantizer.num_codes] * levels


@torch.no_grad()
def show_codes(
    pipe: TokComBasePipeline,
    codes: torch.Tensor,
    column: tuple[torch.Tensor, torch.Tensor],
    file: Path,
    shown: int = 256,
) -> None:
    """Draw the patches that the most used codes of the first level decode to, most used first."""
    codec = pipe.model.codec
    values, counts = column
    best = values[counts.argsort(descending=True)[:shown]]
    # the other levels at their most frequent code
    rest = codes.mode(0).values[None, 1:].expand(len(best), -1)
    # (shown, 1, C): clips of one patch
    chosen = torch.cat((best[:, None], rest), dim=1)[:, None]
    latents = codec.from_codes(chosen.to(pipe.model.device))
    size = codec.config.patch_size
    # (shown, 3, patch, patch)
    patches = codec.decode(latents, height=size, width=size).pixel_values[:, :3, 0]
    images = pipe.image_processor.postprocess(patches)
    rows = [images[i : i + 16] for i in range(0, len(images), 16)]
    # patches are enlarged to about 32 pixels
    picture_grid(rows, scale=max(1, 32 // size)).save(file)


def plot_usage(columns: list[tuple[torch.Tensor, torch.Tensor]], file: Path) -> None:
    """Plot how often each code of each level is used, most used first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for level, (_, counts) in enumerate(columns):
        axes.plot(counts.sort(descending=True).values.numpy(), label=f"level {level + 1}")
    axes.set(xlabel="code, most used first", ylabel="times used", yscale="symlog")
    axes.legend()
    figure.savefig(file, dpi=120)


@report_errors()
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        prog="tokcom evaluate codebook",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="held-out texts, pictures or clips")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/codebook"))
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--text_column", default="text")
    parser.add_argument(
        "--limit", type=int, default=1024, help="pictures or clips, or 64 chunks of text each"
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(args.model).to(args.device)
    codes = held_out_codes(pipe, args)
    found = []
    columns = []
    for level, size in enumerate(sizes(pipe, codes.shape[1])):
        found.append({"level": level + 1, "codes": size, **code_statistics(codes[:, level], size)})
        columns.append(codes[:, level].unique(return_counts=True))
    plot_usage(columns, args.output_dir / "usage.png")
    # other codecs decode no patch on its own, and of an autoencoder's latents one is no picture
    if pipe.model.config.codec_config.modality == "video" and pipe.vae is None:
        show_codes(pipe, codes, columns[0], args.output_dir / "codes.png")
    text = table(list(found[0]), [list(row.values()) for row in found]) + "\n"
    facts = {"model": args.model, "data": args.data, "latents": len(codes), "levels": found}
    (args.output_dir / "codebook.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="utf-8"
    )
    (args.output_dir / "codebook.md").write_text(text, encoding="utf-8")
    print(text)
    return facts


if __name__ == "__main__":
    main()
