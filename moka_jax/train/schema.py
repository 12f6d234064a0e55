"""The settings of a run as a JSON schema, by which an editor completes and checks a config while it is written."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from moka_core import PRESETS, MokaConfig
from moka_jax.train.adapter_settings import AdapterSettings
from moka_jax.train.checks import Within, without_none
from moka_jax.train.config import TrainConfig

Schema = dict[str, Any]

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
# A preset may give the learning rate, so neither it nor the optimiser has to be there.
_NOT_NEEDED = ("optimiser", "learning_rate")

_GROUPS: Schema = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 5, "maxItems": 5},
}
_COUNT: Schema = {"type": "integer", "minimum": 1}
_SCALE: Schema = {"type": "number", "not": {"const": 0}}
# Fields of `MokaConfig` whose plain form, as `MokaConfig.from_dict` takes it, says more than their type.
_PLAIN_FORMS: dict[str, Schema] = {
    "r": _COUNT,
    "num_shapes": _COUNT,
    "block_entries": _COUNT,
    "lora_terms": {"type": "integer", "minimum": 0},
    "scale": _SCALE,
    "dropout": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "shapes": {"type": "object", "additionalProperties": _GROUPS},
    "target_modules": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
    "r_pattern": {"type": "object", "additionalProperties": _COUNT},
    "shapes_pattern": {"type": "object", "additionalProperties": _GROUPS},
    "scale_pattern": {"type": "object", "additionalProperties": _SCALE},
}


def run_schema() -> Schema:
    """The JSON schema (draft 2020-12) of what `TrainConfig.from_dict` takes: names, types, ranges, choices, defaults.

    It accepts every valid config whose numbers are written as numbers, and refuses unknown keys, missing ones, and
    values of a wrong type or out of range. What two settings say together stands in the descriptions; `TrainConfig`
    checks it.

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
    types_, told = get_type_hints(cls, include_extras=True), _argument_texts(cls)
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
    if get_origin(kind) is Annotated:
        number, limits = get_args(kind)
        return _of_type(number) | _range(limits)
    inner, optional = without_none(kind)
    if optional:
        return _or_null(_of_type(inner))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _of_dataclass(kind)
    raise TypeError(f"expected a type that has a plain form; got {kind!r}")


def _range(limits: Within) -> Schema:
    low, high = (int(end) if end.is_integer() else end for end in limits.ends)
    found = {"minimum" if limits.has_low else "exclusiveMinimum": low}
    return found if math.isinf(high) else found | {"maximum" if limits.has_high else "exclusiveMaximum": high}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _argument_texts(cls: type) -> Mapping[str, str]:
    """What the docstring of a class says of each of its arguments."""
    (section,) = re.findall(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
