"""Checks of settings against the types of their fields; a refusal names the setting, what was expected, what came."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from moka_core import ConfigError
from moka_core.config import check_finite, check_keys


@dataclass(frozen=True)
class Within:
    """Stands in the type of a number: the interval that it lies in, such as "(0, inf)", "[0, 1)" or "[1, inf)"."""

    limits: str

    @property
    def ends(self) -> tuple[float, float]:
        """Its lower and its upper end."""
        low, high = (float(end) for end in self.limits[1:-1].split(","))
        return low, high

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        return low < value < high or (value == low and self.has_low) or (value == high and self.has_high)

    @property
    def has_low(self) -> bool:
        """Whether the lower end belongs to it."""
        return self.limits[0] == "["

    @property
    def has_high(self) -> bool:
        """Whether the upper end belongs to it."""
        return self.limits[-1] == "]"

    def told(self, name: str) -> str:
        """What must hold for a setting of this name."""
        low, high = self.ends
        if math.isinf(high):
            return f"{name} {'>=' if self.has_low else '>'} {low:g}"
        return f"{low:g} {'<=' if self.has_low else '<'} {name} {'<=' if self.has_high else '<'} {high:.10g}"


Count = Annotated[int, Within("[1, inf)")]


def check_fields(settings: Any, where: str = "") -> None:
    """Check every field of a frozen dataclass against its type; numbers that are meant as floats become floats.

    Args:
        where: what stands before the names in messages, such as "optimiser.".

    Raises:
        ConfigError: a path is blank, a number beyond its interval (see `Within`), a choice none of those that there
            are, or a value of another type.
    """
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        inner, optional = without_none(kind)
        if value is not None or not optional:
            object.__setattr__(settings, name, _checked(f"{where}{name}", value, inner, optional=optional))


def without_none(kind: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    (inner,) = (part for part in get_args(kind) if part is not type(None))
    return inner, True


def _checked(label: str, value: Any, kind: Any, *, optional: bool) -> Any:
    limits = Within("(-inf, inf)")
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
    if kind is str:
        check_path(label, value)
    elif kind is int:
        check_whole(label, value, limits)
    elif kind is float:
        return _number(label, value, limits)
    elif kind is bool:
        check_choice(label, value, (True, False))
    elif get_origin(kind) is Literal:
        check_choice(label, value, get_args(kind))
    elif not isinstance(value, kind):
        raise ConfigError(f"{label}: expected {kind.__name__}{' or None' * optional}; got {value!r}")
    return value


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


def check_whole(name: str, value: Any, limits: Within) -> None:
    """An int within limits; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in limits:
        told = limits.told(name)
        told = told.removeprefix(name) if told.startswith(name) else f", {told}"
        raise ConfigError(f"{name}: expected a whole number{told}; got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of the choices; 1 is not True."""
    if not any(value is choice if isinstance(choice, bool) else value == choice for choice in choices):
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}")


def _number(label: str, value: Any, limits: Within) -> float:
    """A finite float within limits; text such as "5e-3" counts, since plain PyYAML reads it as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{label}: expected a finite number; got {value!r}") from None
    value = check_finite(label, value)
    if value not in limits:
        raise ConfigError(f"{label}: expected {limits.told(label.rpartition('.')[2])}; got {value!r}")
    return value
