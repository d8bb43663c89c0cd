"""The house rules of docs/architecture.md: a folder imports only folders below it, and no file of ours is imported late."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"constants", "common"},
    {"ops"},
    {"data", "strength"},
    {"models", "kernels"},
    {"decoding", "serving", "warmstart"},
    {"calibration", "explanation"},
    {"evaluation"},
    {"demo"},
    {"cli"},
]
"""From the ground up; folders of one floor do not import one another."""

FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}
FILES = [path for folder in ("svdecode", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
LONGEST = 300


def room_of(path: Path) -> str:
    """The folder of a file, or its name where it lies in svdecode/ itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported(tree: ast.Module) -> list[tuple[str, int, bool]]:
    """(dotted name below svdecode, line, whether inside a function) of every import of our own code that runs."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "svdecode":
            below = node.module.partition(".")[2]
            found.extend((f"{below}.{alias.name}".lstrip("."), node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "svdecode"]
            found.extend((name.partition(".")[2], node.lineno, inside) for name in ours)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def violations(path: Path, text: str) -> list[str]:
    """What a file's imports break."""
    room = room_of(path)
    broken = []
    for name, line, late in imported(ast.parse(text)):
        target = name.split(".")[0]
        where = f"{path.name}:{line} imports svdecode.{name}"
        if late and room != "cli":
            broken.append(f"{where} inside a function")
        if target not in FLOOR_OF:
            broken.append(f"{where}, which is on no floor")
        elif target != room and FLOOR_OF[target] >= FLOOR_OF[room]:
            broken.append(f"{where}, which is not below {room}")
    return broken


# The package's own __init__ and __main__ are the doors: lazy public names, and the command line.
@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) not in ("__init__", "__main__")], ids=str)
def test_imports_point_down(path):
    assert violations(path, path.read_text()) == []


def test_files_of_a_folder_do_not_import_one_another_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("svdecode."): path for path in FILES}
    edges = {}
    for name, path in names.items():
        below = [target for target, _, _ in imported(ast.parse(path.read_text()))]
        edges[name] = {t if t in names else t.rpartition(".")[0] for t in below} & set(names)
    done, path = set(), []

    def walk(name: str) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done and not name.endswith("__init__"):
            path.append(name)
            for target in sorted(edges[name]):
                walk(target)
            path.pop()
            done.add(name)

    for name in sorted(names):
        walk(name)


def test_the_rules_are_seen_to_bite():
    planted = ROOT / "svdecode" / "strength" / "planted.py"
    assert "not below strength" in violations(planted, "from svdecode.models.steer import steer")[0]
    assert "not below strength" in violations(planted, "import svdecode.data.sources")[0]
    assert "inside a function" in violations(planted, "def f():\n    from svdecode.ops import validation")[0]
    assert "on no floor" in violations(planted, "from svdecode import steer")[0]
    assert violations(planted, "if TYPE_CHECKING:\n    from svdecode.cli.app import main") == []
    assert violations(planted, "from svdecode.strength.estimators import exact\nfrom svdecode.ops import mu") == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_longer_than_a_reader_holds(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_every_subpackage_says_what_it_is_for_and_exports_nothing_else():
    for path in ROOT.glob("svdecode/*/__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        if path.parent.name not in ("ops", "serving"):  # these register the operators, and have a lazy public name
            assert len(tree.body) == 1, path
