"""Answer held-out questions with a dialogue model at several guidance scales, and score them.

    python -m tokcom.evaluation.answers --checkpoint pixel-qa --data qa_held_out.jsonl \
        --guidance 0 1 2 4 --output_dir outputs/answers

Scale 0 is the same model without the prompt's whole chunks: it reads at most the K - 1 tokens behind
them. All answers of one prompt are its references. Where prompts have several, two controls stand in the table: one of the
references against the others, and a reference of another prompt. Where prompts are meanings such as
`name[Cotto], area[riverside]`, it says which share of their slots is named.

Writes one `predictions_SCALE.json` of {id, prompt, reference or references, prediction} per scale
as soon as it is done, `results.json` and `results.md`. A run that was stopped goes on where it was.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.parts import Parts, fingerprint
from tokcom.evaluation.reference import reference_metrics
from tokcom.evaluation.report import table
from tokcom.evaluation.slots import slots_named
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
    # back in the order of the questions
    return [answers[i] for i in range(len(dialogues))]


def read_questions(data: str, samples: int) -> tuple[list[list[dict]], list[list[str]]]:
    """The first `samples` different prompts of dialogues, and all answers of each."""
    answers = defaultdict(list)
    prompts = {}
    for record in load_documents(data, DataConfig(train=data), "validation"):
        *before, last = messages_of(record)
        # dictionaries cannot be keys; equal dialogues have equal JSON
        key = json.dumps(before)
        prompts[key] = before
        answers[key].append(last["content"])
    kept = list(prompts)[:samples]
    return [prompts[key] for key in kept], [answers[key] for key in kept]


def score(prompts: list[str], texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """The measures of `reference_metrics`, and the share of slots named if prompts are meanings."""
    found = reference_metrics(texts, references)
    named = slots_named(prompts, texts)
    return found if named is None else {**found, "slots named": named}


def controls(
    prompts: list[str], references: list[list[str]], seed: int
) -> dict[str, dict[str, float]]:
    """Scores of people, where prompts have several references: one reference against the others,
    and a reference of another prompt."""
    rng = random.Random(seed)
    several = [i for i, row in enumerate(references) if len(row) > 1]
    if not several or len(references) < 2:
        return {}
    asked = [prompts[i] for i in several]
    drawn = [rng.randrange(len(references[i])) for i in several]
    one = [references[i][j] for i, j in zip(several, drawn)]
    # without itself, against which it would score perfectly
    others = [references[i][:j] + references[i][j + 1 :] for i, j in zip(several, drawn)]
    # fluent text of the right style on the wrong subject: what a score owes to style alone
    away = [rng.choice([j for j in range(len(references)) if j != i]) for i in several]
    elsewhere = [rng.choice(references[j]) for j in away]
    return {
        "a reference against the others": score(asked, one, others),
        "a reference of another prompt": score(asked, elsewhere, [references[i] for i in several]),
    }


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
    parser.add_argument("--samples", type=int, default=1000, help="prompts (default: 1000)")
    parser.add_argument("--gen_length", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    add_device_option(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/answers"))
    args = parser.parse_args(argv)
    prompts, references = read_questions(args.data, args.samples)
    pipe = TokComPipeline.from_pretrained(args.checkpoint).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    asked = [turns[-1]["content"] for turns in prompts]
    settings = {k: v for k, v in vars(args).items() if k not in ("guidance", "output_dir")}
    # part of the settings, so that another model or other questions are measured anew
    settings |= {"weights": fingerprint(pipe.model), "prompts": prompts, "references": references}
    parts = Parts(args.output_dir / "results.json", settings)

    def measure(scale: float) -> dict[str, float]:
        options = {"num_inference_steps": args.steps, "temperature": args.temperature}
        options |= {"guidance_scale": scale, "top_p": args.top_p}
        # the same seed at every scale: answers differ by guidance, not by luck
        texts = answer(pipe, prompts, args.gen_length, args.batch_size, args.seed, **options)
        texts = [text.strip() for text in texts]
        rows = []
        for i, (prompt, given, text) in enumerate(zip(asked, references, texts)):
            known = {"reference": given[0]} if len(given) == 1 else {"references": given}
            rows.append({"id": i, "prompt": prompt, **known, "prediction": text})
        file = args.output_dir / f"predictions_{scale:g}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return score(asked, texts, references)

    rows = dict(parts.measure("controls", lambda: controls(asked, references, args.seed)))
    for scale in args.guidance:
        name = f"guidance {scale:g}"
        # the default binds this turn's scale; a plain lambda would see the last one
        rows[name] = parts.measure(name, lambda scale=scale: measure(scale))
    columns = list(rows[name])
    report = table(
        ["answers", *columns], [[n, *(row[c] for c in columns)] for n, row in rows.items()]
    )
    (args.output_dir / "results.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
