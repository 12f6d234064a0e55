"""The settings of a run as a JSON schema, by which an editor completes and checks a config while it is written."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moka_core import PRESETS, MokaConfig
from moka_jax.train.adapter_settings import AdapterSettings
from moka_jax.train.config import TrainConfig

Schema = dict[str, Any]

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
# A preset may give the learning rate, so neither it nor the optimiser has to be there.
_NOT_NEEDED = ("optimiser", "learning_rate")

_GROUPS: Schema = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 5, "maxItems": 5},
}
# Fields of `MokaConfig` whose plain form, as `MokaConfig.from_dict` takes it, is another than its type.
_PLAIN_FORMS: dict[str, Schema] = {
    "shapes": {"type": "object", "additionalProperties": _GROUPS},
    "target_modules": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
    "r_pattern": {"type": "object", "additionalProperties": {"type": "integer"}},
    "shapes_pattern": {"type": "object", "additionalProperties": _GROUPS},
    "scale_pattern": {"type": "object", "additionalProperties": {"type": "number"}},
}


def run_schema() -> Schema:
    """The JSON schema (draft 2020-12) of what `TrainConfig.from_dict` takes: names, types, choices, defaults.

    It accepts every valid config whose numbers are written as numbers, and refuses unknown keys, missing ones and
    values of a wrong type. Ranges, and what two settings say together, stand in the descriptions; `TrainConfig` checks
    them.

    >>> run_schema()["required"]
    ['base', 'output', 'data', 'steps', 'batch_size']
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A training run of MoKA",
        **_of_dataclass(TrainConfig),
    }


def _of_dataclass(cls: type) -> Schema:
    if cls is AdapterSettings:
        return _of_adapter()
    types_, told = get_type_hints(cls), _argument_texts(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        properties[field.name] = _of_type(types_[field.name]) | {"description": told[field.name]}
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = field.default
        elif field.default_factory is dataclasses.MISSING and field.name not in _NOT_NEEDED:
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _of_adapter() -> Schema:
    """`preset` or `start`, and beside them the fields of `MokaConfig`; with `start`, null leaves one as it is."""
    types_, told = get_type_hints(MokaConfig), _argument_texts(MokaConfig)
    properties: Schema = {
        name: _or_null(_PLAIN_FORMS.get(name) or _of_type(types_[name])) | {"description": told[name]}
        for name in types_
    }
    own, texts = get_type_hints(AdapterSettings), _argument_texts(AdapterSettings)
    del own["overrides"]
    properties |= {name: _of_type(own[name]) | {"description": texts[name]} for name in own}
    properties["preset"] |= _or_null({"enum": list(PRESETS)})
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _of_type(kind: Any) -> Schema:
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (part for part in get_args(kind) if part is not type(None))
        return _or_null(_of_type(inner))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _of_dataclass(kind)
    raise TypeError(f"expected a type that has a plain form; got {kind!r}")


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _argument_texts(cls: type) -> Mapping[str, str]:
    """What the docstring of a class says of each of its arguments."""
    (section,) = re.findall(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
