"""How often a judge that saw only real pictures finds the caption of a picture, or of a clip, among
twenty.

    python -m tokcom.evaluation.retrieval --train emoji/train.parquet --test emoji/test.parquet --judge emoji-judge
    python -m tokcom.evaluation.retrieval --train emoji/train.parquet --test emoji/test.parquet --judge emoji-judge \\
        --models zoo/emoji --guidance_scales 1 2 4 --output_dir results

The first command trains the judge and freezes it: a picture encoder and a caption encoder, by
contrast (Radford et al. 2021), on the training split. The second lets it judge what models make of
held-out captions, beside the held-out pictures themselves. A judge finds a caption if it fits the
picture better than 19 others of the held-out captions, drawn once; chance is 5 %. Captions of which
training had every word are also counted on their own.

Of clips whose captions end in ", MOTION" the picture is named by what stands before, and a second
network names the motion.
"""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from tokcom.cli.loading import add_device_option
from tokcom.evaluation.classifier import by_parts
from tokcom.evaluation.report import table
from tokcom.processing_tokcom import TokComImageProcessor
from tokcom.training.images import first_captions, picture_grid, read_pictures
from tokcom.training.pipelines import load_pipeline

CHOICES = 20  # captions among which the right one is to be found
BUCKETS = 4096  # of the letters of words, which say a little of words that training never had
BATCH = 256  # a contrast among so many pairs; chance is 1 / 256
LEARNING_RATE = 2e-3  # peak of AdamW's
SHOWN = 8  # pictures in a row of the contact sheet


@dataclass
class JudgeConfig:
    """What a judge is: size and frames of what it looks at, the words it knows, the motions it can
    name."""

    size: int = 32  # pixels of a side
    frames: int = 1
    width: int = 32  # channels of the first convolution
    channels: int = 64  # of the directions that are compared
    words: list[str] = field(default_factory=list)
    motions: list[str] = field(default_factory=list)


def split_words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def letters_of(word: str) -> list[int]:
    """Buckets of all runs of three letters of a word, its edges included."""
    # edges tell a beginning from the middle of a word, as in fastText (Bojanowski et al. 2017)
    marked = f"<{word}>"
    runs = [marked[i : i + 3] for i in range(len(marked) - 2)]
    # md5, because Python's own hash of strings differs from process to process
    return [int.from_bytes(hashlib.md5(run.encode()).digest()[:4], "big") % BUCKETS for run in runs]


def split_motion(caption: str) -> tuple[str, str]:
    """ "a cat, rising" -> "a cat" and "rising"."""
    shown, _, motion = caption.rpartition(", ")
    return shown, motion


def convolutions(channels: int, width: int) -> nn.Sequential:
    """Features `(B, 16 * width)` of pictures `(B, channels, H, W)`."""
    layers: list[nn.Module] = [
        # halves the sides at once, which makes all layers behind it cheaper
        nn.Conv2d(channels, width, 4, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for inner in (2 * width, 4 * width):
        layers += [nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        width = inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


class Judge(nn.Module):
    """Pictures and captions as directions, which agree if they belong together; and the motion of
    clips."""

    def __init__(self, config: JudgeConfig):
        super().__init__()
        self.config = config
        self.places = {word: i for i, word in enumerate(config.words)}
        self.eye = convolutions(3, config.width)
        self.picture_head = nn.Linear(16 * config.width, config.channels)
        self.word_embedding = nn.EmbeddingBag(
            len(config.words) + BUCKETS, 2 * config.channels, mode="mean"
        )
        self.caption_head = nn.Sequential(
            nn.Linear(2 * config.channels, 4 * config.channels),
            nn.ReLU(),
            nn.Linear(4 * config.channels, config.channels),
        )
        # log of the inverse temperature, which is learnt: cosines begin multiplied by e^2 = 7.4
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.motion = None
        if config.motions:
            features = convolutions(3 * config.frames, config.width)
            head = nn.Linear(16 * config.width, len(config.motions))
            self.motion = nn.Sequential(features, head)

    def look(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `(B, 3, F, H, W)` -> directions `(B, channels)`, the mean of their frames'."""
        frames = clips.transpose(1, 2).flatten(0, 1)  # (B * F, 3, H, W)
        # (B, F, channels)
        features = self.picture_head(self.eye(frames)).unflatten(0, (len(clips), -1))
        # of unit length, so that products of directions are cosines
        return F.normalize(features.mean(1), dim=-1)

    def read(self, captions: list[str]) -> torch.Tensor:
        """Captions -> directions `(B, channels)`."""
        rows = []
        for caption in captions:
            row = []
            for word in split_words(caption):
                if word in self.places:
                    row.append(self.places[word])
                row += [len(self.places) + bucket for bucket in letters_of(word)]
            # EmbeddingBag takes no empty bag: a caption without letters gets one bucket
            rows.append(row or [len(self.places)])
        device = self.scale.device
        # where each bag begins in the flat list
        starts = torch.tensor([0, *map(len, rows)], device=device).cumsum(0)[:-1]
        flat = torch.tensor([place for row in rows for place in row], device=device)
        return F.normalize(self.caption_head(self.word_embedding(flat, starts)), dim=-1)

    def name_motion(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `(B, 3, F, H, W)` -> logits `(B, motions)`."""
        # frames as channels: the motion is in what changes between them
        return self.motion(clips.flatten(1, 2))

    def knows(self, caption: str) -> bool:
        """Whether training had every word of a caption."""
        return all(word in self.places for word in split_words(caption))


# ---- training ----


def moved(clips: torch.Tensor) -> torch.Tensor:
    """Clips `(B, 3, F, H, W)`, all moved by up to two pixels and a little brighter or darker, so
    that a judge forgives both."""
    # one movement for the batch; 2 of 0..4 is none
    y, x = (int(torch.randint(5, ())) for _ in range(2))
    height, width = clips.shape[-2:]
    flat = F.pad(clips.flatten(1, 2), (2, 2, 2, 2), mode="replicate")
    flat = flat[..., y : y + height, x : x + width]
    gain = 1 + 0.1 * torch.randn(len(clips), 1, 1, 1)
    return (flat * gain + 0.05 * torch.randn_like(flat)).view_as(clips)


def train_judge(
    config: JudgeConfig,
    clips: torch.Tensor,
    captions: list[str],
    epochs: int,
    seed: int,
    device: str = "cpu",
) -> Judge:
    """A judge of `clips (M, 3, F, H, W)` and their captions, on `device`."""
    torch.manual_seed(seed)
    judge = Judge(config).to(device)
    motions = None
    if config.motions:
        parts = [split_motion(caption) for caption in captions]
        captions = [shown for shown, _ in parts]
        motions = torch.tensor([config.motions.index(motion) for _, motion in parts])
    batch = min(BATCH, len(clips))
    steps = epochs * (len(clips) // batch)
    # strong decay: a few thousand pictures are few for a network of this size
    optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    bar = tqdm(range(steps), desc="judge", unit="step", mininterval=5)
    for _ in bar:
        rows = torch.randint(len(clips), (batch,))
        seen = moved(clips[rows]).to(device)
        # one frame is enough for what is shown, and any of them must do
        frame = int(torch.randint(config.frames, ()))
        texts = [captions[i] for i in rows.tolist()]
        scores = judge.look(seen[:, :, frame : frame + 1]) @ judge.read(texts).T * judge.scale.exp()
        # rows with the same caption are all right answers
        same = torch.tensor([[a == b for b in texts] for a in texts], device=device).float()
        target = same / same.sum(1, keepdim=True)
        # captions among pictures, and pictures among captions
        loss = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        if motions is not None:
            loss = loss + F.cross_entropy(judge.name_motion(seen), motions[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return judge.eval()


def save_judge(judge: Judge, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), directory / "judge.safetensors")
    (directory / "judge.json").write_text(json.dumps(asdict(judge.config)) + "\n", encoding="utf-8")


def load_judge(directory: Path) -> Judge:
    config = JudgeConfig(**json.loads((directory / "judge.json").read_text(encoding="utf-8")))
    judge = Judge(config)
    judge.load_state_dict(load_file(directory / "judge.safetensors"))
    return judge.eval()


# ---- judging ----


class HeldOut:
    """Held-out captions, and for each of them the 19 others among which it is to be found."""

    def __init__(self, judge: Judge, captions: list[str], seed: int):
        self.judge = judge
        self.captions = captions
        self.shown = captions
        self.motions = None
        if judge.config.motions:
            parts = [split_motion(caption) for caption in captions]
            self.shown = [shown for shown, _ in parts]
            self.motions = torch.tensor([judge.config.motions.index(m) for _, m in parts])
        # a caption with a new word can only be found by the letters of that word
        self.known = torch.tensor([judge.knows(caption) for caption in self.shown])
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for i, caption in enumerate(self.shown):
            # drawn once: every system is judged on the same choices
            order = torch.randperm(len(captions), generator=generator).tolist()
            # different texts in the order drawn: of equal captions none would be wrong
            others = dict.fromkeys(self.shown[j] for j in order if self.shown[j] != caption)
            if len(others) < CHOICES - 1:
                raise ValueError(
                    f"{len(others) + 1} different captions are too few to choose from {CHOICES}; "
                    "give more held-out records."
                )
            rows.append([i, *(self.shown.index(text) for text in list(others)[: CHOICES - 1])])
        self.choices = torch.tensor(rows)  # (M, CHOICES), the right one first

    @torch.no_grad()
    def found(self, clips: torch.Tensor) -> dict[str, float]:
        """Shares of the captions that are found in `clips (M, 3, F, H, W)`, in the order of the
        captions."""
        texts = self.judge.read(self.shown).cpu()  # (M, channels)
        looks = by_parts(self.judge.look, clips, self.judge, BATCH)
        # (M, CHOICES)
        scores = torch.einsum("mc,mkc->mk", looks, texts[self.choices[: len(clips)]])
        # the right caption stands first
        right = (scores.argmax(1) == 0).float()
        known = self.known[: len(clips)]
        shares = {"found": right.mean().item()}
        shares["found, words known"] = right[known].mean().item()
        shares["found, a word unknown"] = right[~known].mean().item() if (~known).any() else None
        if self.motions is not None:
            name_motion = self.judge.name_motion
            named = by_parts(lambda part: name_motion(part).argmax(1), clips, self.judge, BATCH)
            named = named == self.motions[: len(clips)]
            shares["motion"] = named.float().mean().item()
        return shares


@torch.no_grad()
def make(pipe, captions: list[str], steps: int | None, guidance: float, seed: int) -> torch.Tensor:
    """What a pipeline makes for captions, `(M, 3, F, H, W)`."""
    generator = torch.Generator().manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    parts = []
    for start in tqdm(range(0, len(captions), 64), desc="making", unit="batch", mininterval=5):
        output = pipe(captions[start : start + 64], generator=generator, **settings)
        parts.append(as_clips(output[0]).float().cpu())
    return torch.cat(parts)


def as_clips(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures `(B, 3, H, W)` as clips of one frame; clips as they are."""
    return pixels[:, :, None] if pixels.ndim == 4 else pixels


def read_all(source: str, codec, limit: int | None = None) -> tuple[torch.Tensor, list[str]]:
    """Clips `(M, 3, F, H, W)` and captions of a file."""
    data = read_pictures(source, codec, limit=limit)
    rows = tqdm(range(len(data)), desc="reading", unit="record", mininterval=5)
    clips = as_clips(torch.stack([data[i]["pixel_values"] for i in rows]))
    return clips, first_captions(data.records, source)


@dataclass
class Format:
    """What `read_pictures` asks of a codec, for a judge."""

    image_size: int
    clip_length: int


def get_judge(args: argparse.Namespace) -> Judge:
    """The judge in `args.judge`, trained first if there is none."""
    if (args.judge / "judge.json").is_file():
        return load_judge(args.judge).to(args.device)
    clips, captions = read_all(args.train, Format(args.size, args.frames))
    motions = []
    if args.frames > 1:
        motions = sorted({split_motion(caption)[1] for caption in captions})
    shown = [split_motion(caption)[0] if motions else caption for caption in captions]
    # sorted, so that a word has the same row in every process
    words = sorted({word for caption in shown for word in split_words(caption)})
    config = JudgeConfig(args.size, args.frames, words=words, motions=motions)
    judge = train_judge(config, clips, captions, args.epochs, args.seed, args.device)
    save_judge(judge, args.judge)
    print(f"judge written to {args.judge}")
    return judge


def contact_sheet(clips: torch.Tensor, captions: list[str], directory: Path, name: str) -> None:
    """Pictures, or the middle frames of clips, spread evenly over all, and their captions in a
    file beside."""
    places = torch.linspace(0, len(clips) - 1, min(4 * SHOWN, len(clips))).long()
    shown = clips[places, :, clips.shape[2] // 2]  # (m, 3, H, W)
    images = TokComImageProcessor(shown.shape[-1]).postprocess(shown)
    rows = [images[i : i + SHOWN] for i in range(0, len(images), SHOWN)]
    picture_grid(rows, scale=3).save(directory / f"{name}.png")
    text = "\n".join(captions[i] for i in places.tolist()) + "\n"
    (directory / f"{name}.txt").write_text(text, encoding="utf-8")


def measure(judge: Judge, args: argparse.Namespace) -> list[dict]:
    """A row for the held-out records, one for the captions of others, and one for every model,
    guidance and number of steps."""
    config = judge.config
    clips, captions = read_all(args.test, Format(config.size, config.frames), args.num_samples)
    held_out = HeldOut(judge, captions, args.seed)
    rows = [{"made by": "held-out data", **held_out.found(clips)}]
    # the control should be at chance: 5 %, or a judge knows captions without looking
    others = clips[torch.randperm(len(clips), generator=torch.Generator().manual_seed(args.seed))]
    rows.append({"made by": "held-out data, another record", **held_out.found(others)})
    for name in args.models:
        pipe = load_pipeline(name, dtype=torch.float32).to(args.device)
        if args.reconstruct:
            rebuilt = by_parts(partial(_rebuild, pipe), clips, pipe.model, 64)
            rows.append({"made by": f"{name}, codec alone", **held_out.found(rebuilt)})
        for steps in args.steps or [None]:
            for guidance in args.guidance_scales:
                # the same noise at every setting
                made = make(pipe, captions, steps, guidance, args.seed)
                count = steps or pipe.model.config.num_inference_steps
                row = {"made by": name, "steps": count, "guidance": guidance}
                rows.append(
                    # guidance evaluates the network twice a step
                    {**row, "evaluations": count * (1 + (guidance != 1))} | held_out.found(made)
                )
                print(rows[-1], flush=True)
                contact_sheet(
                    made, captions, args.output_dir, f"made-{Path(name).name}-{count}-{guidance:g}"
                )
                write(rows, args)  # each part as soon as it is known
    contact_sheet(clips, captions, args.output_dir, "real")
    return rows


def _rebuild(pipe, clips: torch.Tensor) -> torch.Tensor:
    """Clips `(B, 3, F, H, W)` as the codec of a pipeline remembers them."""
    is_picture = pipe.model.config.codec_config.clip_length is None
    latents = pipe.model.encode(pixel_values=clips[:, :, 0] if is_picture else clips).latents
    return as_clips(pipe.model.decode(latents).pixel_values)


def write(rows: list[dict], args: argparse.Namespace) -> str:
    """`results.json` and `results.md` of what is measured so far."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    order = [c for c in ("made by", "steps", "guidance", "evaluations") if c in columns]
    order += [c for c in columns if c not in order]
    text = table(order, [[row.get(column, "-") for column in order] for row in rows]) + "\n"
    settings = {name: str(value) for name, value in vars(args).items()}
    facts = json.dumps({"rows": rows, "settings": settings}, indent=1)
    (args.output_dir / "results.json").write_text(facts + "\n", encoding="utf-8")
    (args.output_dir / "results.md").write_text(text, encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", required=True, help="records that a new judge learns from")
    add("--test", required=True, help="held-out records with captions")
    add("--judge", type=Path, required=True, help="folder of the judge; made if there is none")
    add("--models", nargs="*", default=[], help="model directories to judge (default: none)")
    add("--steps", type=int, nargs="*", default=[], help="denoising steps (default: the model's)")
    add("--guidance_scales", type=float, nargs="*", default=[1.0], help="default: 1")
    add(
        "--reconstruct",
        action="store_true",
        help="judge what codecs alone make of the held-out data, too",
    )
    add(
        "--frames",
        type=int,
        default=1,
        help="frames of what a new judge sees (default: 1, pictures)",
    )
    add(
        "--size",
        type=int,
        default=32,
        help="pixels of a side of what a new judge sees (default: 32)",
    )
    add("--epochs", type=int, default=20, help="of a new judge (default: 20)")
    add("--num_samples", type=int, help="held-out records to use (default: all)")
    add(
        "--output_dir",
        type=Path,
        default=Path("outputs/retrieval"),
        help="default: outputs/retrieval",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of a new judge, of the choices and of the noise (default: 0)",
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure(get_judge(args), args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(write(rows, args))
    return rows


if __name__ == "__main__":
    main()
