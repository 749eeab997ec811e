"""What the harness needs to run on checkouts of several versions."""

import importlib
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """A module of `tokcom.training` that version 0.2 had at its root."""
    try:
        return importlib.import_module(f"tokcom.training.{name}")
    except ImportError:
        return importlib.import_module(f"tokcom.{name}")
