"""Measure the gates of a TokCom model on held-out text.

    python evaluate_tokcom.py --checkpoint . --data sample_data/stories_validation.jsonl

Prints a Markdown table and writes the same numbers to `--output_file` as JSON:
reconstruction accuracy at several latent noise levels and with shuffled latents, and the denoiser's cross-entropy per
token at fixed times given the clean text before each block, beside the unigram entropy of the text.
"""

import argparse
import json
import platform
from datetime import date

import numpy as np
import torch
from tqdm.auto import tqdm

from pipeline_tokcom import TokComPipeline
from training.config import DataConfig
from training.data import PackedDataset, load_documents, tokenize_documents

NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
TIMESTEPS = (0.0, 0.2, 0.4, 0.6, 0.8)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the token frequencies of `tokens (T,)`."""
    counts = np.unique(tokens, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@torch.no_grad()
def reconstruction_accuracy(codec, batches: list[torch.Tensor], seed: int) -> dict[str, float]:
    """Share of tokens and of whole chunks that survive encode -> noise -> decode.

    Noise is in standard deviations of the standardised latents; with shuffled latents a decoder that reads them, and
    is not a language model of its own, fails.
    """
    generator = torch.Generator().manual_seed(seed)
    size, results = codec.config.chunk_size, {}

    def accuracy(change) -> tuple[float, float]:
        tokens, chunks, count = 0, 0, 0
        for ids in batches:
            hits = (codec.to_ids(change(codec.encode(ids).latents)) == ids).view(-1, size)
            tokens, chunks, count = tokens + int(hits.sum()), chunks + int(hits.all(-1).sum()), count + len(hits)
        return tokens / (count * size), chunks / count

    for level in tqdm(NOISE_LEVELS, desc="reconstruction"):
        noisy = accuracy(lambda x, s=level: x + s * torch.randn(x.shape, generator=generator).to(x))
        results[f"token_accuracy_noise_{level}"], results[f"chunk_accuracy_noise_{level}"] = noisy
    order = torch.randperm(batches[0].shape[1] // size, generator=generator)
    results["token_accuracy_shuffled_latents"] = accuracy(lambda x: x[:, order])[0]
    return results


@torch.no_grad()
def cross_entropy_at(model, batches: list[torch.Tensor], seed: int) -> dict[str, float]:
    """Nats per token of the denoiser's estimate at fixed t, every block given the clean text before it."""
    results = {}
    for t in tqdm(TIMESTEPS, desc="denoiser"):
        torch.manual_seed(seed)
        outputs = [model(ids, timestep=t) for ids in batches]
        results[f"denoiser_ce_t_{t}"] = float(np.mean([o.ce_loss.item() for o in outputs]))
        results[f"denoiser_mse_t_{t}"] = float(np.mean([o.mse_loss.item() for o in outputs]))
        if t == 0.0:  # the first token of a chunk follows known text, the others follow tokens that are not known yet
            for k, value in enumerate(torch.stack([o.token_losses.mean((0, 1)) for o in outputs]).mean(0).tolist()):
                results[f"denoiser_ce_t_0.0_position_{k}"] = value
    return results


def evaluate(
    checkpoint: str, data: str, max_tokens: int, text_column: str = "text", seed: int = 0, device: str = "cpu"
) -> dict:
    pipe = TokComPipeline.from_pretrained(checkpoint).to(device)
    model = pipe.model.eval()
    model.set_stage("flow")
    tokens = tokenize_documents(
        load_documents(data, DataConfig(text_column=text_column), "train"),
        pipe.tokenizer,
        text_column,
        "held-out text",
    )
    length = min(512, model.config.transformer_config.max_position_embeddings * pipe.chunk_size)
    dataset = PackedDataset(tokens, length, pipe.chunk_size, seed=0, training=False)
    count = max(1, min(len(dataset), max_tokens // length))
    spread = np.linspace(0, len(dataset) - 1, count).round().astype(int)  # windows of every book, not of the first
    rows = torch.stack([dataset[i]["input_ids"] for i in spread.tolist()])
    batches = list(rows[: len(rows) // 8 * 8 or len(rows)].to(device).split(8))  # equal batches: means need no weights
    results = {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "tokens": sum(b.numel() for b in batches),
        "seed": seed,
    }
    results |= {"date": str(date.today()), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    results |= reconstruction_accuracy(model.codec, batches, seed)
    results["unigram_entropy"] = unigram_entropy(tokens)  # of the whole text: few tokens would estimate it too low
    return results | cross_entropy_at(model, batches, seed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=".", help="model directory or Hub id")
    parser.add_argument("--data", default="sample_data/stories_validation.jsonl", help="held-out text")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_tokens", type=int, default=65536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", help="JSON file for the numbers")
    args = parser.parse_args(argv)
    results = evaluate(args.checkpoint, args.data, args.max_tokens, args.text_column, args.seed, args.device)
    print("\n| measure | value |\n|---|---|")
    for name, value in results.items():
        print(f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |")
    if args.output_file:
        with open(args.output_file, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
