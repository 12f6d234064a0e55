"""The demo's data: what the functions of Python's own standard library do, by their docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests, vendored copies, and packages that exist only to be run.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "pydoc_data",
    "__phello__",
}
_LONGEST = 320
_SHORTEST = 24


def build_pairs() -> list[dict[str, str]]:
    """Prompt and completion for every documented public function and method of this Python, sorted by name.

    The prompt asks what `module.function` does; the completion is the first paragraph of its docstring. Left out
    are paragraphs shorter than 24 or longer than 320 characters, and every paragraph that came before under
    another name, in upper or lower case, so that no completion stands twice.
    """
    pairs, seen = [], set()
    for name, docstring in sorted({**dict(_from_builtins()), **dict(_from_sources())}.items()):
        paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        if _SHORTEST <= len(paragraph) <= _LONGEST and paragraph.lower() not in seen:
            seen.add(paragraph.lower())
            pairs.append({"prompt": f"What does {name} do?", "completion": paragraph})
    return pairs


def write_splits(folder: Path, *, held_out: int, seed: int) -> tuple[Path, Path]:
    """train.jsonl and eval.jsonl in a folder: a fixed shuffle of `build_pairs`, the first `held_out` held out."""
    from conversion.new_folder import make_folder, new_file

    pairs = build_pairs()
    random.Random(seed).shuffle(pairs)
    make_folder(folder)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, (pairs[held_out:], pairs[:held_out]), strict=True):
        with new_file(path) as draft:
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def _from_sources() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) from the library's source files; nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _documented(ast.parse(path.read_bytes()), module)


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, name)
            elif docstring := ast.get_docstring(child):
                yield name, docstring


def _from_builtins() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of functions that have no source: those of modules compiled into Python."""
    for module_name in ("builtins", "math", "itertools", "time", "cmath", "binascii", "zlib", "array", "select"):
        module = sys.modules.get(module_name) or __import__(module_name)
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_") and inspect.isbuiltin(value) and value.__doc__:
                yield f"{module_name}.{name}", value.__doc__
