"""Compress a document to codes of a few bits per token, and restore it.

    python examples/compress_document.py --document my_text.txt

Trains a small codec with a finite scalar quantiser on the stories that ship with the repository (a
minute), stores the document as codes, reads the file again, and says what it cost and what was
lost. Unlike gzip it loses some words: see docs/quantization.md.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

from tokcom import TokComPipeline
from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.train_accelerate import run
from tokcom.training.config import as_override, load_train_config

ROOT = Path(__file__).resolve().parents[1]
CODEC = [
    "stage=codec",
    "report_to=none",
    "num_samples=0",
    "model.codec_config.quantizer=fsq",
    # 16 channels of 5 levels: 37 bits for a chunk
    f"model.codec_config.fsq_levels={[5] * 16}",
    "model.codec_config.hidden_size=128",
    "codec.max_steps=600",
    "codec.batch_size=32",
]


def read_document(file: str | None) -> str:
    """The text of a file, or of the first held-out story."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    first_line = (
        (ROOT / "sample_data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    return json.loads(first_line)["text"]


def report(pipe: TokComPipeline, text: str, file: Path) -> None:
    """Write `text` as codes to `file`, read it again, and print what that cost and lost."""
    encoded = pipe.encode(text, file)
    restored = pipe.decode(file)
    real = encoded.attention_mask.bool()
    # without the padding, which costs nothing to restore
    kept = (restored.sequences == encoded.sequences)[real].float().mean().item()
    tokens = int(real.sum())
    bits = pipe.model.config.codec_config.bits_per_token
    size = len(text.encode())
    zipped = len(gzip.compress(text.encode(), 9))
    print(f"\n{text[:200]!r}\n->\n{restored.texts[0][:200]!r}\n")
    print(f"{size:,} bytes of text, {tokens:,} tokens, {100 * kept:.1f} % of them restored")
    print(f"codes: {bits:.2f} bits per token, {bits * tokens / 8:,.0f} bytes")
    print(f"file:  {file.stat().st_size:,} bytes, because its integers are wider than the codes")
    print(f"gzip:  {zipped:,} bytes without loss")


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--document", help="text file (default: a held-out story)")
    add_device_option(parser)
    parser.add_argument("--output_dir", help="folder for codec and codes (default: none are kept)")
    parser.add_argument(
        "overrides", nargs="*", help="settings of the training, e.g. codec.max_steps=2000"
    )
    args = parser.parse_intermixed_args(argv)
    text = read_document(args.document)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output_dir or temporary)
        settings = [as_override("output_dir", folder / "codec"), *CODEC, *args.overrides]
        model = run(load_train_config("debug", settings))
        pipe = TokComPipeline.from_pretrained(model).to(args.device)
        report(pipe, text, folder / "document.codes.safetensors")


if __name__ == "__main__":
    main()
