"""Check the types of the public surface with mypy: `python scripts/check_types.py`.

mypy finds the package by the name of its folder, and a clone may be called anything, so it looks at
a link.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "tokcom",
    "tokcom.configuration_tokcom",
    "tokcom.configuration_codec_tokcom",
    "tokcom.modeling_tokcom",
    "tokcom.modeling_causal_tokcom",
    "tokcom.objective_tokcom",
    "tokcom.scheduling_tokcom",
    "tokcom.processing_tokcom",
    "tokcom.pictures_tokcom",
    "tokcom.sounds_tokcom",
    "tokcom.pipeline_base_tokcom",
    "tokcom.pipeline_tokcom",
    "tokcom.pipeline_media_tokcom",
    "tokcom.training.config",
    "tokcom.training.presets",
    "tokcom.cli.main",
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokcom").symlink_to(ROOT, target_is_directory=True)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        # beside the sources, since the folder of the link is deleted
        command += ["--cache-dir", str(ROOT / ".mypy_cache")]
        for module in MODULES:
            command += ["-m", module]
        # run where `tokcom` is the link, or mypy would find each file twice under two names
        sys.exit(subprocess.run(command, cwd=folder).returncode)


if __name__ == "__main__":
    main()
