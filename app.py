"""The page of `tokcom app`, with the same options. The page of a Space of the Hub is
`space/app.py`."""

import importlib.util
import sys

# this directory is the package, so a plain checkout cannot import it by name
if importlib.util.find_spec("tokcom") is None:
    remedy = "run `make setup`, then `.venv/bin/python app.py`"
    sys.exit(f"error: the package tokcom is not installed; {remedy}.")

from tokcom.cli.main import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
