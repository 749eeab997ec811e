"""Trackers: scalar metrics under the documented names, and sample tables in whatever form the
tracker has."""

import importlib.util

import numpy as np
from accelerate import Accelerator
from PIL import Image


def check_tracker(name: str) -> None:
    """Raise `ValueError` if the tracker's package is missing; accelerate would silently log
    nothing."""
    module = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}.get(name)
    # asked without importing it, which takes seconds
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(
            f"`report_to` is {name!r} but the package is not installed; pip install {module}, or "
            "use none."
        )


def log_table(
    accelerator: Accelerator, name: str, columns: list[str], rows: list[list], step: int
) -> None:
    """Write a table of samples to every active tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += [
                # a Markdown table, in which | ends a cell and a line break the row
                "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |"
                for row in rows
            ]
            tracker.writer.add_text(name, "\n".join(lines), step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Table(columns=columns, data=rows)}, step=step)
        elif tracker.name == "trackio":
            import pandas
            import trackio

            tracker.log(
                {name: trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step
            )


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture to every tracker that shows some."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            # TensorBoard expects channels first unless it is told
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            # a batch of one, (1, H, W, 3)
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, **options)
