"""The settings of a training run: frozen, validated values, read from YAML and `key.sub=value` overrides."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from moka_core import PRESETS, Architecture, ConfigError, MokaConfig, preset
from moka_core.config import RUNTIME_FIELDS, check_keys, field_values

Quantise = Literal["nf4-double", "nf4", "none"]
Dtype = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "constant"]

# What may differ between a checkpoint and the run that resumes it: where files are and how often something is done.
# (That the base model is the same one is seen from its fingerprint, not from its folder.)
FREE_FIELDS = ("base", "output", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """A preset of `moka_core`, and the fields of `MokaConfig` in which the run differs from it.

    Args:
        preset: name of a preset.
        overrides: fields of `MokaConfig`; in YAML they stand beside `preset`.

    Raises:
        ConfigError: the preset or a field is unknown, or a value is out of range.
    """

    preset: str = "paper"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            raise ConfigError(f"adapter.preset: expected one of {', '.join(PRESETS)}; got {self.preset!r}")
        overrides = _mapping(self.overrides, where="adapter.overrides")
        check_keys(overrides, [f.name for f in dataclasses.fields(MokaConfig)], where="adapter")
        object.__setattr__(self, "overrides", dict(self.overrides))
        if self.preset == "paper":
            self.moka_config()
        else:
            MokaConfig.from_dict({key: value for key, value in self.overrides.items() if key != "shapes"})

    def moka_config(self, model: Architecture | None = None) -> MokaConfig:
        """The adapter's config, fitted to a model.

        Args:
            model: the architecture; some presets need it.

        Raises:
            ConfigError: see `moka_core.preset` and `MokaConfig`.
        """
        return preset(self.preset, model, **field_values(self.overrides, where="adapter"))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {"preset": self.preset, **self.overrides}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterSettings:
        """The settings that `to_dict` wrote, or that a user typed: `preset`, and fields of `MokaConfig` beside it."""
        values = _mapping(values, where="adapter")
        check_keys(values, ["preset", *(f.name for f in dataclasses.fields(MokaConfig))], where="adapter")
        overrides = {key: value for key, value in values.items() if key != "preset"}
        return cls(preset=values.get("preset", "paper"), overrides=overrides)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are learned and held out, and how they become tokens.

    Args:
        train: JSON-lines file of the examples to learn.
        eval: JSON-lines file of the held-out examples, or None for no evaluation.
        max_length: longest example in tokens, at least 2; what is longer is cut, and counted.
        chat_template: write prompt and completion as a user's and an assistant's message with the tokenizer's
            chat template, if it has one.
    """

    train: str
    eval: str | None = None
    max_length: int = 512
    chat_template: bool = True

    def __post_init__(self) -> None:
        _text("data.train", self.train)
        if self.eval is not None:
            _text("data.eval", self.eval)
        _whole("data.max_length", self.max_length, least=2)
        _choice("data.chat_template", self.chat_template, (True, False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """The settings from plain values; a field left out takes its default."""
        return cls(**_arguments(cls, values, where="data"))


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, its learning rate over the steps, and gradient clipping.

    The learning rate of step s = 0, 1, … of S, with w warm-up steps, peak η and final fraction f:

        η · (s+1)/w                                        s < w
        η · (f + (1-f) · (1 + cos(π (s-w)/(S-w))) / 2)     s ≥ w, "cosine"
        η                                                  s ≥ w, "constant"

    Args:
        learning_rate: the peak η, above 0.
        name: "adamw".
        warmup_steps: w; fewer than the steps of the run.
        schedule: "cosine" or "constant".
        final_fraction: f, 0 <= f <= 1; "constant" does not read it.
        weight_decay: decoupled decay of every trained entry, at least 0.
        clip_norm: longest gradient over all trained entries; None for no clipping.
        b1, b2: decay of the two moments, 0 <= b < 1.
        eps: added to the root of the second moment, above 0.
    """

    learning_rate: float
    name: str = "adamw"
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _choice("optimiser.name", self.name, ("adamw",))
        _choice("optimiser.schedule", self.schedule, ("cosine", "constant"))
        _whole("optimiser.warmup_steps", self.warmup_steps, least=0)
        for name, low, high, low_ok, high_ok in (
            ("learning_rate", 0, math.inf, False, False),
            ("final_fraction", 0, 1, True, True),
            ("weight_decay", 0, math.inf, True, False),
            ("clip_norm", 0, math.inf, False, False),
            ("b1", 0, 1, True, False),
            ("b2", 0, 1, True, False),
            ("eps", 0, math.inf, False, False),
        ):
            if name == "clip_norm" and self.clip_norm is None:
                continue
            value = _number(f"optimiser.{name}", getattr(self, name))
            if not (low < value < high or (low_ok and value == low) or (high_ok and value == high)):
                sign_low, sign_high = "<=" if low_ok else "<", "<=" if high_ok else "<"
                limits = f"{name} > {low}" if math.isinf(high) else f"{low} {sign_low} {name} {sign_high} {high}"
                limits = f"{name} >= {low}" if math.isinf(high) and low_ok else limits
                raise ConfigError(f"optimiser.{name}: expected {limits}; got {value!r}")
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimiserConfig:
        """The settings from plain values; a field left out takes its default."""
        return cls(**_arguments(cls, values, where="optimiser"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run: with the same config, data and base, the same adapter comes out, bit for bit.

    Args:
        base: Hugging Face folder of the base model.
        output: folder for checkpoints and metrics.
        data: examples and their form.
        optimiser: AdamW and its schedule.
        steps: optimiser steps, at least 1.
        batch_size: examples of one forward pass.
        accumulate: forward passes whose gradients make one step; a step learns from batch_size·accumulate examples.
        quantise: "nf4-double", "nf4" or "none", for the base weights.
        dtype: "float32" or "bfloat16", of the computation.
        remat: recompute each layer's inside in the backward pass: less memory, a third more work.
        adapter: preset and overrides.
        eval_every: steps between evaluations; the first is before step 1, the last after the final step.
        eval_batches: batches of one evaluation; None for the whole held-out set.
        checkpoint_every: steps between checkpoints; the final step always has one.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: steps between lines of metrics.
        seed: of the adapter's initial factors, the order of the examples and dropout; 0 <= seed < 2^32.

    Raises:
        ConfigError: a field is outside its range, or two fields contradict each other.
    """

    base: str
    output: str
    data: DataConfig
    optimiser: OptimiserConfig
    steps: int
    batch_size: int
    accumulate: int = 1
    quantise: Quantise = "nf4-double"
    dtype: Dtype = "bfloat16"
    remat: bool = True
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    eval_every: int = 100
    eval_batches: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("base", "output"):
            _text(name, getattr(self, name))
        _choice("quantise", self.quantise, ("nf4-double", "nf4", "none"))
        _choice("dtype", self.dtype, ("float32", "bfloat16"))
        _choice("remat", self.remat, (True, False))
        for name in ("steps", "batch_size", "accumulate", "eval_every", "checkpoint_every", "keep_checkpoints"):
            _whole(name, getattr(self, name), least=1)
        _whole("log_every", self.log_every, least=1)
        if self.eval_batches is not None:
            _whole("eval_batches", self.eval_batches, least=1)
        _whole("seed", self.seed, least=0)
        if self.seed >= 2**32:
            raise ConfigError(f"seed: expected 0 <= seed < 2^32; got {self.seed!r}")
        for name, kind in (("data", DataConfig), ("optimiser", OptimiserConfig), ("adapter", AdapterSettings)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}: expected {kind.__name__}; got {getattr(self, name)!r}")
        if self.optimiser.warmup_steps >= self.steps:
            raise ConfigError(
                f"optimiser.warmup_steps: expected fewer than steps ({self.steps}); got {self.optimiser.warmup_steps}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` gives back an equal config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {
            "data": dataclasses.asdict(self.data),
            "optimiser": dataclasses.asdict(self.optimiser),
            "adapter": self.adapter.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config that `to_dict` wrote, or that a user typed.

        Raises:
            ConfigError: a key is unknown (the nearest name is given) or missing, or a value is invalid.
        """
        arguments = _arguments(cls, values, where="config")
        arguments["data"] = DataConfig.from_dict(arguments["data"])
        arguments["optimiser"] = OptimiserConfig.from_dict(arguments["optimiser"])
        if "adapter" in arguments:
            arguments["adapter"] = AdapterSettings.from_dict(arguments["adapter"])
        return cls(**arguments)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """The config of a YAML file, changed by overrides such as "optimiser.learning_rate=5e-3".

        Raises:
            ConfigError: the file cannot be read, is no mapping, or holds what `from_dict` refuses.
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
        try:
            return cls.from_dict(merge_overrides(values, parse_overrides(overrides)))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def meaning(self) -> dict[str, Any]:
        """What decides the trained adapter and what the metrics mean, flat: {"optimiser.learning_rate": 0.005, …}.

        Without `FREE_FIELDS`, what only says how the adapter is computed, and the paths of the data, whose contents
        are compared instead. `steps` is part of it if the learning rate depends on it.
        """
        values = self.to_dict()
        for name in FREE_FIELDS:
            del values[name]
        for name in RUNTIME_FIELDS:
            values["adapter"].pop(name, None)
        for name in ("train", "eval"):
            del values["data"][name]
        if self.optimiser.schedule == "constant":
            del values["steps"]
        return {
            f"{name}.{sub}" if sub else name: value
            for name, entry in values.items()
            for sub, value in (entry.items() if isinstance(entry, Mapping) else [("", entry)])
        }


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


def _mapping(values: Any, *, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings (key: value); got {values!r}")
    stray = [key for key in values if not isinstance(key, str)]
    if stray:
        raise ConfigError(f"{where}: expected names as keys; got {stray[0]!r}")
    return values


def _arguments(cls: type, values: Any, *, where: str) -> dict[str, Any]:
    """The constructor's arguments, after every unknown and every missing key has been named."""
    fields = dataclasses.fields(cls)
    arguments = dict(_mapping(values, where=where))
    check_keys(arguments, [f.name for f in fields], where=where)
    needed = [f.name for f in fields if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; needed: {', '.join(needed)}")
    return arguments


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name}: expected a path; got {value!r}")


def _whole(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number >= {least}; got {value!r}")


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice if isinstance(choice, bool) else value == choice for choice in choices):
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}")


def _number(name: str, value: Any) -> float:
    """A finite float; text such as "5e-3" counts, since plain PyYAML reads a number without a dot as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name}: expected a finite number; got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number; got {value!r}")
    return float(value)
