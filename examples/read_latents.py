"""What the latents of the shipped model say: neighbours of a chunk, and the way from one sentence
to another.

python examples/read_latents.py
"""

import argparse
import json
from pathlib import Path

import torch

from tokcom.pipeline_tokcom import TokComPipeline

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ROOT))
    parser.add_argument(
        "--text",
        default=" said the little girl, and she went into the garden",
        help="chunks to look up",
    )
    parser.add_argument("--first", default="The old king was very sad.")
    parser.add_argument("--second", default="The young fox ran away fast.")
    args = parser.parse_args(argv)
    pipe = TokComPipeline.from_pretrained(args.checkpoint)
    size = pipe.chunk_size

    def texts_of(ids: torch.Tensor) -> list[str]:
        return [
            pipe.tokenizer.decode([i for i in row if i < len(pipe.tokenizer)])
            for row in ids.view(-1, size).tolist()
        ]

    stories = [
        json.loads(line)["text"]
        for line in (ROOT / "sample_data" / "held_out.jsonl").read_text().splitlines()
    ]
    known = pipe.encode(" ".join(stories))
    library, chunks = known.latents[0], texts_of(known.sequences)
    asked = pipe.encode(args.text)
    nearest = torch.cdist(asked.latents[0], library).topk(4, largest=False)
    print(
        f"Nearest of {len(library)} chunks of held-out text, by distance in {library.shape[1]} dimensions:"
    )
    for text, distances, places in zip(texts_of(asked.sequences), *(x.tolist() for x in nearest)):
        print(
            f"  {text!r:28}", ", ".join(f"{chunks[p]!r} {d:.1f}" for d, p in zip(distances, places))
        )

    first, second = (pipe.encode(text) for text in (args.first, args.second))
    count = min(first.latents.shape[1], second.latents.shape[1])
    print(f"\nFrom one sentence to another, {count} latents:")
    for share in (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0):
        mixed = torch.lerp(first.latents[:, :count], second.latents[:, :count], share)
        print(f"  {share:4.2f} {pipe.decode(mixed).texts[0]!r}")


if __name__ == "__main__":
    main()
