"""What the latents of the shipped model say: neighbours of a chunk, and a way between sentences.

python examples/read_latents.py
"""

import argparse
import json
from pathlib import Path

import torch

from tokcom import TokComPipeline
from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option

ROOT = Path(__file__).resolve().parents[1]


def chunk_texts(pipe: TokComPipeline, ids: torch.Tensor) -> list[str]:
    """The text of every chunk of ids `(1, T)`."""
    tokenizer = pipe.tokenizer
    rows = ids.view(-1, pipe.chunk_size).tolist()
    # the pad token fills the last chunk and is no text
    return [tokenizer.decode([i for i in row if i < len(tokenizer)]) for row in rows]


def show_neighbours(pipe: TokComPipeline, text: str) -> None:
    """Print the chunks of held-out text whose latents are nearest to those of `text`."""
    lines = (ROOT / "sample_data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    known = pipe.encode(" ".join(json.loads(line)["text"] for line in lines))
    library = known.latents[0]  # (n, C)
    chunks = chunk_texts(pipe, known.sequences)
    asked = pipe.encode(text)
    # latents are standardised, so all channels count alike
    nearest = torch.cdist(asked.latents[0], library).topk(4, largest=False)
    count, channels = library.shape
    print(f"Nearest of {count} chunks of held-out text, by distance in {channels} dimensions:")
    texts = chunk_texts(pipe, asked.sequences)
    for chunk, distances, places in zip(texts, nearest.values.tolist(), nearest.indices.tolist()):
        found = [f"{chunks[i]!r} {distance:.1f}" for i, distance in zip(places, distances)]
        print(f"  {chunk!r:28}", ", ".join(found))


def show_way(pipe: TokComPipeline, first: str, second: str) -> None:
    """Print what latents decode to on the straight line from one text to another."""
    start = pipe.encode(first).latents
    end = pipe.encode(second).latents
    count = min(start.shape[1], end.shape[1])
    print(f"\nFrom one sentence to another, {count} latents:")
    for share in (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0):
        mixed = torch.lerp(start[:, :count], end[:, :count], share)  # (1, count, C)
        print(f"  {share:4.2f} {pipe.decode(mixed).texts[0]!r}")


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    chunks = " said the little girl, and she went into the garden"
    parser.add_argument("--checkpoint", default=str(ROOT), help="model directory or Hub id")
    parser.add_argument("--text", default=chunks, help="whose chunks are looked up")
    parser.add_argument(
        "--first", default="The old king was very sad.", help="where the way begins"
    )
    parser.add_argument("--second", default="The young fox ran away fast.", help="where it ends")
    add_device_option(parser)
    args = parser.parse_args(argv)
    pipe = TokComPipeline.from_pretrained(args.checkpoint).to(args.device)
    show_neighbours(pipe, args.text)
    show_way(pipe, args.first, args.second)


if __name__ == "__main__":
    main()
