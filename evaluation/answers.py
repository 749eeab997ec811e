"""Answer held-out questions with a dialogue model at several guidance scales, and score them.

    python -m tokcom.evaluation.answers --checkpoint pixel-qa --data qa_held_out.jsonl \
        --guidance 0 1 2 4 --output_dir outputs/answers

Scale 0 is the same model without the prompt, so it has not read the question. Writes one
`predictions_SCALE.json` of {id, prompt, reference, prediction} per scale, and prints their table.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.evaluation.reference import compare
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents, messages_of


def answer(
    pipe: TokComPipeline,
    dialogues: list[list[dict]],
    gen_length: int,
    batch_size: int,
    seed: int,
    **sampling,
) -> list[str]:
    """Answers to dialogues. Short prompts come first, so that batches need little padding."""
    generator = torch.Generator().manual_seed(seed)
    answers = {}
    order = sorted(
        range(len(dialogues)), key=lambda i: sum(len(turn["content"]) for turn in dialogues[i])
    )
    for start in tqdm(range(0, len(order), batch_size), desc=f"answering {sampling}"):
        chosen = order[start : start + batch_size]
        output = pipe([dialogues[i] for i in chosen], gen_length, generator=generator, **sampling)
        answers |= dict(zip(chosen, output.texts))
    return [answers[i] for i in range(len(dialogues))]


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=".")
    parser.add_argument(
        "--data", required=True, help="held-out dialogues, in any form that training reads"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--gen_length", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/answers"))
    args = parser.parse_args(argv)
    records = list(load_documents(args.data, DataConfig(train=args.data), "validation"))[
        : args.samples
    ]
    dialogues = [messages_of(record) for record in records]
    pipe = TokComPipeline.from_pretrained(args.checkpoint).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    for scale in args.guidance:
        sampling = {
            "guidance_scale": scale,
            "num_inference_steps": args.steps,
            "temperature": args.temperature,
        }
        prompts = [turns[:-1] for turns in dialogues]
        texts = answer(pipe, prompts, args.gen_length, args.batch_size, args.seed, **sampling)
        rows = [
            {
                "id": i,
                "prompt": turns[-2]["content"],
                "reference": turns[-1]["content"],
                "prediction": text.strip(),
            }
            for i, (turns, text) in enumerate(zip(dialogues, texts))
        ]
        file = args.output_dir / f"predictions_{scale:g}.json"
        file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        files.append(f"guidance {scale:g}={file}")
    print(compare(files))


if __name__ == "__main__":
    main()
