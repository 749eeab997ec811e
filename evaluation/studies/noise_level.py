"""Count the tokens of a text that `denoise_reconstruct` leaves unchanged at each noise level.

python -m tokcom.evaluation.studies.noise_level --model . --data held_out.parquet
"""

import argparse

import datasets
import torch
from tqdm.auto import tqdm

from tokcom.cli.errors import report_errors
from tokcom.cli.loading import add_device_option
from tokcom.pipeline_tokcom import TokComPipeline

LEVELS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # shares that are kept: 0 is pure noise


def share_kept(pipe: TokComPipeline, texts: list[str], level: float) -> float:
    """Share of unchanged tokens of `texts` at one level. Text i has seed i."""
    equal = count = 0
    for seed, text in enumerate(tqdm(texts, desc=f"noise_level {level:g}", leave=False)):
        real = pipe.encode(text).sequences[0]
        output = pipe.denoise_reconstruct(
            text, level, generator=torch.Generator().manual_seed(seed)
        )
        mask = output.attention_mask[0].bool()
        # sums over all texts, so that each token counts alike
        equal += int((output.sequences[0] == real)[mask].sum())
        count += int(mask.sum())
    return equal / count


@report_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=".", help="TokCom model directory or Hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--data", required=True, help="parquet file with held-out text in a column `text`"
    )
    parser.add_argument(
        "--texts", type=int, default=24, help="documents that are used (default: %(default)s)"
    )
    parser.add_argument(
        "--characters", type=int, default=300, help="of each, from its start (default: %(default)s)"
    )
    add_device_option(parser)
    args = parser.parse_args(argv)
    pipe = TokComPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    texts = datasets.load_dataset("parquet", data_files=args.data, split="train")["text"][
        : args.texts
    ]
    texts = [text[: args.characters] for text in texts]
    for level in LEVELS:
        print(f"{level:g}: {share_kept(pipe, texts, level):.1%}", flush=True)


if __name__ == "__main__":
    main()
