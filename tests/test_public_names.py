"""Every public name says what it is: a docstring, annotated arguments, and the shape of every array."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PACKAGES = ("moka_core", "moka_jax", "moka_jax.llama", "moka_jax.train", "moka_torch", "conversion")
ARRAYS = re.compile(r"\b(ndarray|jax\.Array|Tensor)\b")
SHAPE = re.compile(r"\([\w·…. ]+,[\w·…., ]*\)|\bshapes?\b|\bscalar\b")  # (out, in), (terms,), "of the same shape"
# Protocols of other libraries, described there.
INHERITED = {"MokaModel.inject_adapter"}


def functions(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """What can be called of a public name, and the text in which its shapes may stand."""
    if inspect.isfunction(value):
        yield name, value, value.__doc__ or ""
    elif inspect.isclass(value):
        for key, member in vars(value).items():
            member = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
            if not key.startswith("_") and inspect.isfunction(member):
                yield f"{name}.{key}", member, f"{value.__doc__ or ''}\n{member.__doc__ or ''}"


def problems(name: str, value: Any) -> Iterator[str]:
    """What a public name lacks."""
    if inspect.isclass(value) and (not value.__doc__ or value.__doc__.startswith(f"{name}(")):  # a dataclass's own
        yield f"{name}: no docstring"
    for path, function, text in functions(name, value):
        if not function.__doc__:
            yield f"{path}: no docstring"
        signature = inspect.signature(function)
        given = {key: one.annotation for key, one in signature.parameters.items() if key not in ("self", "cls")}
        for key, annotation in {**given, "return": signature.return_annotation}.items():
            if annotation is inspect.Signature.empty:
                yield f"{path}: {key} has no type"
            elif ARRAYS.search(str(annotation)) and not SHAPE.search(text) and path not in INHERITED:
                yield f"{path}: {key} is an array, and no shape is told"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring_types_and_shapes(package):
    module = importlib.import_module(package)
    assert module.__doc__
    assert [problem for name in module.__all__ for problem in problems(name, getattr(module, name))] == []


def test_the_check_above_can_fail():
    def bare(x, y: np.ndarray):  # noqa: F821
        pass

    def said(x: np.ndarray) -> np.ndarray:  # noqa: F821
        """The transpose, (in, out), of x (out, in)."""

    assert list(problems("bare", bare)) == [
        "bare: no docstring",
        "bare: x has no type",
        "bare: y is an array, and no shape is told",
        "bare: return has no type",
    ]
    assert list(problems("said", said)) == []
    assert list(problems("Bare", type("Bare", (), {}))) == ["Bare: no docstring"]
