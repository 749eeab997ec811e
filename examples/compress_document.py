"""Compress a document to codes of a few bits per token, and restore it.

    python examples/compress_document.py --document my_text.txt

Trains a small codec with a finite scalar quantiser on the stories that ship with the repository (a
minute), stores the document as codes, reads the file again, and says what it cost and what was
lost. Lossy, unlike gzip: see docs/quantization.md.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

from tokcom.pipeline_tokcom import TokComPipeline
from tokcom.train_accelerate import run
from tokcom.training.config import load_train_config

ROOT = Path(__file__).resolve().parents[1]
CODEC = [
    "model.codec_config.quantizer=fsq",
    f"model.codec_config.fsq_levels={[5] * 16}",
    "model.codec_config.hidden_size=128",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--document", help="text file; by default a held-out story")
    parser.add_argument("--output_dir", help="where codec and codes are kept; by default nowhere")
    parser.add_argument(
        "overrides", nargs="*", help="settings of the training, e.g. codec.max_steps=2000"
    )
    args = parser.parse_intermixed_args(argv)
    if args.document:
        text = Path(args.document).read_text()
    else:
        text = json.loads((ROOT / "sample_data" / "held_out.jsonl").read_text().splitlines()[0])[
            "text"
        ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output_dir or temporary)
        settings = [
            f"output_dir={folder}/codec",
            "stage=codec",
            "report_to=none",
            "num_samples=0",
            *CODEC,
        ]
        settings += ["codec.max_steps=600", "codec.batch_size=32"]
        pipe = TokComPipeline.from_pretrained(
            run(load_train_config("debug", settings + args.overrides))
        )
        file = folder / "document.codes.safetensors"
        encoded = pipe.encode(text, file)
        restored = pipe.decode(file)
        real = encoded.attention_mask.bool()
        kept = (restored.sequences == encoded.sequences)[real].float().mean().item()
        tokens, bits = int(real.sum()), pipe.model.config.codec_config.bits_per_token
        print(f"\n{text[:200]!r}\n->\n{restored.texts[0][:200]!r}\n")
        print(
            f"{len(text.encode()):,} bytes of text, {tokens:,} tokens; {100 * kept:.1f} % of the tokens are restored"
        )
        print(
            f"codes: {bits:.2f} bits per token, {bits * tokens / 8:,.0f} bytes ({file.stat().st_size:,} in the file, whose"
        )
        print(
            f"integers are wider); gzip: {len(gzip.compress(text.encode(), 9)):,} bytes without loss"
        )


if __name__ == "__main__":
    main()
