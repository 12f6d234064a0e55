"""The adapter value: the one thing that crosses from one backend to the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from moka_core.config import MokaConfig
from moka_core.errors import AdapterError, ConfigError, first_lines
from moka_core.plan import LayerPlan, plan_layer

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_NAMES = "float32, bfloat16 or float16"
SHOWN = 8  # layers that an error names where an adapter is for another model altogether
QUANTISATIONS = ("nf4-double", "nf4", "none")
_PATH = re.compile(r"[^\s.]+(\.[^\s.]+)*")


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFactors:
    """The trained numbers of one layer.

    Holds, for group g of the plan: factor_a[g] is (copies, a_out, a_in), factor_b[g] is (copies, b_out, b_in),
    both (out, in)-oriented; a factor that is a fixed identity is absent (an empty tuple), and so is
    gate_logits, (terms,), of an ungated adapter.
    """

    plan: LayerPlan
    factor_a: tuple[np.ndarray, ...] = ()
    factor_b: tuple[np.ndarray, ...] = ()
    gate_logits: np.ndarray | None = None

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The stored arrays, under the names that they have in a file: "factor_a.0", …, "gate_logits"."""
        for group, array in enumerate(self.factor_a):
            yield f"factor_a.{group}", array
        for group, array in enumerate(self.factor_b):
            yield f"factor_b.{group}", array
        if self.gate_logits is not None:
            yield "gate_logits", self.gate_logits

    @classmethod
    def from_tensors(cls, plan: LayerPlan, config: MokaConfig, tensors: Mapping[str, np.ndarray]) -> LayerFactors:
        """The layer whose `tensors()` these are; which names are needed follows from plan and config."""
        groups = range(len(plan.groups))
        return cls(
            plan=plan,
            factor_a=() if config.identity == "a" else tuple(tensors[f"factor_a.{g}"] for g in groups),
            factor_b=() if config.identity == "b" else tuple(tensors[f"factor_b.{g}"] for g in groups),
            gate_logits=tensors["gate_logits"] if config.gate == "softmax" else None,
        )


def expected_tensors(plan: LayerPlan, config: MokaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every array that a layer with this plan stores."""
    shapes: dict[str, tuple[int, ...]] = {}
    for factor in ("a", "b"):
        if config.identity != factor:
            for index, group in enumerate(plan.groups):
                shapes[f"factor_{factor}.{index}"] = group.factor_shape(factor)
    if config.gate == "softmax":
        shapes["gate_logits"] = (plan.terms,)
    return shapes


def header_problems(
    plan: LayerPlan, config: MokaConfig, headers: Mapping[str, tuple[tuple[int, ...], str]], *, where: str
) -> list[str]:
    """Everything wrong with the names, shapes and dtypes of one layer's arrays, which need not be read for it.

    Args:
        headers: (shape, dtype's name) by the array's name.
        where: the layer's path, for the messages.
    """
    expected = expected_tensors(plan, config)
    problems = [f"{where}: missing {name} {expected[name]}" for name in sorted(set(expected) - set(headers))]
    problems += [f"{where}: unexpected {name}" for name in sorted(set(headers) - set(expected))]
    for name in sorted(set(expected) & set(headers)):
        shape, dtype = headers[name]
        if tuple(shape) != expected[name]:
            problems.append(f"{where}: {name} expected shape {expected[name]}, got {tuple(shape)}")
        elif dtype not in DTYPES:
            problems.append(f"{where}: {name} expected dtype {DTYPE_NAMES}, got {dtype}")
    return problems


def tensor_problems(plan: LayerPlan, config: MokaConfig, tensors: Mapping[str, np.ndarray], *, where: str) -> list[str]:
    """Everything wrong with one layer's arrays: missing, unexpected, mis-shaped, wrong dtype, not finite."""
    headers = {name: (array.shape, str(array.dtype)) for name, array in tensors.items()}
    problems = header_problems(plan, config, headers, where=where)
    expected = expected_tensors(plan, config)
    for name in sorted(set(expected) & set(tensors)):
        array = tensors[name]
        if array.shape == expected[name] and str(array.dtype) in DTYPES:
            problems += finite_problems(array, f"{where}: {name}")
    return problems


def finite_problems(array: np.ndarray, what: str) -> list[str]:
    """That an array of one of `DTYPES` has NaN or infinite entries, or nothing."""
    return [] if np.isfinite(array.astype(np.float32)).all() else [f"{what} has NaN or infinite entries"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A config and the factors of every adapted layer: all that a trained adapter is.

    Args:
        config: the settings; `validate` checks every layer's plan against it.
        layers: factors by the layer's dotted path in a Hugging Face checkpoint
            ("model.layers.0.self_attn.q_proj").
        base_fingerprint: digest of the base model that it was trained on, or None if unknown.
        base_model: name or folder of that base, for humans and for PEFT.
        base_quantisation: how the linear weights of that base were held: one of `QUANTISATIONS`, or None if unknown or
            in another way. An adapter computes what it computed there on a base that is held alike.
    """

    config: MokaConfig
    layers: Mapping[str, LayerFactors]
    base_fingerprint: str | None = None
    base_model: str | None = field(default=None)
    base_quantisation: str | None = None

    def validate(self) -> Adapter:
        """This adapter, if it is sound.

        Raises:
            AdapterError: no layers; a layer's name that is no dotted path; a plan other than the config's;
                arrays missing, unexpected, mis-shaped, of another dtype, or not finite. One error lists them all.
        """
        problems = []
        if not self.layers:
            problems.append("expected at least one layer, got none")
        for name, value in (("base_fingerprint", self.base_fingerprint), ("base_model", self.base_model)):
            if value is not None and not isinstance(value, str):
                problems.append(f"{name}: expected a string or None, got {value!r}")
        if self.base_quantisation not in (None, *QUANTISATIONS):
            problems.append(
                f"base_quantisation: expected {', '.join(QUANTISATIONS)} or None, got {self.base_quantisation!r}"
            )
        for path, layer in self.layers.items():
            if not isinstance(path, str) or not _PATH.fullmatch(path):
                problems.append(f"{path!r}: expected a layer's dotted path")
            dims = layer.plan.out_features, layer.plan.in_features
            try:
                plan = plan_layer(self.config.for_layer(path, *dims), *dims)
            except ConfigError as error:
                problems.append(f"{path}: {error}")
                continue
            if plan != layer.plan:
                problems.append(f"{path}: its shapes are not those that the config gives to a {plan.key} layer")
            problems += tensor_problems(layer.plan, self.config, dict(layer.tensors()), where=path)
        raise_problems(problems, "adapter is not valid")
        return self

    def quantisation(self, asked: str | None = None) -> str:
        """How to hold its base: as asked for, or as where it was trained, or, where that is unknown, as QLoRA does."""
        return asked or self.base_quantisation or QUANTISATIONS[0]

    def layer_config(self, path: str) -> MokaConfig:
        """The settings of one of its layers; see `MokaConfig.for_layer`."""
        plan = self.layers[path].plan
        return self.config.for_layer(path, plan.out_features, plan.in_features)

    @property
    def trainable(self) -> int:
        """Number of trained entries, gates included."""
        return sum(array.size for layer in self.layers.values() for _, array in layer.tensors())


def path_order(path: str) -> list[tuple[int, int, str]]:
    """The key that sorts layers' paths as a model has them, 2 before 10.

    >>> sorted(["layers.10.q", "layers.2.v", "layers.2.q"], key=path_order)
    ['layers.2.q', 'layers.2.v', 'layers.10.q']
    """
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.split(".")]


def raise_problems(problems: list[str], title: str, *, shown: int | None = None) -> None:
    """Raise one AdapterError that lists every problem, or the first `shown`; return if there is none."""
    if problems:
        listed = problems if shown is None else first_lines(problems, shown)
        title = f"{title} ({len(problems)} problem{'s' * (len(problems) > 1)})"
        raise AdapterError(f"{title}:\n  " + "\n  ".join(listed))
