"""Make a directory of `zoo/` of a finished run: matrices in bfloat16, no code, a card.

    python scripts/pack_zoo.py emoji-coded zoo/emoji --card emoji_card.md

Matrices are rounded to bfloat16; vectors and buffers, such as the statistics of latents and the
codebook, keep float32. `config.json` says float32, so a model is computed in that.
`tokcom publish zoo/emoji user/name` adds the code.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tokcom.integrity_tokcom import write_checksums

CARD = "README.md"
CODE = "*_tokcom.py"
LEFT = ("run", "__pycache__")  # of a run


def pack(source: Path, target: Path, card: Path | None) -> int:
    """Write `target` from the model directory `source`; returns the number of parameters and
    buffers."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name in LEFT or file.match(CODE) or file.suffix == ".safetensors":
            continue
        if file.name == CARD and (card or (target / CARD).exists()):
            continue
        if file.is_dir():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
        else:
            shutil.copy(file, target / file.name)
    weights = load_file(source / "model.safetensors")
    buffers = {"latent_mean", "latent_std", "codebook", "counts", "sums"}
    packed = {}
    for name, value in weights.items():
        is_matrix = value.ndim >= 2 and name.rpartition(".")[2] not in buffers
        packed[name] = value.to(torch.bfloat16) if is_matrix else value.float()
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    text = json.dumps(config, indent=2) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    if card is not None:
        shutil.copy(card, target / CARD)
    write_checksums(target)
    return sum(value.numel() for value in weights.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="model directory")
    parser.add_argument("target", type=Path, help="directory to write, such as zoo/emoji")
    parser.add_argument("--card", type=Path, help="card (default: that of the run)")
    args = parser.parse_args(argv)
    count = pack(args.source, args.target, args.card)
    size = sum(file.stat().st_size for file in args.target.rglob("*") if file.is_file())
    print(f"{args.target}: {count:,} numbers in {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
