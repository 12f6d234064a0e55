"""The sketch of the linear weights: equal for a packed weight, near for a rounded one, far for a trained one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
import pytest

from moka_core import Nf4Weight, base_difference, quantise_nf4
from moka_core.sketch import LinearWeight, sampled_kind, sketch_weights

DIGEST = "0" * 64
SHAPES = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (64, 128), "mlp.up_proj": (192, 128)}
Weights = dict[str, np.ndarray]


def weights(seed: int = 0, layers: int = 12) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        f"model.layers.{layer}.{name}": rng.normal(0, 0.02, shape).astype(np.float32)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }


def held(weight: np.ndarray | Nf4Weight) -> LinearWeight:
    """A weight in memory, to be read block by block."""
    packed = isinstance(weight, Nf4Weight)
    flat, size = (weight.codes, 32) if isinstance(weight, Nf4Weight) else (weight.reshape(-1), 64)

    def read(numbers: Sequence[int]) -> list[np.ndarray]:
        return [flat[number * size : (number + 1) * size] for number in numbers]

    return LinearWeight(entries=math.prod(weight.shape) if packed else flat.size, read=read)


def sketch(values: Mapping[str, np.ndarray | Nf4Weight]) -> str:
    return sketch_weights({path: held(weight) for path, weight in values.items()})


def difference(one: Weights, other: Mapping[str, np.ndarray | Nf4Weight]) -> str | None:
    return base_difference(f"{DIGEST}.{sketch(one)}", f"{DIGEST}.{sketch(other)}")


def test_the_digits_are_those_that_the_format_says() -> None:
    """The rule once more, entry by entry, as conversion/FORMAT.md states it."""
    values = weights(layers=5)
    values |= {
        f"h.{layer}.odd": np.random.default_rng(layer).normal(size=(7, 19)).astype(np.float32) for layer in (2, 10)
    }
    kinds: dict[str, list[np.ndarray]] = {}
    for path, weight in values.items():  # in the order of their numbers
        kinds.setdefault(path.split(".")[-1], []).append(weight.reshape(-1))
    told = []
    for kind, stack in sorted(kinds.items()):
        each, digits = math.ceil(64 / len(stack)), ""
        for group in range(each * len(stack)):
            flat = stack[group // each]
            blocks = math.ceil(flat.size / 64)
            count, symbols = max(1, min(16, blocks // each)), []
            for number in range(group * count + 1, group * count + count + 1):
                start = 64 * ((number * 0x9E3779B97F4A7C15) % 2**64 * blocks // 2**64)
                block = flat[start : start + 64]
                scale = np.abs(block).max()
                scaled = block * (np.float32(1) / scale) if len(block) == 64 else block / scale
                low, high = np.float32(-0.045525018), np.float32(0.03979015)
                symbols += [0 if entry <= low else 2 if entry > high else 1 for entry in scaled]
            digits += hashlib.sha256(bytes(symbols)).hexdigest()[0]
        told.append(f"{kind}:{digits}")
    assert sketch(values) == "/".join(told)


def test_it_is_pinned_since_it_stands_in_saved_adapters() -> None:
    entries = [np.arange(4096) * 7919 % (2003 + layer) - 1001.0 for layer in range(2)]
    values = {f"model.layers.{layer}.q_proj": flat.reshape(64, 64) for layer, flat in enumerate(entries)}
    assert sketch(values) == "q_proj:9c00462961ed6046e81882169a1bc3e6086d60dc08d72ee8ee813ca6a641acc9"


@pytest.mark.parametrize("double", [False, True])
def test_a_packed_weight_has_the_digits_of_the_dense_one(double: bool) -> None:
    values = weights()
    values["model.layers.0.mlp.short"] = np.random.default_rng(5).normal(size=(7, 19)).astype(np.float32)
    assert sketch({path: quantise_nf4(weight, double=double) for path, weight in values.items()}) == sketch(values)
    some = {path: quantise_nf4(w, double=double) if ".3." in path else w for path, w in values.items()}
    assert sketch(some) == sketch(values)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_the_same_model(dtype: type, seed: int) -> None:
    values = weights(seed)
    halved = {path: weight.astype(dtype) for path, weight in values.items()}
    assert any((halved[path] != weight).any() for path, weight in values.items())
    assert difference(values, halved) is None
    assert difference(values, {path: quantise_nf4(weight) for path, weight in halved.items()}) is None


def moved(values: Weights, size: float, only: tuple[str, ...] = (), rank: int | None = 16) -> Weights:
    """The weights with a change of relative size `size`, of that rank or of full rank."""
    rng, result = np.random.default_rng(9), dict(values)
    for path, weight in values.items():
        if path.endswith(only or tuple(SHAPES)):
            rows, columns = weight.shape
            delta = rng.normal(size=weight.shape)
            if rank is not None:
                delta = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
            delta *= size * np.linalg.norm(weight) / np.linalg.norm(delta)
            result[path] = (weight + delta).astype(np.float32)
    return result


@pytest.mark.parametrize(
    "keep", [lambda w: w, lambda w: w.astype(ml_dtypes.bfloat16), quantise_nf4], ids=["float32", "bfloat16", "NF4"]
)
@pytest.mark.parametrize("rank", [16, None])
@pytest.mark.parametrize("size", [3e-3, 1e-2])
def test_training_is_another_model(size: float, rank: int | None, keep: Callable[[np.ndarray], np.ndarray]) -> None:
    values = weights()
    told = difference(values, {path: keep(weight) for path, weight in moved(values, size, rank=rank).items()})
    assert told is not None
    assert all(kind in told for kind in ("q_proj", "v_proj", "up_proj"))
    some = difference(values, {path: keep(w) for path, w in moved(values, size, only=("v_proj",), rank=rank).items()})
    assert some is not None
    assert "other linear weights: v_proj in " in some
    assert "q_proj" not in some


def test_what_it_cannot_see() -> None:
    values = weights()
    assert difference(values, moved(values, 1e-4)) is None, "less than rounding does"
    assert (
        difference(
            values, {**values, **moved({"model.layers.3.mlp.up_proj": values["model.layers.3.mlp.up_proj"]}, 0.1)}
        )
        is None
    )


def test_layers_are_taken_in_the_order_of_their_numbers() -> None:
    values = weights()
    assert sketch(dict(sorted(values.items()))) == sketch(values) == sketch(dict(reversed(values.items())))
    swapped = {**values, "model.layers.10.mlp.up_proj": values["model.layers.2.mlp.up_proj"]}
    one, other = (dict(entry.split(":") for entry in sketch(v).split("/"))["up_proj"] for v in (values, swapped))
    assert [index // 6 for index in range(72) if one[index] != other[index]] == [10] * 6


def test_what_cannot_be_looked_at_has_no_digit_and_is_not_compared() -> None:
    values = weights()
    layers = {path: held(weight) for path, weight in values.items()}
    unknown = {path: None if path.endswith("q_proj") else weight for path, weight in layers.items()}
    told = dict(entry.split(":") for entry in sketch_weights(unknown).split("/"))
    assert told["q_proj"] == "." * 72
    assert told["v_proj"] == dict(entry.split(":") for entry in sketch(values).split("/"))["v_proj"]
    changed = moved(values, 0.1, only=("q_proj",))
    assert difference(values, changed) is not None
    assert base_difference(f"{DIGEST}.{sketch_weights(unknown)}", f"{DIGEST}.{sketch(changed)}") is None


def test_a_group_with_an_entry_that_is_not_finite_has_no_digit() -> None:
    values = {"model.layers.0.q_proj": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    for bad in (np.nan, np.inf):
        values["model.layers.0.q_proj"][19, 3] = bad  # one of 64 blocks, each a group of its own
        digits = sketch(values).removeprefix("q_proj:")
        assert 1 <= digits.count(".") < 4


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj"),
        ("transformer.h.11.attn.c_attn", "c_attn"),
        ("0.2", "2"),
        ("lm_head", None),
        ("score", None),
        ("model.pooler.dense", None),
        ("model.layers.0.a/b", None),
        ("3", None),
    ],
)
def test_what_stands_in_no_numbered_list_is_not_looked_at(path: str, kind: str | None) -> None:
    assert sampled_kind(path) == kind


def test_a_model_without_such_layers_has_no_sketch() -> None:
    assert sketch({"lm_head": np.ones((64, 64), np.float32)}) == ""
    assert sketch({"model.layers.0.q_proj": np.zeros((0, 4), np.float32)}) == "q_proj:" + "." * 64
