"""What `make demo` runs: the shipped model continues, streams, fills a gap and mends a noisy text.

    python examples/demo.py

Everything is in this directory, so it needs no network. It is also the shortest tour of the Python
interface.
"""

import importlib.util
import sys
import time
from pathlib import Path

if importlib.util.find_spec("tokcom") is None:
    remedy = "run `make setup`, then `.venv/bin/python examples/demo.py`"
    sys.exit(f"error: the package tokcom is not installed; {remedy}.")

import torch

from tokcom import TokComPipeline
from tokcom.cli.errors import report_errors

PROMPT = "Lily had a little dog named Max. One day,"
TEXT = "Once upon a time there was a little rabbit who lived in a big wood."
GAPPED = "Lily was sad because she lost her ____. Her mom helped her find it."


def seed(number: int) -> torch.Generator:
    """Noise of its own for every sample, the same in every run."""
    return torch.Generator().manual_seed(number)


@report_errors()
def main() -> None:
    started = time.perf_counter()
    root = Path(__file__).resolve().parents[1]
    pipe = TokComPipeline.from_pretrained(root)  # or the id of a repository
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    size = sum(parameter.numel() for parameter in pipe.model.parameters()) / 1e6
    print(f"\nTokCom: {size:.1f} M parameters, {pipe.chunk_size} tokens in each latent.")

    print("\nTwo prompts at once:")
    prompts = [PROMPT, "The king said to the"]
    output = pipe(prompts, gen_length=40, temperature=0.7, generator=seed(0))
    for prompt, text in zip(prompts, output.texts):
        print(f"  {prompt}|{text}")

    print("\nOne text while it is written:\n  Once upon a time", end="", flush=True)
    pipe.set_progress_bar_config(disable=True)  # the text is the progress
    for piece in pipe.stream("Once upon a time", gen_length=64, generator=seed(1)):
        print(piece.replace("\n", "\n  "), end="", flush=True)
    pipe.set_progress_bar_config(desc="denoising", leave=False, disable=False)

    print("\n\nA gap, filled from both sides:")
    print(f"  {GAPPED}")
    print(f"  {pipe.infill(GAPPED, gap_length=2, generator=seed(0)).texts[0]}")

    print("\nA text of which a share is kept, and the rest made up:")
    for share in (0.5, 0.8, 1.0):
        text = pipe.denoise_reconstruct(TEXT, noise_level=share, generator=seed(0)).texts[0]
        print(f"  {share:4.0%}  {text}")

    latents = pipe.encode(TEXT).latents
    count = latents.shape[1]
    print(f"\nThat text as {count} latents of {latents.shape[2]} numbers, and back:")
    print(f"  {pipe.decode(latents).texts[0]}")
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} seconds. README.md says what to expect of a model of this size.")


if __name__ == "__main__":
    main()
