r"""Measure a model of clips: how well it predicts the frame after those it is given.

    python -m tokcom.evaluation.videos --model model --data test.parquet --image_column video \
        --steps 1 4 50 --output_dir results
    python -m tokcom.evaluation.videos --model teacher --students student-4 --data test.parquet \
        --output_dir results

Beside copying the last frame. PSNR rewards the mean of what may come, which is blurred, so the
sharpness (mean absolute gradient over that of the real frames) stands beside it. Writes
`results.json`, `results.md`, strips of frames, and a GIF.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.evaluation.images import psnr
from tokcom.evaluation.report import table
from tokcom.pipeline_media_tokcom import TokComVideoPipeline
from tokcom.training.films import write_film
from tokcom.training.images import first_captions, picture_grid, read_pictures

SHOWN = 6  # clips in the pictures


def sharpness(frames: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels of `(B, 3, H, W)`."""
    return (frames.diff(dim=-1).abs().mean() + frames.diff(dim=-2).abs().mean()).item()


def predict(
    pipe: TokComVideoPipeline,
    clips: torch.Tensor,
    known: int,
    steps: int | None,
    batch_size: int,
    seed: int,
    captions: list[str] | None = None,
    guidance: float = 1.0,
) -> torch.Tensor:
    """The frame `(B, 3, H, W)` that follows the first `known` of `clips (B, 3, F, H, W)`, whose
    captions are given to a model that reads any."""
    causal = pipe.model.config.transformer_config.block_size is not None
    # a block-causal model can stop after the frame that is asked for; others make whole clips
    length = known + 1 if causal else None
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for start in tqdm(range(0, len(clips), batch_size), desc=f"{known} known, {steps} steps"):
        given = clips[start : start + batch_size, :, :known]  # (B, 3, known, H, W)
        options = {"num_inference_steps": steps, "generator": generator, "output_type": "pt"}
        options["guidance_scale"] = guidance
        if captions is not None and pipe.model.config.condition_vocab_size:
            options["prompt"] = captions[start : start + batch_size]
        made = pipe(frames=given, num_frames=length, **options).videos
        # the frames before it were given
        frames.append(made[:, :, known].cpu())
    return torch.cat(frames)


def measure(
    systems: list[tuple],
    clips: torch.Tensor,
    args: argparse.Namespace,
    captions: list[str] | None = None,
) -> list[dict]:
    """A row for each system and number of steps, and one for copying; values are means over
    `args.known`."""
    rows = []
    real = {k: clips[:, :, k] for k in args.known}  # (B, 3, H, W)
    # a model that predicts no motion would be as good as this
    copies = {k: psnr(clips[:, :, k - 1], real[k]).mean().item() for k in args.known}
    row = {
        "system": "copy of the last frame",
        "steps": "-",
        "guidance": "-",
        **{f"{k} known": copies[k] for k in args.known},
    }
    rows.append(
        {**row, "mean": float(np.mean(list(copies.values()))), "sharpness": "-", "ms a frame": "-"}
    )
    for name, pipe, steps, scale in systems:
        found = {}
        sharp = []
        started = time.perf_counter()
        for k in args.known:
            asked = (args.batch_size, args.seed, captions, scale)
            made = predict(pipe, clips, k, steps, *asked)
            found[k] = psnr(made, real[k]).mean().item()
            # below 1 is blurred
            sharp.append(sharpness(made) / sharpness(real[k]))
        seconds = time.perf_counter() - started
        row = {"system": name, "steps": steps or pipe.model.config.num_inference_steps}
        row["guidance"] = scale
        row |= {f"{k} known": found[k] for k in args.known}
        row |= {"mean": float(np.mean(list(found.values()))), "sharpness": float(np.mean(sharp))}
        rows.append({**row, "ms a frame": 1e3 * seconds / len(args.known) / len(clips)})
    return rows


def pictures(pipe: TokComVideoPipeline, clips: torch.Tensor, args: argparse.Namespace) -> None:
    """`strips.png`: real clips above what follows their first frame; `clips.gif`: the same side by
    side."""
    show = pipe.image_processor.postprocess
    real = [show(clip.transpose(0, 1)) for clip in clips[:SHOWN]]
    causal = pipe.model.config.transformer_config.block_size is not None
    length = args.long or (clips.shape[2] if causal else None)
    generator = torch.Generator().manual_seed(args.seed)
    given = clips[:SHOWN, :, : args.first]
    options = {"generator": generator, "guidance_scale": args.guidance_scale}
    made = pipe(frames=given, num_frames=length, **options).videos
    strips = [row for pair in zip(real, made) for row in pair]
    picture_grid(strips, scale=2).save(args.output_dir / "strips.png")
    # real clips end first if `--long` asks for more; their last frame stays
    still = [clip + [clip[-1]] * (len(made[0]) - len(clip)) for clip in real]
    frames = []
    for i in range(len(made[0])):
        frames.append(
            picture_grid([[clip[i] for clip in still], [clip[i] for clip in made]], scale=3)
        )
    # the last frame four times more, so that an eye can rest there before it starts again
    write_film([*frames, *[frames[-1]] * 4], args.output_dir / "clips.gif", fps=6)


def report(rows: list[dict]) -> str:
    text = "## The next frame, PSNR in dB\n\n"
    return text + table(list(rows[0]), [list(row.values()) for row in rows]) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="held-out clips")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--image_column", default="image")
    parser.add_argument(
        "--known",
        type=int,
        nargs="+",
        help="how many frames are given; by default 1, half and all but one",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="*",
        default=[],
        help="numbers of denoising steps; by default the model's",
    )
    parser.add_argument(
        "--students", nargs="*", default=[], help="students of the model, made by stage=distill"
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="of the model (default: %(default)s)"
    )
    parser.add_argument("--first", type=int, default=1, help="frames given in the pictures")
    parser.add_argument(
        "--long", type=int, help="frames of the clips in the pictures, of block-causal models"
    )
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    add_device_option(parser)
    return parser


@report_errors()
def main(argv: list[str] | None = None) -> list[dict]:
    args = build_parser().parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipes = [
        TokComVideoPipeline.from_pretrained(name).to(args.device)
        for name in (args.model, *args.students)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    data = read_pictures(
        args.data, pipes[0].model.config.codec_config, args.image_column, limit=args.num_samples
    )
    clips = torch.stack(
        [data[i]["pixel_values"] for i in tqdm(range(len(data)), desc="reading clips")]
    )
    length = clips.shape[2]
    # a set, since a short clip has fewer than three different ones
    args.known = args.known or sorted({1, length // 2, length - 1})
    if not all(1 <= k < length for k in args.known):
        raise ValueError(f"`known` ({args.known}) must be between 1 and {length - 1}.")
    systems = [("model", pipes[0], steps, args.guidance_scale) for steps in args.steps or [None]]
    # a student has learnt the teacher's guidance, and is asked without
    students = zip(args.students, pipes[1:])
    systems += [(Path(name).name, pipe, None, 1.0) for name, pipe in students]
    has_captions = "caption" in data.records.column_names
    captions = first_captions(data.records, args.data) if has_captions else None
    rows = measure(systems, clips, args, captions)
    pictures(pipes[0], clips, args)
    facts = {
        "rows": rows,
        "clips": len(clips),
        "settings": {name: str(value) for name, value in vars(args).items()},
    }
    (args.output_dir / "results.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="utf-8"
    )
    (args.output_dir / "results.md").write_text(report(rows), encoding="utf-8")
    print(report(rows))
    return rows


if __name__ == "__main__":
    main()
