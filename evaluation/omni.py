"""Measure a model of a text, a picture and a sound in all six directions, and its text beside a model of text alone.

    python -m evaluation.omni --model model --pictures icons/train.parquet --pictures_test icons/test.parquet \
        --digits digits/train.parquet --digits_test digits/test.parquet --text_model text --judge judge --output_dir results

Pictures have `image` and `caption`; digits `image`, `caption` and `audio`, where one caption is one class. Text to picture: a small
contrastive model, trained on the real pairs, looks for the caption of each picture among 20. Picture to text: exact nouns (what comes
before the comma) and BLEU, beside the caption of the nearest training picture. Sounds and digits: a classifier, trained on the real
recordings, hears what is generated as .wav; a picture of a digit is the nearest of the ten. Writes `results.json`, `results.md`,
`pictures.png`, `sounds.png` and some .wav files.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import sacrebleu
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import trange

from audio_processing_tokcom import TokComAudioProcessor, write_wav
from evaluation.images import Classifier, recognised, train_classifier
from evaluation.judges import TokenJudge
from evaluation.metrics import sample_entropy
from evaluation.report import table
from pipeline_tokcom import TokComPipeline
from training.config import DataConfig
from training.data import load_documents
from training.images import picture_grid
from training.streams import OmniDataset

CANDIDATES, BATCH = 20, 50


class Pairs(nn.Module):
    """Pictures and captions as unit vectors, near where they belong together (Radford et al. 2021), at small size."""

    def __init__(self, vocab_size: int, size: int = 64):
        super().__init__()
        self.picture, self.scale = Classifier([size]), nn.Parameter(torch.tensor(2.3))
        self.words = nn.EmbeddingBag(vocab_size, 128)
        self.text = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, size))

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.picture(pixels)[0], dim=-1)

    def read(self, rows: list[list[int]]) -> torch.Tensor:
        offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
        return F.normalize(self.text(self.words(torch.tensor(sum(rows, [])), offsets)), dim=-1)

    def score(self, pixels: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
        return self.scale.exp() * self.see(pixels) @ self.read(rows).T


def train_pairs(pixels: torch.Tensor, rows: list[list[int]], vocab_size: int, steps: int, seed: int) -> Pairs:
    torch.manual_seed(seed)
    pairs, labels = Pairs(vocab_size).train(), torch.arange(128)
    optimizer = torch.optim.AdamW(pairs.parameters(), 2e-3, weight_decay=0.05)
    for _ in trange(steps, desc="contrastive model", leave=False):
        chosen = torch.randint(0, len(rows), (128,))
        shifted = pixels[chosen].roll(tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        scores = pairs.score(shifted, [rows[i] for i in chosen])
        loss = F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pairs.eval()


@torch.no_grad()
def retrieved(pairs: Pairs, pixels: torch.Tensor, rows: list[list[int]], seed: int) -> float:
    """Share of pictures whose caption is found among `CANDIDATES`, the others drawn from those of the other pictures."""
    scores, rng, hits = pairs.score(pixels, rows), np.random.default_rng(seed), []
    for i in range(len(rows)):
        others = [j for j in rng.permutation(len(rows)) if rows[j] != rows[i]][: CANDIDATES - 1]
        hits.append(bool(scores[i, i] > scores[i, others].max()))
    return float(np.mean(hits))


def noun(caption: str) -> str:
    """What a caption names: without its beginning and what comes after a comma."""
    return caption.removeprefix("an emoji of ").split(",")[0].split(":")[0].strip().lower()


class Study:
    """The model, the real records, and what is made of them; `generate` runs in batches with one seed."""

    def __init__(self, pipe: TokComPipeline, args: argparse.Namespace):
        self.pipe, self.args = pipe, args
        self.data = {
            name: self._load(getattr(args, name)) for name in ("pictures", "pictures_test", "digits", "digits_test")
        }
        self.processor = TokComAudioProcessor(pipe.model.codec.streams["audio"].config)

    def _load(self, source: str) -> dict[str, list]:
        fields = {"text": "caption", "image": "image", "audio": "audio"}
        records = load_documents(source, DataConfig(train=source, fields=fields), "train")
        dataset = OmniDataset(records, self.pipe.tokenizer, 0, training=False).fit(self.pipe.model.codec)
        contents = [dataset.content(i) for i in range(min(len(dataset), 10**6))]
        found = {name: [content.get(name) for content in contents] for name in ("text", "image", "audio")}
        found["caption"] = list(records["text"])  # whole; `text` is cut to what the model reads
        return found | {"pixels": torch.stack([dataset[i]["streams"]["image"] for i in range(len(dataset))])}

    def generate(self, stream: str, given: dict[str, list], scale: float = 1.0) -> list:
        generator, made, count = torch.Generator().manual_seed(self.args.seed), [], len(next(iter(given.values())))
        for start in trange(0, count, BATCH, desc=f"{'+'.join(given)} to {stream}", leave=False):
            part = {name: values[start : start + BATCH] for name, values in given.items()}
            made += self.pipe.generate_streams(
                part, stream, num_inference_steps=self.args.steps, guidance_scale=scale, generator=generator
            ).streams[stream]
        return made

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])

    def sounds(self, sounds: list[np.ndarray]) -> torch.Tensor:
        """Sounds as the classifier sees them, `(M, 3, bands, F)`."""
        return self.processor(sounds)["input_features"][:, None].expand(-1, 3, -1, -1) / 2 + 1


def measure_pictures(study: Study) -> tuple[list[dict], dict]:
    """Text to picture and picture to text on held-out pictures."""
    args, train, test = study.args, study.data["pictures"], study.data["pictures_test"]
    tokenizer = study.pipe.tokenizer
    rows = {
        name: tokenizer(part["caption"], add_special_tokens=False)["input_ids"]
        for name, part in (("train", train), ("test", test))
    }
    pairs = train_pairs(train["pixels"], rows["train"], len(tokenizer), args.contrastive_steps, args.seed)
    found = [
        {
            "direction": "text to picture",
            "measure": f"caption found among {CANDIDATES}",
            "chance or baseline": 1 / CANDIDATES,
        }
    ]
    found[0]["real data"] = retrieved(pairs, test["pixels"], rows["test"], args.seed)
    drawn = {}
    for scale in args.guidance_scales:
        drawn[scale] = study.generate("image", {"text": test["text"]}, scale)
        found[0][f"guidance {scale:g}"] = retrieved(pairs, study.pixels(drawn[scale]), rows["test"], args.seed)
    distance = torch.cdist(test["pixels"].flatten(1), train["pixels"].flatten(1))
    nearest = [train["caption"][i] for i in distance.argmin(1)]
    named = {"direction": "picture to text", "measure": "noun exact", "real data": None}
    bleu = {"direction": "picture to text", "measure": "BLEU", "real data": None}
    written = {scale: study.generate("text", {"image": test["image"]}, scale) for scale in args.guidance_scales}
    for name, texts in (("chance or baseline", nearest), *((f"guidance {s:g}", t) for s, t in written.items())):
        named[name] = float(np.mean([noun(a) == noun(b) for a, b in zip(texts, test["caption"])]))
        bleu[name] = sacrebleu.corpus_bleu(texts, [test["caption"]]).score
    best = max(args.guidance_scales)
    shown = [[*test["image"][:12]], [*drawn[min(args.guidance_scales)][:12]], [*drawn[best][:12]]]
    size = study.pipe.model.codec.streams["image"].config.image_size
    picture_grid([[image.convert("RGB").resize(size[::-1]) for image in row] for row in shown], 2).save(
        args.output_dir / "pictures.png"
    )
    texts = [list(row) for row in zip(test["caption"][:12], written[min(args.guidance_scales)][:12], nearest[:12])]
    return [*found, named, bleu], {"captions": texts}


def measure_digits(study: Study) -> list[dict]:
    """The four directions of sounds, on held-out recordings."""
    args, train, test = study.args, study.data["digits"], study.data["digits_test"]
    classes = sorted(set(train["caption"]))
    labels = {
        name: torch.tensor([[classes.index(t)] for t in part["caption"]])
        for name, part in (("train", train), ("test", test))
    }
    ear = train_classifier(study.sounds(train["audio"]), labels["train"], args.epochs, args.seed)
    heard = recognised(ear, study.sounds(test["audio"]), labels["test"])[0]
    icons = torch.stack([train["pixels"][train["caption"].index(name)] for name in classes])

    def seen(images: list[Image.Image]) -> float:
        guess = torch.cdist(study.pixels(images).flatten(1), icons.flatten(1)).argmin(1)
        return float((guess == labels["test"][:, 0]).float().mean())

    chance = 1 / len(classes)
    rows = [
        {"direction": "sound to text", "measure": "digit exact", "real data": None},
        {"direction": "text to sound", "measure": "digit heard", "real data": heard},
        {"direction": "picture to sound", "measure": "digit heard", "real data": heard},
        {"direction": "sound to picture", "measure": "nearest icon", "real data": 1.0},
    ]
    for row in rows:
        row["chance or baseline"] = chance
    for scale in args.guidance_scales:
        key = f"guidance {scale:g}"
        said = study.generate("text", {"audio": test["audio"]}, scale)
        rows[0][key] = float(np.mean([a == b for a, b in zip(said, test["caption"])]))
        for row, given in ((rows[1], "text"), (rows[2], "image")):
            sounds = study.generate("audio", {given: test[given]}, scale)
            row[key] = recognised(ear, study.sounds(sounds), labels["test"])[0]
            if given == "text" and scale == max(args.guidance_scales):
                keep_sounds(study, classes, sounds, test)
        rows[3][key] = seen(study.generate("image", {"audio": test["audio"]}, scale))
    return rows


def keep_sounds(study: Study, classes: list[str], sounds: list[np.ndarray], test: dict) -> None:
    """`sounds.png`: log-mel of a real recording of each class above a generated one; some of those as .wav files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [test["caption"].index(name) for name in classes]
    figure, axes = pyplot.subplots(2, len(classes), figsize=(1.2 * len(classes), 2.6), layout="constrained")
    for column, index in enumerate(first):
        for row, sound in enumerate((test["audio"][index], sounds[index])):
            axes[row, column].imshow(
                study.processor(sound)["input_features"][0], origin="lower", aspect="auto", cmap="magma"
            )
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(classes[column].split()[-1], fontsize=8)
        word, rate = classes[column].split()[-1], study.pipe.sampling_rates["audio"]
        write_wav(sounds[index], study.args.output_dir / f"{word}.wav", rate)
    axes[0, 0].set_ylabel("recorded", fontsize=8)
    axes[1, 0].set_ylabel("generated", fontsize=8)
    figure.savefig(study.args.output_dir / "sounds.png", dpi=110)


def measure_text(pipes: dict[str, TokComPipeline], real: list[str], args: argparse.Namespace) -> list[dict]:
    """Texts from nothing of the joint model and of one of text alone, by a judge with their tokenizer."""
    judge, rows = TokenJudge(args.judge), []
    for name, pipe in {"real": None, **pipes}.items():
        texts = real
        if pipe is not None:
            texts, generator = [], torch.Generator().manual_seed(args.seed)
            while len(texts) < args.texts:
                texts += pipe.generate_streams({}, "text", BATCH, args.steps, generator=generator).texts
        tokenizer = next(iter(pipes.values())).tokenizer
        ids = [
            [tokenizer.eos_token_id, *row, tokenizer.eos_token_id]
            for row in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        nats = [judge.nll(np.array([row]))[0, 1:] for row in ids]
        width = max(map(len, ids))
        entropy = sample_entropy(np.array([row + [tokenizer.eos_token_id] * (width - len(row)) for row in ids]))
        row = {
            "texts": name,
            "judge NLL a token": float(np.concatenate(nats).mean()),
            "tokens": float(np.mean([len(n) for n in nats])),
        }
        rows.append(row | {"distinct texts": len(set(texts)) / len(texts), "entropy": entropy, "samples": texts[:8]})
    return rows


def report(facts: dict) -> str:
    columns = list(dict.fromkeys(key for row in facts["directions"] for key in row))
    text = "## Six directions\n\n" + table(columns, [[row.get(key) for key in columns] for row in facts["directions"]])
    text += "\n## Captions\n\n" + table(["real", "model", "nearest"], facts["captions"])
    if facts["text"]:
        columns = [key for key in facts["text"][0] if key != "samples"]
        text += "\n## Text alone\n\n" + table(columns, [[row[key] for key in columns] for row in facts["text"]])
        text += (
            "\n"
            + "\n".join(f"- {row['texts']}: {', '.join(map(repr, row['samples']))}" for row in facts["text"])
            + "\n"
        )
    return text


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name in ("pictures", "pictures_test", "digits", "digits_test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--text_model", help="model of the text stream alone")
    parser.add_argument("--judge", help="autoregressive judge of captions with the model's tokenizer")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own by default")
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--contrastive_steps", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=10, help="of the classifier of sounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        pipe = TokComPipeline.from_pretrained(args.model)
        if pipe.model.config.codec_config.modality != "several" or set(pipe.model.codec.names) != {
            "audio",
            "image",
            "text",
        }:
            raise ValueError(f"{args.model} is no model of the streams text, image and audio.")
        pipe.set_progress_bar_config(disable=True)
        study = Study(pipe, args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    directions, more = measure_pictures(study)
    facts = {"directions": directions + measure_digits(study), **more, "text": []}
    if args.judge:
        pipes = {"joint model": pipe}
        if args.text_model:
            pipes["text alone"] = TokComPipeline.from_pretrained(args.text_model)
            pipes["text alone"].set_progress_bar_config(disable=True)
        facts["text"] = measure_text(pipes, study.data["pictures_test"]["caption"], args)
    facts["settings"] = {name: str(value) for name, value in vars(args).items()}
    (args.output_dir / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.output_dir / "results.md").write_text(report(facts))
    print(report(facts))
    return facts


if __name__ == "__main__":
    main()
