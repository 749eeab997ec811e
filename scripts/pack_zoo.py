"""Make a directory of `zoo/` of a finished run: matrices in bfloat16, no code, a card.

    python scripts/pack_zoo.py emoji-coded zoo/emoji --card emoji_card.md

Matrices are rounded to bfloat16; vectors and buffers, such as the statistics of latents and the
codebook, keep float32. `config.json` says float32, so a model is computed in that.
`tokcom publish zoo/emoji user/name` adds the code.

A model of digits is packed twice, since its card has numbers and samples of the packed weights:

    python scripts/pack_zoo.py digits-run zoo/digits
    python -m tokcom.evaluation.omni --model zoo/digits --digits digits/train.parquet \\
        --digits_test digits/test.parquet --judges judges --output_dir results
    python scripts/pack_zoo.py digits-run zoo/digits --card scripts/cards/digits.md \\
        --results results --data digits/test.parquet --trained "40 minutes on one core of ..."
"""

import argparse
import json
import shutil
from pathlib import Path
from string import Template

import torch
from safetensors.torch import load_file, save_file

from tokcom.cli.errors import report_errors
from tokcom.evaluation.parts import fingerprint
from tokcom.evaluation.report import table
from tokcom.integrity_tokcom import write_checksums
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.processing_tokcom import write_wav
from tokcom.training.card import PRECISION_NAMES, evaluation_section
from tokcom.training.config import STAGES, DataConfig
from tokcom.training.data import load_documents
from tokcom.training.images import picture_grid
from tokcom.training.presets import read_preset
from tokcom.training.streams import OmniDataset

CARD = "README.md"
CODE = "*_tokcom.py"
LEFT = ("run", "__pycache__")  # of a run
SHOWN = 10  # records among the samples
HEARD = 3  # of them are also spoken
# share of digits that a judge recognises, for each given stream and each that is made
DIRECTION_GOAL = 0.9
AGREEMENT_GOAL = 0.8  # share of samples from nothing whose three streams show one digit


def pack(source: Path, target: Path, card: Path | None) -> int:
    """Write `target` from the model directory `source`; returns the number of parameters and
    buffers."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name in LEFT or file.match(CODE) or file.suffix == ".safetensors":
            continue
        # a card that somebody has written is not replaced by that of the run
        if file.name == CARD and (card or (target / CARD).exists()):
            continue
        if file.is_dir():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
        else:
            shutil.copy(file, target / file.name)
    weights = load_file(source / "model.safetensors")
    # a rounding here would shift every latent, where that of a weight averages out
    buffers = {"latent_mean", "latent_std", "codebook", "counts", "sums"}
    packed = {}
    for name, value in weights.items():
        is_matrix = value.ndim >= 2 and name.rpartition(".")[2] not in buffers
        packed[name] = value.to(torch.bfloat16) if is_matrix else value.float()
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        if (target / name).is_file():
            leave_out_code(target / name)
    if card is not None:
        shutil.copy(card, target / CARD)
    write_checksums(target)
    return sum(value.numel() for value in weights.values())


def leave_out_code(file: Path) -> None:
    """Without code there is nothing to map to: whoever reads `auto_map` asks whether to run it."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- the card of a model of digits ----


def write_digits_card(
    template: Path, source: Path, target: Path, results: Path, data: str, trained: str
) -> None:
    """Give `target` a card whose numbers are read: from the run `source`, from the `results` of
    `evaluation.omni`, and from samples for the first records of `data`.

    Raises `ValueError` for results of other weights.
    """
    pipe = TokComOmniPipeline.from_pretrained(target, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    found = json.loads((results / "results.json").read_text(encoding="utf-8"))
    settings = found["settings"]
    if settings["weights"] != fingerprint(pipe.model):
        raise ValueError(
            f"{results} was measured with other weights than those of {target}; run "
            f"tokcom.evaluation.omni with --model {target} first."
        )
    # files by their names alone: a card does not say where they lay
    files = [f"--{name} digits/{Path(settings[name]).name}" for name in ("digits", "digits_test")]
    numbers = ("steps", "samples", "epochs", "seed")
    chosen = [f"--{name} {settings[name]}" for name in numbers if settings[name] is not None]
    command = ["python -m tokcom.evaluation.omni --model zoo/digits", *files, "--judges judges"]
    sections = Template(template.read_text(encoding="utf-8")).substitute(
        trained=f"{_stages(source)} {trained}".strip(),
        command=" ".join([*command, *chosen, "--output_dir results"]),
        goals=_goals(found["parts"]),
        evaluation=evaluation_section(results),
        guidance=f"{pipe.model.config.sampling_guidance_scale:g}",
        samples=write_samples(pipe, target, data),
    )
    header = pipe.model_card("TokCom digits", license="cc-by-sa-4.0", language=["en"])
    (target / CARD).write_text(f"{header}\n{sections}", encoding="utf-8")
    write_checksums(target)


def _stages(source: Path) -> str:
    """What the stages of a run noted about themselves, as a sentence."""
    config = json.loads((source / "run" / "train_config.json").read_text(encoding="utf-8"))
    parts = []
    for stage in STAGES:
        file = source / "run" / stage / "summary.json"
        if not file.is_file():
            continue
        facts = json.loads(file.read_text(encoding="utf-8"))
        precision = PRECISION_NAMES[facts["precision"]]
        parts.append(
            f"{facts['steps']:,} steps of {config[stage]['batch_size']} records for the stage "
            f"{stage} ({precision} on {facts['processes']} x {facts['device']})"
        )
    return f"Seed {config['seed']}; {', '.join(parts)}."


def _goals(parts: dict) -> str:
    """How many directions reach their goal at each guidance scale, and how often all agree."""
    scales: dict[tuple[str, str], list[float]] = {}
    agree = 0.0
    for name, found in parts.items():
        direction, _, scale = name.partition(", guidance ")
        if direction == "from nothing":
            agree = max(agree, found["agree"])
        elif scale and " to " in direction:
            # names of parts are such as "text to image, guidance 2"
            way = "through a caption" if direction.count(" to ") > 1 else "directly"
            scales.setdefault((scale, way), []).append(found["right"])
    sentences = []
    for (scale, way), shares in scales.items():
        reached = sum(share >= DIRECTION_GOAL for share in shares)
        sentences.append(
            f"At guidance {scale}, {reached} of {len(shares)} directions reach the goal of "
            f"{DIRECTION_GOAL:.0%} {way}."
        )
    verdict = "reached" if agree >= AGREEMENT_GOAL else "**missed**"
    goal = f"goal: {AGREEMENT_GOAL:.0%}, {verdict}"
    return " ".join(
        [*sentences, f"From nothing all three agree in {agree:.1%} at the best scale ({goal})."]
    )


def write_samples(pipe: TokComOmniPipeline, target: Path, data: str) -> str:
    """Draw `samples.png` and speak a few captions; returns what was read and heard, as a table."""
    # the fields that the model was trained on
    columns = read_preset("zoo-digits")["data"]["fields"]
    records = load_documents(data, DataConfig(train=data, fields=columns), "train")
    dataset = OmniDataset(records, pipe.tokenizer).fit(pipe.model.codec)
    real = [dataset.content(i) for i in range(SHOWN)]
    texts = [content["text"] for content in real]
    pictures = [content["image"] for content in real]
    sounds = [content["audio"] for content in real]
    # not selected: the first records and one seed
    generator = torch.Generator().manual_seed(0)
    for_text = pipe({"text": texts}, ["image", "audio"], generator=generator)
    for_sound = pipe({"audio": sounds}, "image", generator=generator)
    heard = pipe({"audio": sounds}, "text", generator=generator)
    seen = pipe({"image": pictures}, "text", generator=generator)
    nothing = pipe(batch_size=SHOWN, generator=generator)
    size = pipe.model.codec.streams["image"].config.image_size[::-1]
    rows = [pictures, for_text.images, for_sound.images, nothing.images]
    grid = [[picture.convert("RGB").resize(size) for picture in row] for row in rows]
    picture_grid(grid, 2).save(target / "samples.png")
    spoken = []
    for i in range(HEARD):
        name = f"sample_{i + 1}.wav"
        write_wav(for_text.audios[i], target / name, pipe.sampling_rates["audio"])
        spoken.append(f"[{name}]({name}) for {texts[i]!r}")
    heading = ["", "caption", "read in the picture", "heard in the recording", "text from nothing"]
    cells = zip(range(1, SHOWN + 1), texts, seen.texts, heard.texts, nothing.texts)
    return f"{table(heading, list(map(list, cells)))}\nSpoken: {', '.join(spoken)}."


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="model directory")
    parser.add_argument("target", type=Path, help="directory to write, such as zoo/emoji")
    parser.add_argument(
        "--card", type=Path, help="card (default: that of the run); with --results its template"
    )
    parser.add_argument("--results", type=Path, help="folder that evaluation.omni wrote for target")
    parser.add_argument("--data", help="test records of the samples, with --results")
    parser.add_argument(
        "--trained", default="", help="time and machine of the training, for the card"
    )
    args = parser.parse_args(argv)
    if args.results is None:
        count = pack(args.source, args.target, args.card)
    elif args.card is None or args.data is None:
        raise ValueError(
            "--results needs --card, the card's template, and --data, its test records."
        )
    else:
        count = pack(args.source, args.target, None)
        write_digits_card(
            args.card, args.source, args.target, args.results, args.data, args.trained
        )
    size = sum(file.stat().st_size for file in args.target.rglob("*") if file.is_file())
    print(f"{args.target}: {count:,} numbers in {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
