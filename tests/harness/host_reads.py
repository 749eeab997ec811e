"""Count what makes a host wait for its device, in a training step and in a sampled block, on the
CPU.

    python tests/harness/host_reads.py                              # this checkout
    python tests/harness/host_reads.py --package_parent /elsewhere  # /elsewhere/tokcom

On a GPU, an operation that needs a number on the host stops the queue until the device has caught
up. Which operations do that is visible on any machine by what is dispatched:

    reads      `.item()`, `bool(tensor)`, `.tolist()`: a number goes to the host
    shapes     `nonzero`, masks as an index, `unique`: the size of the result has to be read
    transfers  tensors that are made of Python numbers or arrays, which on a GPU are copied there

Optimizer, clipping and the logger count too. Nothing here is a measurement of time.
"""

import argparse
import collections
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

from trees import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve()


READS = ("_local_scalar_dense", "equal", "is_nonzero", "item")
SHAPES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
TRANSFERS = ("lift_fresh", "lift_fresh_copy", "_pin_memory")
STEPS = (3, 8)  # updates of two runs, whose difference is that of `STEPS[1] - STEPS[0]` updates


def counting_mode():
    """A dispatch mode with a counter of the three kinds."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = collections.Counter()

        def __enter__(self):
            # the only way to the host that is not dispatched
            self.tolist = torch.Tensor.tolist

            def tolist(tensor):
                self.counts["reads"] += 1
                return self.tolist(tensor)

            torch.Tensor.tolist = tolist
            return super().__enter__()

        def __exit__(self, *error):
            torch.Tensor.tolist = self.tolist
            return super().__exit__(*error)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in READS:
                self.counts["reads"] += 1
            elif name in SHAPES:
                self.counts["shapes"] += 1
            elif name in TRANSFERS:
                self.counts["transfers"] += 1
            elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                masks = [
                    i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)
                ]
                self.counts["shapes"] += len(masks)
            return function(*args, **(kwargs or {}))

    return Counting()


def train_counts(stage: str, extra: list[str]) -> dict[str, float]:
    """Counts per update of a stage of preset `debug`."""
    from tokcom.train_accelerate import run
    from tokcom.training.config import load_train_config

    found = []
    for steps in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            options = [
                *(f"stage={stage}", f"output_dir={folder}/out", f"{stage}.max_steps={steps}"),
                *(f"{stage}.eval_steps={steps}", f"{stage}.checkpoint_steps={steps}"),
                *("report_to=none", "num_samples=0", "mixed_precision=no"),
                *(f"{stage}.warmup_steps=0", f"{stage}.sequence_length=64"),
                *(f"{stage}.batch_size=4", f"{stage}.ema_half_life=0.2"),
                *extra,
            ]
            mode = counting_mode()
            with mode:
                run(load_train_config("debug", options))
            found.append(mode.counts)
    return {
        kind: (found[1][kind] - found[0][kind]) / (STEPS[1] - STEPS[0])
        for kind in ("reads", "shapes", "transfers")
    }


def sample_counts(pipe, blocks: tuple[int, int]) -> dict[str, float]:
    """Counts per block of a text of one chunk each."""
    import torch

    found = []
    for count in blocks:
        mode = counting_mode()
        with mode:
            pipe.generate(count, generator=torch.Generator().manual_seed(0))
        found.append(mode.counts)
    return {
        kind: (found[1][kind] - found[0][kind]) / (blocks[1] - blocks[0])
        for kind in ("reads", "shapes", "transfers")
    }


def measure() -> list[tuple[str, dict[str, float]]]:
    """Every row of the table."""
    from helpers import build_model, tiny_model

    build_pipeline = import_module("pipelines").build_pipeline

    turns = ["model.prediction_type=tokens", "model.codec_config.encoder_type=token"]
    turns += ["model.token_stagger=1.0", "model.timestep_sampling=uniform"]
    split = dict(num_context_layers=1, block_size=1, head_attention="false", start_latents="true")
    turns += [f"model.transformer_config.{name}={value}" for name, value in split.items()]
    rows = [("codec, one update", train_counts("codec", []))]
    several = ["codec.gradient_accumulation_steps=4"]
    rows.append(("codec, one update of 4 micro-batches", train_counts("codec", several)))
    with tempfile.TemporaryDirectory() as folder:
        from tokcom.train_accelerate import run
        from tokcom.training.config import load_train_config

        for name, settings in (("regression", []), ("tokens in turn", turns)):
            out = f"{folder}/{name}"
            codec = ["stage=codec", f"output_dir={out}", "codec.max_steps=2", "num_samples=0"]
            codec += ["report_to=none", "codec.eval_steps=2", "mixed_precision=no", *settings]
            run(load_train_config("debug", codec))
            flow = [f"codec_from={out}"]
            flow += [s for s in settings if "codec_config" not in s]
            rows.append((f"flow, {name}, one update", train_counts("flow", flow)))
    for name, model in (("regression", tiny_model().eval()), ("tokens in turn", build_model())):
        pipe = build_pipeline(model)
        pipe.set_progress_bar_config(disable=True)
        pipe.generate(2)
        size = model.config.transformer_config.block_size
        counts = sample_counts(pipe, (2 * size, 6 * size))
        counts = {kind: value * size for kind, value in counts.items()}
        steps = model.config.num_inference_steps
        rows.append((f"sampling, {name}, one block of {steps} steps", counts))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--package_parent", help="folder that holds the checkout `tokcom`")
    args = parser.parse_args()
    parent = Path(args.package_parent or HERE.parents[3]).resolve()
    sys.path[:0] = [str(parent), str(HERE.parents[1])]
    with contextlib.redirect_stdout(io.StringIO()):
        rows = measure()
    print("| | reads | shapes | transfers |\n|---|---|---|---|")
    for name, counts in rows:
        print(
            f"| {name} | "
            + " | ".join(f"{counts[k]:g}" for k in ("reads", "shapes", "transfers"))
            + " |"
        )


if __name__ == "__main__":
    main()
