"""Settings as YAML text: what stands in a file, and `key.sub=value` overrides on top of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moka_core import ConfigError


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """The nested values that "key.sub=value" items set; a value is read as YAML.

    Raises:
        ConfigError: an item has no "=" or no key, its value is not YAML, or two items contradict each other.

    >>> parse_overrides(["steps=20", "optimiser.learning_rate=5e-3", "adapter.target_modules=[q_proj]"])
    {'steps': 20, 'optimiser': {'learning_rate': 0.005}, 'adapter': {'target_modules': ['q_proj']}}
    """
    nested: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {item!r}: expected key=value or key.sub=value, such as steps=100")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: the value is not valid YAML: {error}") from error
        level = nested
        for part in parts[:-1]:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise ConfigError(f"override {item!r}: {part!r} was set to one value before; it cannot hold settings")
        if parts[-1] in level:
            raise ConfigError(f"override {item!r}: {key.strip()!r} is set twice; give it once")
        level[parts[-1]] = value
    return nested


def merge_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """`values` with the nested overrides in place of what stood there; neither argument changes.

    Raises:
        ConfigError: an override goes below a key that holds one value.
    """
    merged = dict(values)
    for key, value in overrides.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and old is not None:
            if not isinstance(old, Mapping):
                raise ConfigError(
                    f"override {where}{key}.{next(iter(value), '')}: {where}{key} is one value ({old!r}), not settings"
                )
            merged[key] = merge_overrides(old, value, where=f"{where}{key}.")
        else:
            merged[key] = value
    return merged


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The settings in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML, gives a key twice, or holds no settings.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a YAML file that can be read; {error}") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected settings such as 'steps: 100'; got {values!r}")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and 5e-3 is a number as in YAML 1.2, not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice; give it once", nodes[index].start_mark
                )
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
