"""The rooms stand on each other in one direction only, and each can be used without the others' libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("moka_core", "moka_jax", "moka_torch", "conversion", "moka_cli")
MAY_IMPORT = {
    "moka_core": {"moka_core"},
    "moka_jax": {"moka_core", "moka_jax"},
    "moka_torch": {"moka_core", "moka_torch"},
    "conversion": {"moka_core", "conversion"},
    "moka_cli": {"moka_core", "moka_cli"},
}
# Inside functions only: what needs both backends, and the command line, which starts fast by importing late.
MAY_IMPORT_LATE = {
    "conversion/parity.py": {"moka_jax", "moka_torch"},
    "moka_cli": {"conversion", "moka_jax", "moka_torch"},
}


def loaded_by(code: str, *, path: Path = ROOT) -> set[str]:
    """The top-level names in sys.modules after running `code` in a fresh interpreter."""
    script = f"import sys; sys.path.insert(0, {str(path)!r}); {code}; print(*{{m.split('.')[0] for m in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("moka_core", {"jax", "torch", "flax", "peft", "transformers", "safetensors", "typer", "rich"}),
        ("moka_jax, moka_jax.llama, moka_jax.train", {"torch", "peft", "bitsandbytes", "moka_torch", "conversion"}),
        ("moka_torch", {"jax", "flax", "optax", "orbax", "grain", "moka_jax", "conversion"}),
        ("conversion, conversion.parity", {"jax", "torch", "flax", "transformers", "moka_jax", "moka_torch"}),
        ("moka_cli.main", {"jax", "torch", "flax", "transformers", "matplotlib", "moka_jax", "moka_torch"}),
    ],
)
def test_a_room_does_not_load_what_it_must_not(room, forbidden):
    assert not loaded_by(f"import {room}") & forbidden


def test_the_check_above_can_fail(tmp_path):
    (tmp_path / "bad_room.py").write_text("import moka_core\nimport moka_jax\n")
    assert {"jax", "moka_jax"} <= loaded_by("import bad_room", path=tmp_path)


def imports(source: str) -> tuple[set[str], set[str]]:
    """(rooms imported as the module loads, rooms imported inside functions or for type checkers)."""
    early, late = set(), set()

    def visit(node: ast.AST, into: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                into.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                into.add(child.module.split(".")[0])
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inner = late if typing_only or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else into
            visit(child, inner)

    visit(ast.parse(source), early)
    return early & set(ROOMS), late & set(ROOMS)


def wrong_imports(name: str, source: str) -> set[str]:
    room = name.split("/")[0]
    early, late = imports(source)
    may_late = MAY_IMPORT[room] | MAY_IMPORT_LATE.get(name, set()) | MAY_IMPORT_LATE.get(room, set())
    return (early - MAY_IMPORT[room]) | (late - may_late)


def test_imports_point_downward_in_every_file():
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 40
    wrong = {
        str(path.relative_to(ROOT)): wrong_imports(path.relative_to(ROOT).as_posix(), path.read_text())
        for path in files
    }
    assert {name: rooms for name, rooms in wrong.items() if rooms} == {}


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("moka_jax/linear.py", "from moka_torch import attach", {"moka_torch"}),
        ("moka_torch/linear.py", "def f():\n    import moka_jax.linear", {"moka_jax"}),
        ("moka_core/plan.py", "import conversion", {"conversion"}),
        ("conversion/parity.py", "import moka_jax", {"moka_jax"}),
        ("conversion/parity.py", "def f():\n    import moka_jax", set()),
        ("conversion/base_weights.py", "def f():\n    import moka_jax", {"moka_jax"}),
    ],
)
def test_the_rule_on_files_can_fail(name, source, wrong):
    assert wrong_imports(name, source) == wrong
