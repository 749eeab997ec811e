"""Every mode of the shipped model, and text as it is written.

python examples/quick_start.py
"""

from pathlib import Path

import torch

from tokcom.pipeline_tokcom import TokComPipeline

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    pipe = TokComPipeline.from_pretrained(ROOT)  # or the id of a repository on the Hub
    pipe.set_progress_bar_config(disable=True)

    def seed(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    prompt = "The king said to the"
    print(prompt, end="", flush=True)
    for piece in pipe.stream(prompt, gen_length=48, generator=seed(0)):
        print(piece, end="", flush=True)
    print("\n")

    several = pipe(["Once upon a time", "The rabbit"], gen_length=24, temperature=0.7, generator=seed(1))
    print("two prompts:   ", several.texts)
    print("from nothing:  ", repr(pipe.generate(num_chunks=8, generator=seed(2)).texts[0]))
    text = "There was a little rabbit who lived in a big wood."
    print("reconstructed: ", repr(pipe.reconstruct(text).texts[0]))
    print("re-denoised:   ", repr(pipe.denoise_reconstruct(text, noise_level=0.7, generator=seed(3)).texts[0]))
    print("filled:        ", repr(pipe.infill("There was a ____ in a big wood.", 8, generator=seed(4)).texts[0]))
    latents = pipe.encode(text).latents
    print("as latents:    ", tuple(latents.shape), "->", repr(pipe.decode(latents).texts[0]))


if __name__ == "__main__":
    main()
