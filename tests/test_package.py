"""Laws of the package: one name, nothing imported before it is asked for, and this checkout is what
is tested."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from helpers import ROOT

import tokcom

REMOTE = sorted(ROOT.glob("*_tokcom.py"))


def test_the_package_under_test_is_this_checkout():
    assert tokcom.__file__ == str(ROOT / "__init__.py")


def test_importing_the_package_imports_nothing_else():
    code = "import sys, tokcom; print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_found_and_others_are_named():
    for name in tokcom.__all__:
        assert getattr(tokcom, name).__name__ == name
    with pytest.raises(AttributeError, match="'TokComModle'.*TokComModel"):
        _ = tokcom.TokComModle


def test_version_is_that_of_the_project_file():
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        == tokcom.__version__
    )


def test_every_package_of_the_checkout_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in ROOT.glob("*/**/__init__.py")}
    found = {".".join(["tokcom", *f.parts]) for f in folders if f.parts[0][0] not in "._"}
    assert found - set(listed) == set()


@pytest.mark.slow
def test_a_wheel_holds_the_small_model_and_writes_in_an_empty_folder(tmp_path):
    """Installed without the checkout, `tokcom generate` needs no model, no network and none of the
    extras."""
    copy = tmp_path / "checkout"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in names.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(build, cwd=copy, check=True)
    (wheel,) = tmp_path.glob("tokcom-*.whl")
    parts = {name.split("/")[1] for name in zipfile.ZipFile(wheel).namelist() if "/" in name}
    assert not parts & {"tests", "docs", "sample_data", "zoo", "notebooks", "space", "examples"}
    assert wheel.stat().st_size < 30e6
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
for name in ("datasets", "omegaconf", "pyarrow", "gradio", "fastapi", "librosa", "av"):
    sys.modules[name] = None  # importing it fails
from tokcom.cli.main import main
main(["generate", "Once upon a time", "--seed", "0", "--num_generate_chunks", "4"])
import tokcom
assert tokcom.__file__.startswith({str(site)!r})
assert tokcom.load_pipeline().model.config.is_causal_lm
main(["serve"])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("[1] Once upon a time") and len(done.stdout) > 40, done.stderr
    assert done.returncode == 1 and "pip install 'tokcom[serve]'" in done.stderr


@pytest.mark.parametrize("file", REMOTE, ids=lambda file: file.name)
def test_modules_have_no_fallback_imports(file):
    """Remote code imports its neighbours relatively and nothing twice."""
    tree = ast.parse(file.read_text())
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    caught = [ast.unparse(node.type) for node in handlers if node.type is not None]
    in_try = [node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body]
    local = [node for node in in_try if isinstance(node, ast.ImportFrom) and node.level]
    assert not local, f"{file.name} catches {caught} around an import of its own package"
