"""Train a small model on your own text, about ten minutes on two CPU cores, and let it write.

    python examples/train_on_your_text.py my_text.txt --output_dir my-model

A .txt, .json, .jsonl or .parquet file, a folder of them, or the name of a dataset on the Hub;
without one it takes the stories that ship with the repository. A tokenizer is trained on the text,
too. Kill it at any time: the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.train_accelerate import run
from tokcom.training.config import load_train_config

ROOT = Path(__file__).resolve().parents[1]
# the shape of `tiny`, half as wide: token probabilities, one latent at a time, tokens in turn
MODEL = [
    "tokenizer_vocab_size=1024",
    "model.codec_config.embedding_size=64",
    "model.codec_config.hidden_size=128",
    "model.codec_config.intermediate_size=384",
    "model.transformer_config.hidden_size=160",
    "model.transformer_config.intermediate_size=432",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "text", nargs="?", default=str(ROOT / "sample_data" / "stories_train.jsonl")
    )
    parser.add_argument("--output_dir", default="my-model")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="more settings of train_accelerate.py, e.g. flow.max_steps=2000",
    )
    args = parser.parse_intermixed_args(argv)
    settings = [
        f"data.train={json.dumps(args.text)}",
        f"output_dir={json.dumps(args.output_dir)}",
        "report_to=none",
        "num_samples=0",
        *MODEL,
    ]
    settings += ["codec.max_steps=300", "codec.batch_size=16", "codec.eval_steps=100"]
    settings += [
        "flow.max_steps=900",
        "flow.batch_size=8",
        "flow.eval_steps=150",
        "flow.sequence_length=256",
    ]
    settings += [
        "flow.learning_rate=3e-3",
        "flow.muon_learning_rate=1.2e-2",
        "flow.ema_half_life=0.05",
    ]
    try:
        output = run(load_train_config("tiny", settings + args.overrides))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    pipe = TokComPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        print(
            f"\n{seed}: {args.prompt}{pipe(args.prompt, gen_length=48, generator=generator).texts[0]}"
        )
    print(f"\nThe model lies in {output}. Give it away with: tokcom publish {output} USER/NAME")


if __name__ == "__main__":
    main()
