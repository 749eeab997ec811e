"""Draw docs/idea.png: what the latents of one text decode to while the shipped model denoises them.

python docs/draw_idea.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from tokcom.pipeline_tokcom import TokComPipeline

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Once upon a time there was a little rabbit who lived in a big wood."
TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main() -> None:
    pipe = TokComPipeline.from_pretrained(ROOT)
    size = pipe.chunk_size
    encoded = pipe.encode(TEXT)
    noise = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for t in TIMES:
        signal = pipe.model.channel_times(torch.full_like(noise[..., 0], t))
        ids = pipe.model.to_ids((1 - signal) * noise + signal * encoded.latents)[0].tolist()
        real = encoded.attention_mask[0].tolist()
        tokens = [
            pipe.tokenizer.decode([i]) if r and i < len(pipe.tokenizer) else ""
            for i, r in zip(ids, real)
        ]
        rows.append(
            ["".join(tokens[i : i + size]).replace("\n", "⏎") for i in range(0, len(tokens), size)]
        )

    figure, axes = plt.subplots(figsize=(12, 4.2))
    axes.set_xlim(0, len(rows[0])), axes.set_ylim(-1.6, len(rows)), axes.axis("off")
    for y, (t, row) in enumerate(zip(TIMES, rows)):
        height = len(rows) - 1 - y
        axes.text(-0.1, height + 0.5, f"t = {t:.1f}", ha="right", va="center", fontsize=11)
        for x, text in enumerate(row):
            box = plt.Rectangle(
                (x + 0.03, height + 0.08),
                0.94,
                0.84,
                facecolor=plt.cm.viridis(0.25 + 0.6 * t),
                alpha=0.35,
            )
            axes.add_patch(box)
            axes.text(x + 0.5, height + 0.5, text[:26], ha="center", va="center", fontsize=9)
    caption = (
        f"One box is one latent vector of {encoded.latents.shape[-1]} numbers and decodes to "
        f"{size} tokens at once.\n$x_t = (1 - t)\\,x_0 + t\\,x_1$: generation starts at noise (t = "
        "0); the transformer predicts the clean row (t = 1)."
    )
    axes.text(len(rows[0]) / 2, -0.85, caption, ha="center", va="center", fontsize=11)
    figure.savefig(ROOT / "docs" / "idea.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
