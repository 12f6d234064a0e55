"""Checks of single settings; every refusal names the setting, what was expected, and what came."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from moka_core import ConfigError
from moka_core.config import check_keys


def named_values(values: Any, *, where: str) -> Mapping[str, Any]:
    """The values, once they are known to be a mapping with text as keys."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings (key: value); got {values!r}")
    stray = [key for key in values if not isinstance(key, str)]
    if stray:
        raise ConfigError(f"{where}: expected names as keys; got {stray[0]!r}")
    return values


def constructor_arguments(cls: type, values: Any, *, where: str) -> dict[str, Any]:
    """The arguments of a dataclass, after every unknown and every missing key has been named."""
    fields = dataclasses.fields(cls)
    arguments = dict(named_values(values, where=where))
    check_keys(arguments, [f.name for f in fields], where=where)
    needed = [f.name for f in fields if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; needed: {', '.join(needed)}")
    return arguments


def check_path(name: str, value: Any) -> None:
    """Text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}: expected a path; got {value!r}")


def check_whole(name: str, value: Any, *, least: int) -> None:
    """An int of at least `least`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number >= {least}; got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of the choices; 1 is not True."""
    if not any(value is choice if isinstance(choice, bool) else value == choice for choice in choices):
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}")


def number(where: str, name: str, value: Any, limits: str) -> float:
    """A finite float within limits; text such as "5e-3" counts, since plain PyYAML reads it as text.

    Args:
        where: the settings that it belongs to, such as "optimiser.", or nothing.
        limits: what must hold for it, as an interval: "(0, inf)", "[0, 1)", "[0, 1]" or "[0, inf)".
    """
    label = f"{where}{name}"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{label}: expected a finite number; got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{label}: expected a finite number; got {value!r}")
    low, high = (float(end) for end in limits[1:-1].split(","))
    if not (low < value < high or (value == low and limits[0] == "[") or (value == high and limits[-1] == "]")):
        from_low, to_high = ("<=" if limits[0] == "[" else "<"), ("<=" if limits[-1] == "]" else "<")
        told = f"{low:g} {from_low} {name} {to_high} {high:g}"
        if math.isinf(high):
            told = f"{name} {'>=' if limits[0] == '[' else '>'} {low:g}"
        raise ConfigError(f"{label}: expected {told}; got {float(value)!r}")
    return float(value)
