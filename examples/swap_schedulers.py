"""Sample one model with five schedulers: TokCom's own and four of diffusers.

    python examples/swap_schedulers.py --checkpoint MODEL_DIR

A model that regresses latents takes any flow scheduler; one that predicts token probabilities, as
the shipped model does, draws tokens at every step and takes Euler's. Without --checkpoint the
preset `debug` is trained first (half a minute).
"""

import argparse
import tempfile
import time

import diffusers
import torch

from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.train_accelerate import run
from tokcom.training.config import load_train_config

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SCHEDULERS += ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="model directory or Hub id")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "overrides", nargs="*", help="settings of the training without --checkpoint"
    )
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output_dir={folder}/model",
            "report_to=none",
            "num_samples=0",
            *args.overrides,
        ]
        pipe = TokComPipeline.from_pretrained(
            args.checkpoint or run(load_train_config("debug", settings))
        )
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    for scheduler in [
        own,
        *(getattr(diffusers, name).from_config(own.config) for name in SCHEDULERS),
    ]:
        pipe.scheduler, started = scheduler, time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        try:
            text = pipe(
                "Once upon a time",
                gen_length=32,
                num_inference_steps=args.steps,
                generator=generator,
            ).texts[0]
        except ValueError as error:  # it says which schedulers fit
            text = f"cannot: {error}"
        print(f"{type(scheduler).__name__:34} {time.perf_counter() - started:5.2f} s  {text!r}")


if __name__ == "__main__":
    main()
