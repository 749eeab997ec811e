"""Use a model as the published TokCom v5.2 did: one script, `--mode`, and its table of parameters.

    python inference.py --mode conditional --prompt "Once upon a time"
    python inference.py --mode generate --num_chunks 64 --temperature 0.7 --batch_size 2
    python inference.py --mode reconstruct --input_text "Some text"
    python inference.py --mode denoise_reconstruct --input_text "Some text" --noise_level 0.5
    python inference.py --mode encode --input_text "Some text" --output_file latents.safetensors
    python inference.py --mode decode --latents_file latents.safetensors
    python inference.py --mode infill --input_text "Once there was a ____ in the wood."

The same work as that of `tokcom generate`, `tokcom infill` and so on (`cli/modes.py`), whose
options are easier to read. A continuation of one prompt is printed while it is written.
"""

import argparse
import importlib.util
import sys

# this directory is the package, so a plain checkout cannot import it by name
if importlib.util.find_spec("tokcom") is None:
    remedy = "run `make setup`, then `.venv/bin/python inference.py`"
    sys.exit(f"error: the package tokcom is not installed; {remedy}.")

from tokcom.cli.errors import report_errors
from tokcom.cli.options import MODES, OPTIONS, HelpFormatter, check_mode, refuse_unused


def build_parser() -> argparse.ArgumentParser:
    """All options of all modes; the help of each says which modes read it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--mode", default="generate", choices=MODES, help="what to do")
    for name, settings in OPTIONS.items():
        # options of every mode are in no mode's list, and name none here
        readers = ", ".join(mode for mode, facts in MODES.items() if name in facts.options)
        text = f"{settings['help']} [{readers}]" if readers else settings["help"]
        parser.add_argument(f"--{name}", **{**settings, "help": text})
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_mode(parser, args.mode, args)
    # what the published table does not have is refused where it has no effect; published commands
    # go on working
    refuse_unused(parser, args.mode, args, ("temperature", "top_p", "batch_size"))
    with report_errors(args.debug):
        from tokcom.cli.modes import run_mode  # imports torch: after all checks of arguments

        run_mode(args)


if __name__ == "__main__":
    main()
