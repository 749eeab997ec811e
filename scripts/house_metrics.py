"""Count what makes a tree hard to live in, so that two trees can be compared:
`python scripts/house_metrics.py TREE [TREE ...]`.

Definitions, over the Python files that git tracks outside tests/:

- *root files*: Python files at the root.
- *largest file*, *longest function*: in lines, from `def` to the last statement.
- *long lines*: share of non-empty lines over 100 characters.
- *tuple packings*: assignments `a, b = x, y` with as many values as targets, per 100 lines of code.
- *comments*: whole-line and trailing comments per 100 lines of code, shape comments included.
- *modality branches*: conditions (`if`, `elif`, conditional expressions, `assert`, comprehension
  filters) that mention a modality or one of its codec classes, `isinstance` and `getattr` included,
  and dictionaries with several modalities as keys.
- *fallback lines*: lines of `try` / `except ImportError` around imports of the project's own
  modules.
- *fields that never vary*: configuration fields to which no preset gives a value.
- *README lines*.
"""

import argparse
import ast
import re
import subprocess
import tokenize
from pathlib import Path

LONG = 100  # characters
MODALITY = re.compile(
    r"modality|has_tokens|\bkind\b|'(image|video|audio|several)'|(Style|Video|Color|Composite|Audio)Codec"
)


def python_files(tree: Path) -> list[Path]:
    """Tracked Python files outside tests/."""
    names = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=tree, capture_output=True, text=True, check=True
    ).stdout.split()
    return [tree / name for name in names if not name.startswith("tests/")]


def comments_of(file: Path) -> int:
    """Number of comments in a file."""
    with file.open("rb") as stream:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(stream.readline))


def is_packing(node: ast.AST) -> bool:
    """Whether a node is an assignment such as `a, b = x, y`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    return isinstance(target, ast.Tuple) and len(target.elts) == len(node.value.elts) > 1


def modality_branches(tree: ast.AST) -> int:
    """Places at which the code chooses by modality."""
    count = 0
    for node in ast.walk(tree):
        tests: list[ast.AST] = []
        if isinstance(node, ast.If | ast.IfExp | ast.Assert | ast.While):
            tests = [node.test]
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            count += len(set(keys) & {"text", "image", "video", "audio", "several"}) > 1
            # a table, not a choice: only its keys count
            continue
        count += any(MODALITY.search(ast.unparse(test)) for test in tests)
    return count


def fallback_lines(tree: ast.AST) -> int:
    """Lines of `try` blocks that import the project's own modules in two ways."""
    count = 0
    for node in ast.walk(tree):
        own = isinstance(node, ast.Try) and any(
            isinstance(x, ast.ImportFrom) and x.level for x in node.body
        )
        count += (node.end_lineno - node.lineno + 1) if own else 0
    return count


def constant_fields(tree: Path) -> int:
    """Fields of the configurations that no preset names."""
    fields: set[str] = set()
    used = "\n".join(file.read_text(encoding="utf-8") for file in tree.glob("presets/*.yaml"))
    for file in tree.glob("configuration*_tokcom.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                fields |= {
                    x.target.id
                    for x in node.body
                    if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
                }
        # old trees have their presets at the end of the configuration
        start = re.search(r"^def _pixels|^PRESETS", text, re.MULTILINE)
        used += text[start.start() :] if start else ""
    return sum(not re.search(rf"\b{name}\b", used) for name in fields)


def measure(tree: Path) -> dict[str, str]:
    """All metrics of one tree, as text."""
    files = python_files(tree)
    lines = [
        line
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    sizes = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{file.name}:{node.name}")
        for file, code in trees.items()
        for node in ast.walk(code)
        if isinstance(node, ast.FunctionDef)
    ]
    packings = sum(is_packing(node) for code in trees.values() for node in ast.walk(code))
    largest = max(sizes, key=sizes.get)
    longest = max(functions)
    hundreds = len(lines) / 100
    return {
        "root files": str(sum(file.parent == tree for file in files)),
        "largest file": f"{sizes[largest]} ({largest.name})",
        "longest function": f"{longest[0]} ({longest[1]})",
        "functions over 60 lines": str(sum(size > 60 for size, _ in functions)),
        "long lines": f"{sum(len(line) > LONG for line in lines) / len(lines):.1%}",
        "tuple packings per 100 lines": f"{packings / hundreds:.2f}",
        "comments per 100 lines": f"{sum(map(comments_of, files)) / hundreds:.1f}",
        "modality branches": str(sum(map(modality_branches, trees.values()))),
        "fields that never vary": str(constant_fields(tree)),
        "fallback lines": str(sum(map(fallback_lines, trees.values()))),
        "README lines": str(len((tree / "README.md").read_text(encoding="utf-8").splitlines())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", type=Path, nargs="+", help="checkouts to measure")
    args = parser.parse_args()
    results = [measure(tree.resolve()) for tree in args.trees]
    print("| metric |" + "".join(f" {tree} |" for tree in args.trees))
    print("|---|" + "---|" * len(results))
    for name in results[0]:
        print(f"| {name} |" + "".join(f" {result[name]} |" for result in results))


if __name__ == "__main__":
    main()
