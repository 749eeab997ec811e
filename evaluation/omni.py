"""Evaluate an omni model of text, picture and sound in all six directions, and its text beside a
text-only model.

    python -m tokcom.evaluation.omni --model model --digits digits/train.parquet \
        --digits_test digits/test.parquet --judges judges --output_dir results

    python -m tokcom.evaluation.omni --model model --pictures icons/train.parquet \
        --pictures_test icons/test.parquet --digits digits/train.parquet \
        --digits_test digits/test.parquet --text_model text --judge judge --output_dir results

Pictures have columns `image` and `caption`; digits `image`, `caption` and `audio`, with one caption
per class.

- Digits, six directions: classifiers of real pictures and recordings, trained on the training part
  alone, say which class a generated picture or sound is; a text counts if it is the caption. If a
  class has one picture only, the nearest of these pictures is its class. *Real data* is what the
  classifiers find of held-out pictures and recordings. Baseline: the class of the nearest training
  record. `--judges` keeps the classifiers, so that they can be trained before any model.
- Digits, from nothing: how often the text, the picture and the sound that are made in turn
  are of one class.
- Sounds: distances to the nearest training recording and to each other, compared with those of
  held-out recordings.
- Pictures, text to picture: a small contrastive model, trained on real pairs, looks for the caption
  of each picture among 20. Baseline: the training picture whose caption shares most words.
- Pictures, picture to text: exact nouns (the words before the comma) and BLEU. Baseline: the
  caption of the nearest training picture. *Real data* are the captions after encoding and decoding.

Writes `results.json` after each part, `results.md`, `pictures.png`, `digits_*.png`, `sounds.png`
and a .wav of each class. A run that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import sacrebleu
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import trange

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.classifier import Classifier
from tokcom.evaluation.digits import BATCH, measure_digits
from tokcom.evaluation.judges import TokenJudge, check_tokens
from tokcom.evaluation.parts import Parts, fingerprint
from tokcom.evaluation.report import table
from tokcom.pipeline_media_tokcom import TokComOmniPipeline
from tokcom.processing_tokcom import (
    TokComAudioProcessor,
    TokComImageProcessor,
    vocabulary_size,
)
from tokcom.training.config import DataConfig
from tokcom.training.data import load_documents
from tokcom.training.images import picture_grid
from tokcom.training.streams import OmniDataset

CANDIDATES = 20  # captions among which that of a picture is looked for


class Pairs(nn.Module):
    """A small contrastive model: unit vectors of pictures and captions that belong together are
    close (Radford et al. 2021)."""

    def __init__(self, vocab_size: int, size: int = 64):
        super().__init__()
        self.picture = Classifier([size])
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.words = nn.EmbeddingBag(vocab_size, 128)
        self.text = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, size))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors `(B, size)` of pictures `(B, 3, H, W)`."""
        return F.normalize(self.picture(pixels)[0], dim=-1)

    def read(self, rows: list[list[int]]) -> torch.Tensor:
        """Vectors `(B, size)` of captions as rows of ids."""
        device = self.scale.device
        offsets = torch.tensor([0, *map(len, rows[:-1])], device=device).cumsum(0)
        words = self.words(torch.tensor(sum(rows, []), device=device), offsets)
        return F.normalize(self.text(words), dim=-1)

    def score(self, pixels: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
        """Similarity of every picture with every caption, `(B, B)`."""
        return self.scale.exp() * self.see(pixels.to(self.scale.device)) @ self.read(rows).T


def train_pairs(
    pixels: torch.Tensor,
    rows: list[list[int]],
    vocab_size: int,
    steps: int,
    seed: int,
    device: str = "cpu",
) -> Pairs:
    torch.manual_seed(seed)
    pairs = Pairs(vocab_size).train().to(device)
    labels = torch.arange(128, device=device)
    optimizer = torch.optim.AdamW(pairs.parameters(), 2e-3, weight_decay=0.05)
    for _ in trange(steps, desc="contrastive model", leave=False):
        chosen = torch.randint(0, len(rows), (128,))
        # small shifts, so that the model cannot learn pictures by heart
        shifted = pixels[chosen].roll(tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        scores = pairs.score(shifted, [rows[i] for i in chosen])
        loss = F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pairs.eval()


@torch.no_grad()
def retrieved(pairs: Pairs, pixels: torch.Tensor, rows: list[list[int]], seed: int) -> float:
    """Share of pictures whose caption is found among `CANDIDATES` captions of other pictures."""
    scores = pairs.score(pixels, rows).cpu()
    rng = np.random.default_rng(seed)
    hits = []
    for i in range(len(rows)):
        others = [j for j in rng.permutation(len(rows)) if rows[j] != rows[i]][: CANDIDATES - 1]
        hits.append(bool(scores[i, i] > scores[i, others].max()))
    return float(np.mean(hits))


def noun(caption: str) -> str:
    """The noun of a caption: without its fixed beginning and the text after a comma."""
    return caption.removeprefix("an emoji of ").split(",")[0].split(":")[0].strip().lower()


def copied(captions: list[str], known: list[str]) -> list[int]:
    """For each caption, the index of the caption in `known` that shares the most words."""
    sets = [set(text.lower().split()) for text in known]
    return [
        int(np.argmax([len(words & other) / len(words | other) for other in sets]))
        for words in (set(text.lower().split()) for text in captions)
    ]


class Study:
    """The model and the real records. `generate` runs in batches with one seed."""

    def __init__(self, pipe: TokComOmniPipeline, args: argparse.Namespace):
        self.pipe = pipe
        self.args = args
        self.look = TokComImageProcessor(pipe.model.codec.streams["image"].config.image_size)
        wanted = {"pictures": ("text", "image"), "digits": ("text", "image", "audio")}
        self.data = {
            name: self._load(getattr(args, name), wanted[name.removesuffix("_test")])
            for name in ("pictures", "pictures_test", "digits", "digits_test")
            if getattr(args, name) is not None
        }
        test = self.data["digits_test"]
        self.data["digits_test"] = {name: part[: args.samples] for name, part in test.items()}
        unknown = set(self.data["digits_test"]["caption"]) - set(self.data["digits"]["caption"])
        if unknown:
            raise ValueError(
                f"{args.digits_test} has captions that {args.digits} lacks, such as "
                f"{min(unknown)!r}; every class needs training recordings."
            )
        self.processor = TokComAudioProcessor(pipe.model.codec.streams["audio"].config)

    def fingerprint(self) -> str:
        """A hash of the records, which may change in a file that keeps its name."""
        digest = hashlib.sha256()
        for name, part in self.data.items():
            digest.update(json.dumps([name, part["caption"]]).encode())
            digest.update(part["pixels"].numpy().tobytes())
            for sound in part.get("audio", []):
                digest.update(np.ascontiguousarray(sound).tobytes())
        return digest.hexdigest()[:16]

    def _load(self, source: str, wanted: tuple[str, ...]) -> dict[str, list]:
        """The records that have all `wanted` streams."""
        fields = {name: {"text": "caption"}.get(name, name) for name in wanted}
        records = load_documents(source, DataConfig(train=source, fields=fields), "train")
        dataset = OmniDataset(records, self.pipe.tokenizer).fit(self.pipe.model.codec)
        contents = {i: dataset.content(i) for i in range(len(dataset))}
        rows = [i for i, content in contents.items() if set(content) == set(wanted)]
        if not rows:
            raise ValueError(f"{source} has no record with all of {wanted}.")
        found = {name: [contents[i][name] for i in rows] for name in wanted}
        # the whole caption; `text` is cut to the length that the model reads
        found["caption"] = [records[i]["text"] for i in rows]
        return found | {"pixels": self.pixels(found["image"])}

    def generate(
        self, stream: str, given: dict[str, list], scale: float = 1.0, first: tuple[str, ...] = ()
    ) -> list:
        """Generate `stream` from the streams `given`, after the streams `first`, at guidance
        `scale`."""
        generator = torch.Generator().manual_seed(self.args.seed)
        made = []
        count = len(next(iter(given.values())))
        for start in trange(0, count, BATCH, desc=f"{'+'.join(given)} to {stream}", leave=False):
            part = {name: values[start : start + BATCH] for name, values in given.items()}
            steps = self.args.steps
            if stream == "text" and self.args.text_steps is not None:
                steps = self.args.text_steps
            options = {
                "num_inference_steps": steps,
                "guidance_scale": scale,
                "generator": generator,
            }
            options["num_candidates"] = self.args.num_candidates if stream == "text" else 1
            made += self.pipe(part, [*first, stream], **options).streams[stream]
        return made

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return self.look(images)["pixel_values"]

    def sounds(self, sounds: list[np.ndarray]) -> torch.Tensor:
        """Sounds as the classifier sees them, `(M, 3, bands, F)`."""
        return self.processor(sounds)["input_features"][:, None].expand(-1, 3, -1, -1) / 2 + 1


def measure_pictures(study: Study) -> dict:
    """Measure text to picture and picture to text on held-out pictures."""
    args = study.args
    train = study.data["pictures"]
    test = study.data["pictures_test"]
    tokenizer = study.pipe.tokenizer
    rows = {
        name: tokenizer(part["caption"], add_special_tokens=False)["input_ids"]
        for name, part in (("train", train), ("test", test))
    }
    pairs = train_pairs(
        train["pixels"],
        rows["train"],
        vocabulary_size(tokenizer),
        args.contrastive_steps,
        args.seed,
        args.device,
    )
    found = {
        "direction": "text to picture",
        "measure": f"caption found among {CANDIDATES}",
        "chance": 1 / CANDIDATES,
    }
    found["nearest training record"] = retrieved(
        pairs, train["pixels"][copied(test["caption"], train["caption"])], rows["test"], args.seed
    )
    found["real data"] = retrieved(pairs, test["pixels"], rows["test"], args.seed)
    drawn = {}
    written = {}
    for scale in args.guidance_scales:
        drawn[scale] = study.generate("image", {"text": test["text"]}, scale)
        written[scale] = study.generate("text", {"image": test["image"]}, scale)
        found[f"guidance {scale:g}"] = retrieved(
            pairs, study.pixels(drawn[scale]), rows["test"], args.seed
        )
    distance = torch.cdist(test["pixels"].flatten(1), train["pixels"].flatten(1))
    nearest = [train["caption"][i] for i in distance.argmin(1)]
    named, bleu = (
        {"direction": "picture to text", "measure": name} for name in ("noun exact", "BLEU")
    )
    kinds = (
        ("nearest training record", nearest),
        ("real data", study.pipe.reconstruct({"text": test["text"]}).texts),
    )
    for name, texts in (*kinds, *((f"guidance {s:g}", t) for s, t in written.items())):
        named[name] = float(np.mean([noun(a) == noun(b) for a, b in zip(texts, test["caption"])]))
        bleu[name] = sacrebleu.corpus_bleu(texts, [test["caption"]]).score
    first = min(args.guidance_scales)
    size = study.pipe.model.codec.streams["image"].config.image_size
    shown = [test["image"][:12], drawn[first][:12], drawn[max(args.guidance_scales)][:12]]
    shown = [[image.convert("RGB").resize(size[::-1]) for image in row] for row in shown]
    picture_grid(shown, 2).save(args.output_dir / "pictures.png")
    captions = [list(row) for row in zip(test["caption"][:12], written[first][:12], nearest[:12])]
    return {"directions": [found, named, bleu], "captions": captions}


def measure_text(
    pipes: dict[str, TokComOmniPipeline],
    judge: TokenJudge,
    real: list[str],
    args: argparse.Namespace,
) -> list[dict]:
    """Judge unconditional texts of the joint and the text-only model, as many as there are `real`
    ones.

    The judge has their tokenizer. Entropy is that of the tokens of all texts together.
    """
    rows = []
    tokenizer = next(iter(pipes.values())).tokenizer
    for name, pipe in {"real": None, **pipes}.items():
        texts = real if pipe is None else []
        generator = torch.Generator().manual_seed(args.seed)
        while len(texts) < len(real):
            texts = texts + pipe({}, "text", BATCH, args.steps, generator=generator).texts
        texts = texts[: len(real)]
        eos = tokenizer.eos_token_id
        ids = [[*row, eos] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        nats = np.concatenate([judge.nll(np.array([[eos, *row]]))[0, 1:] for row in ids])
        counts = np.unique(np.concatenate(ids), return_counts=True)[1]
        shares = counts / counts.sum()
        row = {
            "texts": name,
            "judge NLL a token": float(nats.mean()),
            "entropy": float(-(shares * np.log(shares)).sum()),
        }
        row |= {"tokens a text": len(nats) / len(ids), "distinct": len(set(texts)) / len(texts)}
        rows.append(row | {"samples": texts[:8]})
    return rows


def report(facts: dict) -> str:
    columns = ["direction", "measure", "chance", "nearest training record", "real data"]
    columns += [key for key in facts["directions"][0] if key.startswith("guidance")]
    text = "## Directions\n\n" + table(
        columns, [[row.get(key) for key in columns] for row in facts["directions"]]
    )
    if facts.get("captions"):
        text += "\n## Captions\n\n" + table(["real", "model", "nearest"], facts["captions"])
    for name in ("sounds", "from nothing", "text"):
        if facts.get(name):
            columns = [key for key in facts[name][0] if key != "samples"]
            text += f"\n## {name.capitalize()}\n\n" + table(
                columns, [[row[key] for key in columns] for row in facts[name]]
            )
    for row in facts.get("text", []):
        text += f"\n- {row['texts']}: {', '.join(map(repr, row['samples']))}"
    return text + "\n"


def load(
    args: argparse.Namespace,
) -> tuple[Study, dict[str, TokComOmniPipeline], TokenJudge | None]:
    """The study, the models whose texts are judged, and the judge.

    Raises `ValueError` if their streams or tokenizers do not fit.
    """
    names = {"joint model": args.model, "text alone": args.text_model}
    pipes = {
        name: TokComOmniPipeline.from_pretrained(path).to(args.device)
        for name, path in names.items()
        if path
    }
    judge = None
    for pipe, streams in zip(pipes.values(), ({"audio", "image", "text"}, {"text"})):
        if not streams <= set(pipe.model.codec.names):
            raise ValueError(
                f"{args.model}, {args.text_model}: the streams {sorted(streams)} are needed, but "
                "one of the models lacks them."
            )
        pipe.set_progress_bar_config(disable=True)
    if args.judge:
        for pipe in pipes.values():
            check_tokens(args.judge, pipe.tokenizer)
        judge = TokenJudge(args.judge, pipe.tokenizer, args.device)
    elif args.text_model:
        raise ValueError(f"--text_model ({args.text_model}) needs a --judge to compare the texts.")
    return Study(pipes["joint model"], args), pipes, judge


@report_errors()
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--digits", required=True)
    parser.add_argument("--digits_test", required=True)
    parser.add_argument("--pictures", help="with --pictures_test; none by default")
    parser.add_argument("--pictures_test")
    parser.add_argument("--judges", type=Path, help="folder that keeps the classifiers of digits")
    parser.add_argument("--text_model", help="model of the text stream alone")
    parser.add_argument(
        "--judge", help="autoregressive judge of captions with the model's tokenizer"
    )
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own by default")
    parser.add_argument("--text_steps", type=int, help="of texts alone; as --steps by default")
    parser.add_argument(
        "--num_candidates",
        type=int,
        default=1,
        help="texts of which the one most like the others counts",
    )
    parser.add_argument("--samples", type=int, help="test records of digits (default: all)")
    parser.add_argument("--contrastive_steps", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=10, help="of the classifier of sounds")
    parser.add_argument("--seed", type=int, default=0)
    add_device_option(parser)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if (args.pictures is None) != (args.pictures_test is None):
        raise ValueError("--pictures and --pictures_test come together; give both or none.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "guidance_scales"}
    study, pipes, judge = load(args)
    settings["weights"] = {name: fingerprint(pipe.model) for name, pipe in pipes.items()}
    settings["judge_weights"] = None if judge is None else fingerprint(judge.model)
    settings["records"] = study.fingerprint()
    parts = Parts(args.output_dir / "results.json", settings)
    facts = measure_digits(study, parts)
    if args.pictures is not None:
        scales = ", ".join(f"{scale:g}" for scale in args.guidance_scales)
        found = parts.measure(f"pictures, guidance {scales}", lambda: measure_pictures(study))
        facts["directions"] = found["directions"] + facts["directions"]
        facts["captions"] = found["captions"]
    if judge is not None:
        real = study.data.get("pictures_test", study.data["digits_test"])["text"]
        facts["text"] = parts.measure("text", lambda: measure_text(pipes, judge, real, args))
    (args.output_dir / "results.md").write_text(report(facts), encoding="utf-8")
    print(report(facts))
    return facts


if __name__ == "__main__":
    main()
