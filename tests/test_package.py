"""Laws of the package: one name, nothing imported before it is asked for, and this checkout is what is tested."""

import ast
import subprocess
import sys
import tomllib

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


@pytest.mark.parametrize("file", REMOTE, ids=lambda file: file.name)
def test_modules_have_no_fallback_imports(file):
    """Remote code imports its neighbours relatively and nothing twice."""
    tree = ast.parse(file.read_text())
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    caught = [ast.unparse(node.type) for node in handlers if node.type is not None]
    in_try = [node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body]
    local = [node for node in in_try if isinstance(node, ast.ImportFrom) and node.level]
    assert not local, f"{file.name} catches {caught} around an import of its own package"
