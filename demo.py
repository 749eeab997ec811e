"""What `make demo` runs: every mode of the shipped model, from this directory, without network.

python demo.py
"""

import tempfile
import time
from pathlib import Path

import torch

from tokcom.pipeline_tokcom import TokComPipeline

PROMPT = "Lily had a little dog named Max. One day,"
TEXT = "Once upon a time there was a little rabbit who lived in a big wood."
GAPPED = "Lily was sad because she lost her ____. Her mom helped her find it."


def main() -> None:
    started = time.perf_counter()
    pipe = TokComPipeline.from_pretrained(Path(__file__).resolve().parent)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    seed = torch.Generator().manual_seed
    size = sum(p.numel() for p in pipe.model.parameters()) / 1e6
    print(f"\nTokCom, {size:.1f} M parameters, {pipe.chunk_size} tokens per latent, loaded from this directory.\n")

    print("conditional          ", repr(PROMPT + pipe(PROMPT, gen_length=64, generator=seed(0)).texts[0]))
    generated = pipe.generate(num_chunks=16, generator=seed(1)).texts[0]
    print("generate             ", repr(generated))
    print("reconstruct          ", repr(pipe.reconstruct(TEXT).texts[0]))
    rebuilt = pipe.denoise_reconstruct(TEXT, noise_level=0.8, generator=seed(0)).texts[0]
    print("denoise_reconstruct  ", repr(rebuilt))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "latents.safetensors"
        shape = tuple(pipe.encode(TEXT, file).latents.shape)
        print(
            "encode               ",
            f"latents {shape}, {file.stat().st_size} bytes ->",
            repr(pipe.decode(file).texts[0]),
        )
    print("infill               ", repr(pipe.infill(GAPPED, gap_length=3, generator=seed(0)).texts[0]))
    print(f"\n{time.perf_counter() - started:.0f} seconds. README.md says what to expect of a model of this size.")


if __name__ == "__main__":
    main()
