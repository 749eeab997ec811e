"""Train a small model on your own text, about ten minutes on two CPU cores, and let it write.

    python examples/train_on_your_text.py my_text.txt --output_dir my-model

A .txt, .json, .jsonl or .parquet file, a folder of them, or the name of a dataset on the Hub;
without one it takes the stories that ship with the repository. A tokenizer is trained on the text,
too. Kill it at any time: the same command goes on.
"""

import argparse
import json
from pathlib import Path

import torch

from tokcom import TokComPipeline
from tokcom.cli.errors import report_errors
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
TRAINING = [
    "report_to=none",
    "num_samples=0",
    "codec.max_steps=300",
    "codec.batch_size=16",
    "codec.eval_steps=100",
    "flow.max_steps=900",
    "flow.batch_size=8",
    "flow.eval_steps=150",
    "flow.sequence_length=256",
    "flow.learning_rate=3e-3",
    "flow.muon_learning_rate=1.2e-2",
    # the weights are averaged with a half-life of a twentieth of the run
    "flow.ema_half_life=0.05",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stories = str(ROOT / "sample_data" / "stories_train.jsonl")
    add = parser.add_argument
    add("text", nargs="?", default=stories, help="what to learn (default: the stories shipped)")
    add("--output_dir", default="my-model", help="folder of the model (default: my-model)")
    add(
        "--prompt", default="Once upon a time", help="to continue at the end (default: %(default)s)"
    )
    add("overrides", nargs="*", help="more settings of training, e.g. flow.max_steps=2000")
    args = parser.parse_intermixed_args(argv)
    # as JSON, because a path may hold what YAML would read as more than text
    paths = [f"data.train={json.dumps(args.text)}", f"output_dir={json.dumps(args.output_dir)}"]
    with report_errors():
        output = run(load_train_config("tiny", [*paths, *MODEL, *TRAINING, *args.overrides]))
    pipe = TokComPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        text = pipe(args.prompt, gen_length=48, generator=generator).texts[0]
        print(f"\n{seed}: {args.prompt}{text}")
    print(f"\nThe model is in {output}. Publish it with: tokcom publish {output} USER/NAME")


if __name__ == "__main__":
    main()
