"""The settings of a training run: frozen values, validated when they are built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from moka_core import ConfigError, MokaConfig
from moka_core.config import RUNTIME_FIELDS
from moka_jax.sharding import Layout, make_mesh
from moka_jax.train.adapter_settings import AdapterSettings
from moka_jax.train.checks import Count, Within, check_fields, constructor_arguments, named_values
from moka_jax.train.optimiser import OptimiserConfig
from moka_jax.train.overrides import merge_overrides, parse_overrides, read_yaml

Quantise = Literal["nf4-double", "nf4", "none"]
Dtype = Literal["float32", "bfloat16"]
Attend = Literal["xla", "cudnn"]

# What may differ between a checkpoint and the run that resumes it: where files are, how often something is done, what
# is shown, and when to stop. (That the base model is the same one is seen from its fingerprint, not from its folder.)
FREE_FIELDS = (
    "base",
    "output",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "early_stopping",
    "max_skipped_steps",
    "tensorboard",
    "profile",
    "mesh",
    "attend",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are learned and held out, and how they become tokens.

    Args:
        train: JSON-lines file of the examples to learn.
        eval: JSON-lines file of the held-out examples, or None for no evaluation.
        max_length: longest example in tokens, at least 2; what is longer is cut, and counted.
        chat_template: write prompt and completion as a user's and an assistant's message with the tokenizer's
            chat template, if it has one.
        packing: put as many training examples as fit into a row of max_length tokens, instead of one and padding;
            none sees another. A step then learns from batch_size·accumulate such rows.
    """

    train: str
    eval: str | None = None
    max_length: Annotated[int, Within("[2, inf)")] = 512
    chat_template: bool = True
    packing: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "data.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """The settings from plain values; a field left out takes its default."""
        return cls(**constructor_arguments(cls, values, where="data"))


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """The run ends when the held-out loss has not fallen for a while.

    Args:
        patience: evaluations in a row without a gain that end the run, at least 1. The evaluation before the first
            step is one to compare with.
        min_delta: a gain is a held-out loss lower than the lowest gain so far by more than this, at least 0 (nats a
            token).
    """

    patience: Count
    min_delta: Annotated[float, Within("[0, inf)")] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "early_stopping.")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Which steps are recorded by JAX's profiler.

    Args:
        start: the first one, counted from 1; the very first steps compile, so a later one says more.
        steps: how many, at least 1.
    """

    start: Count
    steps: Count

    def __post_init__(self) -> None:
        check_fields(self, "profile.")

    @property
    def last(self) -> int:
        """The last recorded step."""
        return self.start + self.steps - 1


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Over how many devices a run is spread: data·fsdp·tensor, of all processes.

    Args:
        data: the batch is split over them; each holds the whole model.
        fsdp: the batch is split over them, and so are the frozen weights, which are gathered layer by layer, packed.
        tensor: the products of a layer are split over them, weights included; nothing of a weight is gathered.
        shard_adapter: split the adapter and its optimiser over fsdp, too; they are small.
    """

    data: Count = 1
    fsdp: Count = 1
    tensor: Count = 1
    shard_adapter: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")

    def layout(self) -> Layout:
        """The mesh, made of the devices that there are.

        Raises:
            ConfigError: see `make_mesh`.
        """
        mesh = make_mesh(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        return Layout(mesh, shard_adapter=self.shard_adapter)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run: with the same config, data and base, the same adapter comes out, bit for bit.

    Args:
        base: Hugging Face folder of the base model.
        output: folder for checkpoints and metrics.
        data: examples and their form.
        optimiser: its name and options, and the learning rate over the steps. `from_dict` takes the preset's learning
            rate (`moka_core.PRESETS`) for AdamW, if none is given and there is one.
        steps: optimiser steps, at least 1.
        batch_size: examples of one forward pass.
        accumulate: forward passes whose gradients make one step; a step learns from batch_size·accumulate examples.
        quantise: "nf4-double", "nf4" or "none", for the base weights.
        dtype: "float32" or "bfloat16", of the computation.
        remat: recompute each layer's inside in the backward pass: less memory, a third more work.
        attend: how attention is computed, "xla" or, on NVIDIA GPUs in bfloat16, "cudnn".
        mesh: the devices to spread the run over; None for one. Sums are then taken in another order, so that a run is
            bit-equal to another one on the same mesh only.
        adapter: preset and overrides, or the adapter to go on from.
        eval_every: steps between evaluations; the first is before step 1, the last after the final step.
        eval_batches: batches of one evaluation; None for the whole held-out set.
        checkpoint_every: steps between checkpoints; the final step always has one, and so has every step with the
            lowest held-out loss so far.
        keep_checkpoints: how many of the newest checkpoints stay; with 2 or more, one that turns out damaged is no
            loss. The one with the lowest held-out loss stays as well.
        log_every: steps between lines of metrics.
        early_stopping: when to stop before the last step; None for never.
        max_skipped_steps: a step whose loss or gradient is not finite changes nothing; more than this many of them in
            a row end the run, 0 being its end at the first.
        tensorboard: write the metrics for TensorBoard, too, into output/tensorboard; needs tensorboardX.
        profile: steps to record with JAX's profiler into output/profile; None for none.
        seed: of the adapter's initial factors, the order of the examples and dropout; 0 <= seed < 2^32.

    Raises:
        ConfigError: a field is outside its range, or two fields contradict each other.
    """

    base: str
    output: str
    data: DataConfig
    optimiser: OptimiserConfig
    steps: Count
    batch_size: Count
    accumulate: Count = 1
    quantise: Quantise = "nf4-double"
    dtype: Dtype = "bfloat16"
    remat: bool = True
    attend: Attend = "xla"
    mesh: MeshConfig | None = None
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    eval_every: Count = 100
    eval_batches: Count | None = None
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 1
    early_stopping: EarlyStopping | None = None
    max_skipped_steps: Annotated[int, Within("[0, inf)")] = 10
    tensorboard: bool = False
    profile: Profile | None = None
    seed: Annotated[int, Within("[0, 4294967296)")] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.early_stopping is not None and self.data.eval is None:
            raise ConfigError(
                "early_stopping: expected data.eval, the examples whose loss it watches; got none; "
                "name a file of held-out examples, or leave early_stopping out"
            )
        if self.profile is not None and self.profile.last > self.steps:
            raise ConfigError(
                f"profile: expected steps up to steps ({self.steps}); got {self.profile.start} to {self.profile.last}"
            )
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
            **{name: None if values[name] is None else dataclasses.asdict(values[name]) for name in _OPTIONAL},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config that `to_dict` wrote, or that a user typed.

        Raises:
            ConfigError: a key is unknown (the nearest name is given) or missing, or a value is invalid.
        """
        values = named_values(values, where="config")
        adapter = AdapterSettings.from_dict(values.get("adapter", {}))
        given = named_values(values.get("optimiser", {}), where="optimiser")
        if "learning_rate" not in given and given.get("name", "adamw") == "adamw":
            rate = adapter.learning_rate()
            if rate is not None:
                given, values = {"learning_rate": rate, **given}, {"optimiser": {}, **values}
            elif adapter.start is not None:
                raise ConfigError(
                    "optimiser.learning_rate: expected a number, as a preset's is for a fresh adapter and this run "
                    "goes on from adapter.start; begin with the rate of its training, or a third of it"
                )
        own = {f.name for f in dataclasses.fields(cls)}
        for group, kind in _GROUPS.items():
            for name in sorted(values.keys() & {f.name for f in dataclasses.fields(kind)} - own):
                raise ConfigError(f"config: unknown {name!r}; it is a setting of {group}: {group}.{name}")
        arguments = constructor_arguments(cls, values, where="config")
        arguments["data"] = DataConfig.from_dict(arguments["data"])
        optimiser = OptimiserConfig.from_dict(given)
        arguments |= {"adapter": adapter, "optimiser": optimiser}
        for name, kind in _OPTIONAL.items():
            if arguments.get(name) is not None:
                arguments[name] = kind(**constructor_arguments(kind, arguments[name], where=name))
        return cls(**arguments)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """The config of a YAML file, changed by overrides such as "optimiser.learning_rate=5e-3".

        Raises:
            ConfigError: the file cannot be read, is no mapping, or holds what `from_dict` refuses.
        """
        values = read_yaml(path)
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
        for name in (*RUNTIME_FIELDS, "start"):  # that it is the same start is seen from its checksum
            values["adapter"].pop(name, None)
        for name in ("train", "eval"):
            del values["data"][name]
        if self.optimiser.schedule == "constant":
            del values["steps"]
        return _flat(values)

    def shared(self) -> dict[str, Any]:
        """What all processes of a run must be told alike, flat: everything but paths, which may differ by host."""
        values = _flat(self.to_dict())
        for name in ("base", "output", "data.train", "data.eval", "adapter.start"):
            values.pop(name, None)
        return values


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any], *, names: tuple[str, str]) -> str | None:
    """What differs between two flat sets of settings in JSON's types, a line for each; None if nothing does."""
    absent = object()

    def show(value: Any) -> str:
        return "nothing" if value is absent else json.dumps(value)

    pairs = {name: (one.get(name, absent), other.get(name, absent)) for name in sorted({*one, *other})}
    lines = [f"{name}: {names[0]} has {show(a)}, {names[1]} {show(b)}" for name, (a, b) in pairs.items() if a != b]
    if not lines:
        return None
    return f"{len(lines)} setting{'s differ' if lines[1:] else ' differs'}:\n  " + "\n  ".join(lines)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{sub}" if sub else name: value
        for name, entry in values.items()
        for sub, value in (entry.items() if isinstance(entry, Mapping) else [("", entry)])
    }


_GROUPS: dict[str, type] = {"optimiser": OptimiserConfig, "data": DataConfig, "adapter": MokaConfig, "mesh": MeshConfig}
_OPTIONAL: dict[str, type] = {"mesh": MeshConfig, "early_stopping": EarlyStopping, "profile": Profile}
