"""Train small models in two checkouts with one seed, and fail if a single bit of their weights
differs.

    git worktree add ../before v0.1 && python scripts/compare_trees.py ../before .

A refactor must not change what is computed. Each preset trains 20 steps per stage in float32 on one
thread, in both trees, and the weights are compared to the last bit; the shipped model then writes
texts with fixed seeds in both. Bits differ between processors, so both trees run on this machine,
one after the other.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

# one for each codec, small enough for seconds a run
PRESETS = ("debug", "pixel-tiny", "style-tiny", "video-tiny", "omni-tiny")
# float32 and one attention function: both trees must round alike
SHORT = ["report_to=none", "num_samples=0", "mixed_precision=no", "attention=sdpa"]
SHORT += [
    f"{stage}.{key}" for stage in ("codec", "flow") for key in ("eval_batches=1", "batch_size=4")
]
WRITE = """
import torch
try:
    from tokcom import TokComPipeline
except ImportError:
    from pipeline_tokcom import TokComPipeline
torch.set_num_threads(1)
pipe = TokComPipeline.from_pretrained({model!r})
pipe.set_progress_bar_config(disable=True)
for seed in range(3):
    print(repr(pipe("Once upon a time", gen_length=48, generator=torch.Generator().manual_seed(seed)).texts))
"""


def environment(tree: Path, links: Path) -> dict[str, str]:
    """One thread, no network, and `tree` as the package `tokcom`, whatever its folder is called."""
    link = links / str(tree).strip("/").replace("/", "-")  # two trees may have the same name
    link.mkdir(parents=True, exist_ok=True)
    if not (link / "tokcom").exists():
        (link / "tokcom").symlink_to(tree, target_is_directory=True)
    # sums of several threads differ in their last bits from run to run
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **one_thread, "PYTHONPATH": str(link)}


def run(command: list[str] | str, tree: Path, links: Path) -> str:
    """Run a command, or Python code, in a tree and return what it prints; exits with its last lines
    if it fails."""
    command = [sys.executable, "-c", command] if isinstance(command, str) else command
    done = subprocess.run(
        command, cwd=tree, env=environment(tree, links), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed in {tree}:\n{done.stderr[-2000:]}")
    return done.stdout


def train(
    tree: Path, preset: str, steps: int, output: Path, extra: list[str], links: Path
) -> dict[str, torch.Tensor]:
    """The weights of a short run."""
    lengths = [
        f"{stage}.{key}={steps}"
        for stage in ("codec", "flow")
        for key in ("max_steps", "eval_steps")
    ]
    command = [
        sys.executable,
        "train_accelerate.py",
        "--preset",
        preset,
        f"output_dir={output}",
        *SHORT,
        *lengths,
        *extra,
    ]
    run(command, tree, links)
    return load_file(output / "model.safetensors")


def differences(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same in both."""
    # a tensor that only one tree has is a difference, too
    missing = sorted(old.keys() ^ new.keys())
    return missing + [
        name for name in sorted(old.keys() & new.keys()) if not torch.equal(old[name], new[name])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="checkout of the earlier commit, e.g. a worktree")
    parser.add_argument("new", type=Path, help="checkout to compare with it")
    parser.add_argument(
        "--presets", nargs="+", default=PRESETS, help="presets to train (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="steps per stage (default: %(default)s)"
    )
    parser.add_argument(
        "--old_overrides", nargs="*", default=[], help="key=value overrides for the old tree alone"
    )
    parser.add_argument(
        "--new_overrides", nargs="*", default=[], help="key=value overrides for the new tree alone"
    )
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trees = {
            "old": (args.old.resolve(), args.old_overrides),
            "new": (args.new.resolve(), args.new_overrides),
        }
        for preset in args.presets:
            weights = {
                name: train(tree, preset, args.steps, root / name / preset, extra, root / "links")
                for name, (tree, extra) in trees.items()
            }
            changed = differences(weights["old"], weights["new"])
            failed |= bool(changed)
            print(
                f"{preset}: {len(weights['new'])} tensors, {len(changed)} differ "
                f"{changed[:3] or ''}",
                flush=True,
            )
        # both trees load the same weights, so a difference is one of the code
        code = WRITE.format(model=str(args.new.resolve()))
        texts = [run(code, tree, root / "links") for tree, _ in trees.values()]
        failed |= texts[0] != texts[1]
        print(f"texts of the shipped model: {'the same' if texts[0] == texts[1] else 'different'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
