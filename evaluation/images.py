r"""How good a model of images is: its codec against PCA and JPEG, the order of its tokens, its
codebook, and what it draws.

    python -m tokcom.evaluation.images --model DIR --train pictures_train.parquet \
        --test pictures_test.parquet --output_dir results [--codebook DIR_OF_KMEANS] \
        [--unordered DIR] [--label_columns class] [--guidance_scale 2]

writes results.json, a Markdown table and pictures. `--codebook` is what `tokcom kmeans` made of the
model, `--unordered` a model trained alike with `tail_dropout=0`, whose curve is shown beside.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm, trange

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.classifier import (
    Classifier,
    by_parts,
    feature_distance,
    recognised,
    train_classifier,
)
from tokcom.evaluation.linear_codecs import PCA, QuantisedPCA
from tokcom.evaluation.report import images_plots, short_names, table
from tokcom.pipeline_media_tokcom import TokComImagePipeline
from tokcom.quantization_tokcom import code_statistics
from tokcom.training.images import captions_of, picture_grid, read_pictures

PREFIXES = (1, 2, 4, 8, 16, 36)  # tokens that pictures are decoded from, one column each


Compare = Callable[[torch.Tensor, torch.Tensor], dict[str, float]]  # of two sets of images


# ---- distances ----


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images `(B, 3, H, W)` in [-1, 1], as if of 8 bits:
    `(B,)`."""
    # / 2: the range of [-1, 1] is 2, and the peak of the formula is 1
    error = ((images - others) / 2).square().flatten(1).mean(1)  # (B,)
    # at most 100 dB, for equal pictures
    return -10 * error.clamp_min(1e-10).log10()


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of images `(B, 3, H, W)` in [-1, 1] with a Gaussian
    window of 11: `(B,)`."""
    size = 11
    sigma = 1.5
    line = torch.exp(-0.5 * ((torch.arange(size) - size // 2) / sigma) ** 2)
    window = (
        (line[:, None] * line / line.sum() ** 2).to(images).expand(images.shape[1], 1, size, size)
    )

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window, groups=x.shape[1])  # each colour on its own

    # to [0, 1], for which the constants below are
    a = images / 2 + 0.5
    b = others / 2 + 0.5
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    # the constants of the paper, which keep flat regions from dividing by 0
    c1 = 0.01**2
    c2 = 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def quality(
    images: torch.Tensor, others: torch.Tensor, classifier: Classifier | None = None
) -> dict[str, float]:
    """How alike two sets of images are, on average; with a classifier also in its features."""
    found = {"psnr": psnr(images, others).mean().item(), "ssim": ssim(images, others).mean().item()}
    if classifier is not None:
        found["distance"] = feature_distance(classifier, images, others).mean().item()
    return found


# ---- what others do ----


def jpeg(image: Image.Image, scale: int, level: int) -> tuple[Image.Image, int]:
    """A picture through JPEG at `1 / scale` of its size, and the bytes of its scan alone, without
    headers and tables."""
    # at a few dozen bytes a smaller picture at a higher quality often wins
    small = image.resize((image.width // scale, image.height // scale), Image.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=level, optimize=True)
    data = buffer.getvalue()
    # the marker at which the coded pixels begin; its header's length follows it
    start = data.rindex(b"\xff\xda")
    # less the end marker
    scan = len(data) - start - 2 - int.from_bytes(data[start + 2 : start + 4], "big") - 2
    return Image.open(io.BytesIO(data)).resize(image.size, Image.Resampling.BICUBIC), scan


def best_jpeg(images: torch.Tensor, processor, budget: float, compare: Compare) -> dict[str, float]:
    """Quality of JPEG at the scale and level of the highest PSNR among those whose scans take at
    most `budget` bytes on average."""
    pictures = processor.postprocess(images)
    best = {"psnr": None, "ssim": None}  # nothing may be small enough
    chosen = None
    for scale in (1, 2, 4, 8):
        for level in (1, 5, 10, 20, 40, 60, 80, 95):
            coded, sizes = zip(*(jpeg(picture, scale, level) for picture in pictures))
            if sum(sizes) / len(sizes) > budget:
                continue
            pixels = processor(list(coded))["pixel_values"]
            found = psnr(pixels, images).mean().item()
            if chosen is None or found > best["psnr"]:
                best = {"psnr": found, "bytes": sum(sizes) / len(sizes)}
                best |= {"scale": scale, "level": level}
                chosen = pixels
    return best if chosen is None else best | compare(chosen, images)


# ---- what is measured ----


def encode(codec, images: torch.Tensor) -> torch.Tensor:
    """Latents `(B, N, C)` of images `(B, 3, H, W)`."""
    return by_parts(lambda part: codec.encode(part).latents, images, codec)


def decode(codec, latents: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
    """Images `(B, 3, H, W)` of latents `(B, N, C)`, or of their first tokens."""
    return by_parts(
        lambda part: codec.decode(part, num_tokens=num_tokens).pixel_values, latents, codec
    )


def order_curve(codec, latents: torch.Tensor, images: torch.Tensor) -> list[float]:
    """PSNR of the first k tokens, k = 0 .. N."""
    curve = []
    for count in tqdm(range(codec.config.num_tokens + 1), desc="order", leave=False):
        curve.append(psnr(decode(codec, latents, count), images).mean().item())
    return curve


def worth_of_each(codec, latents: torch.Tensor, images: torch.Tensor, whole: float) -> list[float]:
    """How many dB of the PSNR of all tokens, `whole`, are lost if one token alone is replaced by
    its mean, for each of the N."""
    lost = []
    for place in trange(latents.shape[1], desc="without each token", leave=False):
        without = latents.clone()
        without[:, place] = 0  # latents are standardised, so their mean is 0
        lost.append(whole - psnr(decode(codec, without), images).mean().item())
    return lost


def order_facts(curve: list[float], quarter: int) -> dict[str, float]:
    """How ordered tokens are: the share of the whole gain that the first `quarter` of them hold,
    and falls of the curve."""
    # from no token to all of them
    gain = curve[-1] - curve[0]
    falls = [a - b for a, b in zip(curve, curve[1:])]
    return {"share_of_gain": (curve[quarter] - curve[0]) / gain, "largest_fall": max(0.0, *falls)}


def frechet(features: torch.Tensor, others: torch.Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features `(M, channels)`, as in FID
    (Heusel et al. 2017)."""
    a = features.double()
    # in float64, since small eigenvalues decide how far two close sets are apart
    b = others.double()
    # (channels, channels)
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)  # (channels,), (channels, channels)
    # The trace of sqrt(A B) is that of sqrt(sqrt(A) B sqrt(A)), which is symmetric: eigenvalues of
    # a symmetric matrix are real, and rounding cannot make them complex.
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


# ---- the command ----


class Pictures:
    """All pictures of a source, their captions and labels."""

    def __init__(
        self, source: str, pipe: TokComImagePipeline, args: argparse.Namespace, limit: int
    ):
        columns = args.image_column, args.caption_column
        dataset = read_pictures(source, pipe.model.config.codec_config, *columns, limit, args.seed)
        rows = tqdm(range(len(dataset)), desc="reading pictures", unit="picture")
        records = dataset.records
        self.images = torch.stack([dataset[i]["pixel_values"] for i in rows])
        column = args.caption_column or "caption"
        self.captions = None
        if column in records.column_names:  # of several the first, and "" of none
            rows = map(captions_of, records[column])
            self.captions = [row[0] if row else "" for row in rows]


def read_labels(source: str, columns: list[str], count: int, names: list[list]) -> torch.Tensor:
    """The labels `(count, columns)` of a local parquet file as indices into `names`, which grow
    where they are empty."""
    import pyarrow.parquet

    file = pyarrow.parquet.read_table(source, columns=columns)
    rows = []
    for i, column in enumerate(columns):
        values = file.column(column).to_pylist()[:count]
        if len(names) == i:
            # of the training pictures, whose classes the test pictures share
            names.append(sorted(set(values)))
        rows.append([names[i].index(value) for value in values])
    return torch.tensor(rows).T


@torch.no_grad()
def measure_codec(
    pipe: TokComImagePipeline,
    train: Pictures,
    test: Pictures,
    latents: torch.Tensor,
    compare: Compare,
    args: argparse.Namespace,
) -> dict:
    """Reconstruction, order and codebook on held-out pictures, whose `latents` are known, beside
    PCA and JPEG."""
    codec = pipe.model.codec
    images = test.images
    facts = {"rows": []}
    config = codec.config
    # PCA may keep as many numbers as the codec has, none of them quantised
    coefficients = config.num_tokens * config.latent_channels
    facts["rows"].append(
        {"codec": "style", "numbers": coefficients, **compare(decode(codec, latents), images)}
    )
    # of training pictures, as the codec has seen them alone
    pca = PCA(train.images)
    facts["rows"].append(
        {
            "codec": "PCA",
            "numbers": coefficients,
            **compare(pca.reconstruct(images, coefficients), images),
        }
    )
    # what a codec knows before it has read anything
    mean = train.images.mean(0).expand_as(images)
    facts["rows"].append({"codec": "mean picture", "numbers": 0, **compare(mean, images)})
    facts["curve"] = order_curve(codec, latents, images)
    steps = range(1, config.num_tokens + 1)
    # without components PCA is the mean picture
    facts["pca_curve"] = [facts["rows"][2]["psnr"]] + [
        psnr(pca.reconstruct(images, k * config.latent_channels), images).mean().item()
        for k in steps
    ]
    quarter = config.num_tokens // 4
    facts["order"] = order_facts(facts["curve"], quarter)
    facts["worth"] = worth_of_each(codec, latents, images, facts["curve"][-1])
    if args.unordered:
        other = TokComImagePipeline.from_pretrained(args.unordered).to(args.device).model.codec
        facts["unordered_curve"] = order_curve(other, encode(other, images), images)
        facts["unordered"] = order_facts(facts["unordered_curve"], quarter)
    if args.codebook:
        coded = TokComImagePipeline.from_pretrained(args.codebook).to(args.device)
        found = measure_codebook(coded, train.images, images, compare)
        facts["rows"] += found.pop("rows")
        facts |= found
    _codec_pictures(pipe, test, latents, args.output_dir)
    return facts


def measure_codebook(
    pipe: TokComImagePipeline,
    train: torch.Tensor,
    images: torch.Tensor,
    compare: Compare,
) -> dict:
    """Reconstruction of `images (B, 3, H, W)` from codes, beside JPEG and quantised PCA of as many
    bytes, and how the codes are used."""
    model = pipe.model
    codes = by_parts(lambda part: model.encode(pixel_values=part).codes, images, model)  # (B, N, 1)
    decoded = by_parts(lambda part: pipe.decode(part, output_type="pt").images, codes, model)
    config = pipe.model.config.codec_config
    size = config.num_codes
    # bytes of a picture, each code at its full width
    budget = config.num_tokens * math.log2(size) / 8
    linear = QuantisedPCA(train, round(8 * budget))
    rebuilt = linear.reconstruct(images)
    used = codes.flatten().bincount(minlength=size).sort(descending=True).values  # (size,)
    return {
        "rows": [
            {"codec": f"style, {size} codes", "bytes": budget, **compare(decoded, images)},
            {"codec": "JPEG scan", **best_jpeg(images, pipe.image_processor, budget, compare)},
            {"codec": "quantised PCA", "bytes": linear.bits / 8, **compare(rebuilt, images)},
        ],
        "codebook": code_statistics(codes, size) | {"codes": size},
        "used": used.tolist(),
    }


def _codec_pictures(
    pipe: TokComImagePipeline, test: Pictures, latents: torch.Tensor, directory: Path
) -> None:
    show = pipe.image_processor.postprocess
    originals = show(test.images[:16])
    rebuilt = show(decode(pipe.model.codec, latents[:16]))
    picture_grid([originals[:8], rebuilt[:8], originals[8:], rebuilt[8:]], scale=3).save(
        directory / "reconstructions.png"
    )
    count = pipe.model.config.codec_config.num_tokens
    rows = [show(decode(pipe.model.codec, latents[:6], k)) for k in PREFIXES if k <= count]
    picture_grid([list(row) for row in zip(*rows, originals[:6])], scale=3).save(
        directory / "prefixes.png"
    )


@torch.no_grad()
def draw(pipe: TokComImagePipeline, captions: list[str], args: argparse.Namespace) -> torch.Tensor:
    """Pictures `(B, 3, H, W)` for captions, at the settings of the command."""
    generator = torch.Generator().manual_seed(args.seed)
    parts = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(captions), 64), desc="drawing", unit="batch"):
        settings = {
            "guidance_scale": args.guidance_scale,
            "num_inference_steps": args.num_inference_steps,
        }
        chosen = captions[start : start + 64]
        # one generator for all parts: each part draws noise of its own
        parts.append(pipe(chosen, generator=generator, output_type="pt", **settings).images.cpu())
    return torch.cat(parts)


def measure_steps(
    pipe: TokComImagePipeline,
    classifier: Classifier,
    test: Pictures,
    labels: torch.Tensor,
    args: argparse.Namespace,
) -> list[dict]:
    """The model at every number of `--steps`, and each of `--students` at its own: recognised,
    Frechet distance, seconds."""
    rows = []
    real = classifier.features(test.images)
    systems = [("model", pipe, steps, args.guidance_scale) for steps in args.steps]
    for name, directory in zip(short_names(args.students), args.students):
        student = TokComImagePipeline.from_pretrained(directory).to(args.device)
        systems.append(
            # a student has learnt the teacher's guidance, and is asked without
            (name, student, student.model.config.num_inference_steps, 1.0)
        )
    for name, system, steps, guidance in systems:
        settings = argparse.Namespace(
            **{**vars(args), "num_inference_steps": steps, "guidance_scale": guidance}
        )
        started = time.perf_counter()
        # the same captions and seed for every system
        drawn = draw(system, test.captions[: len(labels)], settings)
        seconds = time.perf_counter() - started
        shares = recognised(classifier, drawn, labels)
        row = {"system": name, "steps": steps, "evaluations": steps * (1 + (guidance != 1))}
        row |= {f"{column} recognised": share for column, share in zip(args.label_columns, shares)}
        row |= {
            # FID's formula with features of the small classifier: comparable within this table only
            "Frechet distance": frechet(classifier.features(drawn), real),
            "ms a picture": 1e3 * seconds / len(drawn),
        }
        rows.append(row)
        show = pipe.image_processor.postprocess
        file = f"drawn-{name.strip('/').replace('/', '-')}-{steps}.png"
        picture_grid([show(drawn[:8])], scale=3).save(args.output_dir / file)
    return rows


def measure_generation(
    pipe: TokComImagePipeline,
    test: Pictures,
    latents: torch.Tensor,
    classifier: Classifier,
    held_out: torch.Tensor,
    args: argparse.Namespace,
) -> dict:
    """How often a classifier of real pictures recognises what the model draws for held-out
    captions, and the held-out pictures themselves as their `latents` remember them."""
    count = min(args.num_samples, len(test.captions))
    drawn = draw(pipe, test.captions[:count], args)
    kinds = {
        "real": test.images,
        "reconstructed": decode(pipe.model.codec, latents),
        "drawn": drawn,
    }
    found = {
        kind: recognised(classifier, images, held_out[: len(images)])
        for kind, images in kinds.items()
    }
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    shuffled = held_out[:count][order]
    # the control: pictures that are drawn well, but not for what the caption says
    found["drawn for another caption"] = recognised(classifier, drawn, shuffled)
    show = pipe.image_processor.postprocess
    rows = [show(drawn[i : i + 8]) for i in range(0, min(32, count), 8)]
    picture_grid(rows, scale=3).save(args.output_dir / "drawn.png")
    (args.output_dir / "drawn.txt").write_text(
        "\n".join(test.captions[: min(32, count)]) + "\n", encoding="utf-8"
    )
    chance = [1 / head.out_features for head in classifier.heads]
    rows = [{"label": name, "chance": c} for name, c in zip(args.label_columns, chance)]
    for kind, shares in found.items():
        for row, share in zip(rows, shares):
            row[kind] = share
    steps = []
    if args.steps or args.students:
        steps = measure_steps(pipe, classifier, test, held_out[:count], args)
    return {"generation": rows, "steps": steps}


def report(facts: dict) -> str:
    """The Markdown of what was measured."""
    text = "## Reconstruction of held-out pictures\n\n"
    columns = {
        "codec": "codec",
        "numbers a picture": "numbers",
        "bytes a picture": "bytes",
        "PSNR, dB": "psnr",
        "SSIM": "ssim",
    }
    if "distance" in facts["rows"][0]:
        columns["distance in features"] = "distance"
    cells = [[row.get(key, "-") for key in columns.values()] for row in facts["rows"]]
    text += table(list(columns), cells)
    text += "\n\n## Order of the tokens\n\n"
    shown = [k for k in (0, 1, 2, 4, 8, 9, 16, 24, 36) if k < len(facts["curve"])]
    curves = [
        ("style", "curve"),
        ("style, tail_dropout=0", "unordered_curve"),
        ("PCA", "pca_curve"),
    ]
    rows = [[name, *(facts[key][k] for k in shown)] for name, key in curves if key in facts]
    text += table(["PSNR, dB, of the first", *map(str, shown)], rows)
    for name, key in (("", "order"), (" with tail_dropout=0", "unordered")):
        if key in facts:
            share = facts[key]["share_of_gain"]
            fall = facts[key]["largest_fall"]
            text += f"\n\nThe first quarter of the tokens{name} holds {share:.0%} of the gain; "
            text += f"the largest fall is {fall:.3f} dB."
    places = [k for k in (1, 2, 4, 8, 9, 16, 24, 36) if k <= len(facts["worth"])]
    lost = [facts["worth"][k - 1] for k in places]
    text += "\n\n" + table(["lost without token, dB", *map(str, places)], [["style", *lost]])
    if "codebook" in facts:
        used = facts["codebook"]
        text += "\n\n## Codebook\n\n" + table(list(used), [list(used.values())])
    if "generation" in facts:
        text += "\n\n## Drawn for captions\n\n"
        text += table(
            list(facts["generation"][0]), [list(row.values()) for row in facts["generation"]]
        )
    if facts.get("steps"):
        text += "\n\n## Steps\n\n" + table(
            list(facts["steps"][0]), [list(row.values()) for row in facts["steps"]]
        )
    return text + "\n"


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--train", required=True, help="pictures of which PCA and classifier are made"
    )
    parser.add_argument("--test", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--codebook")
    parser.add_argument("--unordered")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", help="default: caption or text, if there is one")
    parser.add_argument(
        "--label_columns",
        nargs="*",
        default=[],
        help="label columns in local parquet files; trains a classifier that measures distances "
        "and scores drawings",
    )
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[], help="numbers of denoising steps to compare"
    )
    parser.add_argument(
        "--students", nargs="*", default=[], help="students of the model, made by stage=distill"
    )
    parser.add_argument(
        "--num_samples", type=int, default=512, help="pictures to draw; 0 measures the codec alone"
    )
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--classifier_epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, default=5000, help="pictures of each source")
    parser.add_argument("--seed", type=int, default=0)
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.num_samples < 0:
        parser.error(f"--num_samples ({args.num_samples}) must not be negative")
    draws = bool(args.label_columns and args.num_samples)
    if (args.steps or args.students) and not draws:
        parser.error("--steps and --students need --label_columns, and --num_samples above 0")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = TokComImagePipeline.from_pretrained(args.model).to(args.device)
    train, test = (Pictures(source, pipe, args, args.limit) for source in (args.train, args.test))
    if draws and test.captions is None:
        raise ValueError(
            f"{args.test} has no captions to draw for; give --caption_column, or --num_samples 0 "
            "to measure the codec alone."
        )
    # once, for all measurements of the test pictures
    latents = encode(pipe.model.codec, test.images)
    classifier = None
    if args.label_columns:
        names: list[list] = []
        labels = read_labels(args.train, args.label_columns, len(train.images), names)
        held_out = read_labels(args.test, args.label_columns, len(test.images), names)
        # it has seen real pictures only, and recognises what is drawn as far as that is like them
        classifier = train_classifier(
            train.images, labels, args.classifier_epochs, args.seed, args.device
        )
    compare = partial(quality, classifier=classifier)
    facts = measure_codec(pipe, train, test, latents, compare, args)
    if draws:
        facts |= measure_generation(pipe, test, latents, classifier, held_out, args)
    facts["settings"] = {name: str(value) for name, value in vars(args).items()}
    (args.output_dir / "results.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="utf-8"
    )
    (args.output_dir / "results.md").write_text(report(facts), encoding="utf-8")
    images_plots(facts, args.output_dir)
    print(report(facts))


if __name__ == "__main__":
    main()
