"""What people try first: the notebooks run from top to bottom, and the folder of the Space works as
it is."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# what `pip install -r space/requirements.txt` does not bring
ALONE = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.modules["tokcom"] = None
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_stored_with_small_outputs_and_without_errors(file):
    assert file.stat().st_size < 40_000
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output.get("name") == "stdout" for output in outputs)
    assert not re.search(r"[ \"]/[a-z]+/", file.read_text())  # no path of whoever ran it


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run_from_top_to_bottom(file, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 60", "STEPS = 8")
    settings = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=900, resources=settings).execute()


def test_the_space_installs_what_remote_code_needs_and_names_its_sdk():
    card = (ROOT / "space" / "README.md").read_text()
    header = card.split("---")[1]
    for line in ("sdk: gradio", "app_file: app.py", "license: mit"):
        assert line in header
    assert len(header.split("short_description: ")[1].splitlines()[0]) <= 60
    wanted = {"torch", "transformers", "diffusers", "accelerate", "gradio"}
    lines = (ROOT / "space" / "requirements.txt").read_text().splitlines()
    assert {line.split(">")[0] for line in lines} == wanted


@pytest.mark.slow
def test_the_space_starts_without_the_package_and_answers(tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    shutil.copytree(ROOT / "space", tmp_path / "space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "TOKCOM_MODEL": str(copy_of_the_model(tmp_path / "model")),
        "GRADIO_SERVER_PORT": str(port),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", ALONE]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path / "space", env=environment, stdout=log, stderr=log
        )
    try:
        client = connect(Client, f"http://127.0.0.1:{port}", process, tmp_path / "log")
        job = client.submit("Once upon a time", 8, 0.8, 0, api_name="/write")
        parts = job.result()
        assert parts[0]["token"].startswith("Once upon a time, ")
        frames = job.outputs()
        assert any(part["class_or_confidence"] == "draft" for frame in frames for part in frame)
        assert "____" not in client.predict("Lily lost her ____.", 0, api_name="/fill")
        assert "nats per token" in client.predict("Once upon a time", api_name="/score")[0]
        with pytest.raises(AppError, match="`prompt` is empty"):
            client.predict("", 8, 0.8, 0, api_name="/write")
    finally:
        process.terminate()
        process.wait(20)


def copy_of_the_model(directory: Path) -> Path:
    """The files of the root that a model repository holds."""
    directory.mkdir()
    names = ["config.json", "generation_config.json", "model.safetensors", "model_index.json"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    for file in [*(ROOT / name for name in names), *ROOT.glob("*_tokcom.py")]:
        shutil.copy(file, directory)
    shutil.copytree(ROOT / "scheduler", directory / "scheduler")
    return directory


def connect(client, address: str, process: subprocess.Popen, log: Path):
    """A client of the page, once it answers."""
    for _ in range(180):
        try:
            return client(address, verbose=False)
        except Exception:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(f"the page did not start: {log.read_text()[-3000:]}")
