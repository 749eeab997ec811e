"""Time and peak memory of generation against its length.

    python -m evaluation.benchmark --checkpoint . --lengths 256 4096

Each length runs in a process of its own, whose peak memory is read at the end; the Markdown table gives ratios to the
first length.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm


def measure(checkpoint: str, length: int, steps: int) -> dict:
    """Generate `length` tokens after a warm-up; seconds, and the peak memory of this process in MiB."""
    from pipeline_tokcom import TokComPipeline

    pipe = TokComPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=steps, output_type="latent")  # latents do not end at EOS
    pipe("Once upon a time", gen_length=16, **options)
    started = time.perf_counter()
    output = pipe("Once upon a time", gen_length=length, generator=torch.Generator().manual_seed(0), **options)
    seconds = time.perf_counter() - started
    made = output.latents.shape[1] * pipe.chunk_size
    return {"tokens": made, "seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=".")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output_file", help="JSON file for the numbers")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.checkpoint, args.measure, args.steps)))
        return
    command = [
        sys.executable,
        "-m",
        "evaluation.benchmark",
        "--checkpoint",
        args.checkpoint,
        "--steps",
        str(args.steps),
    ]
    rows = []
    for length in tqdm(args.lengths, desc="lengths"):
        printed = subprocess.run([*command, "--measure", str(length)], capture_output=True, text=True, check=True)
        rows.append(json.loads(printed.stdout.splitlines()[-1]))
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(rows, indent=2) + "\n")
    from evaluation.report import table  # not above: matplotlib would count in the measured processes

    columns = ["tokens", "seconds", "ms per token", "time ratio", "peak MiB", "memory ratio"]
    first, cells = rows[0], []
    for row in rows:
        seconds, peak = row["seconds"], row["peak_mib"]
        ratios = seconds / first["seconds"], round(peak), peak / first["peak_mib"]
        cells.append([row["tokens"], seconds, 1000 * seconds / row["tokens"], *ratios])
    print(table(columns, cells))


if __name__ == "__main__":
    main()
