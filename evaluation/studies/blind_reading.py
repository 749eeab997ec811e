"""Prepare stories of several authors for blind readers, and count what the readers answered.

    python -m tokcom.evaluation.studies.blind_reading write --output_dir reading \
        --tokcom shipped=. --causal peer=peer teacher=stories15M --starts_with_bos teacher
    python -m tokcom.evaluation.studies.blind_reading count --output_dir reading

`write` lets every author continue the same prompt, shuffles the stories into `stories.txt` and
keeps `key.json`, which readers must not see. A reader writes `answers*.json`: for each number of a
story `{"ends": 1, "names": 1, "pronouns": 1, "happens": 1, "sense": 1 to 5}`. `count` prints the
mean of each author.

- *ends*: the story comes to an ending.
- *names*: every character keeps its name and kind.
- *pronouns*: pronouns and roles fit those they stand for.
- *happens*: something is wanted or goes wrong, something is done about it, with a result.
- *sense*: 1 word salad, 2 sentences without a thread, 3 a thread with clear breaks, 4 one slip, 5
  none.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.judges import load_language_model
from tokcom.evaluation.report import table
from tokcom.evaluation.samplers import AutoregressiveSampler
from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.training.tokens import load_tokenizer

QUESTIONS = ("ends", "names", "pronouns", "happens", "sense")
ROWS = 50  # stories written at once
LENGTH = 256  # tokens


def tokcom_stories(path: str, args: argparse.Namespace) -> list[str]:
    pipe = TokComPipeline.from_pretrained(path).to(args.device)
    stories = []
    for start in range(0, args.stories, ROWS):
        seeds = range(start, min(start + ROWS, args.stories))
        texts = pipe(
            [args.prompt] * len(seeds),
            gen_length=LENGTH,
            temperature=args.temperature,
            # a seed for each story, so that a single one can be written again
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).texts
        stories += [args.prompt + text for text in texts]
    return stories


def causal_stories(path: str, starts_with_bos: bool, args: argparse.Namespace) -> list[str]:
    tokenizer = load_tokenizer(path)
    model = load_language_model(path, args.device)
    prompt = tokenizer(args.prompt, add_special_tokens=False)["input_ids"]
    eos = model.config.eos_token_id
    ends = {eos}
    if starts_with_bos:
        prompt = [model.config.bos_token_id, *prompt]
        ends.add(model.config.bos_token_id)
    sampler = AutoregressiveSampler(model, eos, args.temperature, batch_size=ROWS)
    stories = []
    for row in sampler.sample(np.array([prompt] * args.stories), LENGTH, seed=0).tolist():
        # the sampler writes on after the end of a text
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        story = tokenizer.decode([*prompt, *row[:length]], skip_special_tokens=True)
        stories.append(story.strip())
    return stories


def write(args: argparse.Namespace) -> None:
    """Let every author write, and shuffle what they wrote."""
    stories = []
    for name, path in (pair.split("=", 1) for pair in args.tokcom):
        stories += [(name, text) for text in tokcom_stories(path, args)]
    for name, path in (pair.split("=", 1) for pair in args.causal):
        texts = causal_stories(path, name in args.starts_with_bos, args)
        stories += [(name, text) for text in texts]
    # readers must not see from the order who wrote what
    random.Random(args.seed).shuffle(stories)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shown = "".join(f"=== {number}\n{text}\n\n" for number, (_, text) in enumerate(stories))
    (args.output_dir / "stories.txt").write_text(shown, encoding="utf-8")
    key = {number: name for number, (name, _) in enumerate(stories)}
    (args.output_dir / "key.json").write_text(json.dumps(key), encoding="utf-8")


def count(args: argparse.Namespace) -> None:
    """Print the means of each author, and the standard error of `sense`."""
    key = json.loads((args.output_dir / "key.json").read_text(encoding="utf-8"))
    answers = {}
    for file in sorted(args.output_dir.glob("answers*.json")):
        # each reader answers for numbers of their own
        answers |= json.loads(file.read_text(encoding="utf-8"))
    if not answers:
        raise FileNotFoundError(
            f"{args.output_dir} holds no answers*.json; let someone read first."
        )
    rows = []
    for name in sorted(set(key.values())):
        found = [answers[number] for number in answers if key[number] == name]
        means = [float(np.mean([answer[q] for answer in found])) for q in QUESTIONS]
        # of the mean, over stories; the other questions are shares, whose error follows from them
        error = float(np.std([answer["sense"] for answer in found], ddof=1) / len(found) ** 0.5)
        rows.append([name, len(found), *means, error])
    print(table(["author", "stories", *QUESTIONS, "error of sense"], rows))


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("write", "count"))
    parser.add_argument("--output_dir", type=Path, required=True)
    pairs = {"nargs": "*", "default": [], "metavar": "NAME=DIR"}
    parser.add_argument("--tokcom", **pairs, help="authors that are TokCom models")
    parser.add_argument("--causal", **pairs, help="authors that are causal language models")
    parser.add_argument(
        "--starts_with_bos",
        nargs="*",
        default=[],
        metavar="NAME",
        help="causal authors whose texts start, and may end, with BOS",
    )
    parser.add_argument("--prompt", default="Once upon a time", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.7, help="default: %(default)s")
    parser.add_argument(
        "--stories", type=int, default=100, help="of each author (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    add_device_option(parser)
    args = parser.parse_args(argv)
    {"write": write, "count": count}[args.action](args)


if __name__ == "__main__":
    main()
