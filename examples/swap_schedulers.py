"""Sample one model with five schedulers: TokCom's own and four of diffusers.

    python examples/swap_schedulers.py --checkpoint MODEL_DIR

A model that regresses latents takes any flow scheduler. One that predicts token probabilities, as
the shipped model does, draws tokens at every step and takes Euler's alone. Without --checkpoint the
preset `debug` is trained first (half a minute).
"""

import argparse
import tempfile
import time

import diffusers
import torch

from tokcom import TokComPipeline
from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.train_accelerate import run
from tokcom.training.config import load_train_config

SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def write(pipe: TokComPipeline, steps: int) -> str:
    """A text from the same noise every time, or why the scheduler does not fit."""
    generator = torch.Generator().manual_seed(0)
    try:
        output = pipe(
            "Once upon a time", gen_length=32, num_inference_steps=steps, generator=generator
        )
    except ValueError as error:  # it says which schedulers fit
        return f"cannot: {error}"
    return repr(output.texts[0])


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="model directory or Hub id (default: train one)")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps (default: 16)")
    add_device_option(parser)
    parser.add_argument("overrides", nargs="*", help="settings of the training")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output_dir={folder}/model", "report_to=none", "num_samples=0"]
        config = load_train_config("debug", settings + args.overrides)
        # read while the temporary folder is there
        pipe = TokComPipeline.from_pretrained(args.checkpoint or run(config)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    # TokCom's configuration has the fields that stock schedulers read
    stock = [getattr(diffusers, name).from_config(own.config) for name in SCHEDULERS]
    for scheduler in [own, *stock]:
        pipe.scheduler = scheduler
        started = time.perf_counter()
        text = write(pipe, args.steps)
        print(f"{type(scheduler).__name__:34} {time.perf_counter() - started:5.2f} s  {text}")


if __name__ == "__main__":
    main()
