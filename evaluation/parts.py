"""Results of an evaluation in parts: each is written as soon as it is done, and not measured again.

    parts = Parts(output_dir / "results.json", settings)
    accuracy = parts.measure("text to picture", lambda: slow_function())

A run that was stopped goes on where it was. A part counts as done if it was measured with the same
settings, among them the fingerprint of the weights; otherwise it is measured again.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights: the same for the same model, wherever it lies."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # flat and as bytes: numpy knows neither bfloat16 nor scalars without a dimension
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    # 64 bits tell models apart, and nobody attacks this hash
    return digest.hexdigest()[:16]


class Parts:
    """The parts of `file` that were measured with these settings; `.found` maps names to
    results."""

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file = file
        # as the file will hold them, or tuples and paths would never equal what is read back
        self.settings = json.loads(json.dumps(settings, default=str))
        self.found: dict[str, Any] = {}
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved.get("settings") == self.settings:
                self.found = saved.get("parts", {})

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` returns, which JSON must hold, or what it returned in an earlier run."""
        if name not in self.found:
            # a first run returns exactly what a later one reads
            self.found[name] = json.loads(json.dumps(function()))
            self._write()
        return self.found[name]

    def _write(self) -> None:
        """Under another name first, so that a stop leaves the old file or the new one."""
        content = {"settings": self.settings, "parts": self.found}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(self.file.name + ".draft")
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, self.file)
