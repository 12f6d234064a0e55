"""A LLaMA from a base model's tensors, dense or packed in NF4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ModelError, Nf4Weight
from moka_jax.attach import linear_sites
from moka_jax.llama.config import Attend, LlamaConfig
from moka_jax.llama.model import Llama
from moka_jax.nf4 import Nf4Linear

Tensor = np.ndarray | Nf4Weight


class BaseTensors(Protocol):
    """A base model as `conversion.open_base` gives it: anything with these three will do."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""

    @property
    def name(self) -> str:
        """What to call the model in an adapter's config."""

    @property
    def fingerprint(self) -> str:
        """The digest of `moka_core.base_fingerprint`."""

    def flax_tensors(self) -> Iterator[tuple[tuple[str, ...], int | None, Tensor]]:
        """(path in our LLaMA, layer or None, value); linear weights (in, out) if dense, (out, in) if packed."""


def load_llama(
    base: BaseTensors, *, dtype: jnp.dtype = jnp.float32, remat: bool = True, attend: Attend = "xla"
) -> Llama:
    """The model with a checkpoint's weights; packed weights stay packed.

    Args:
        base: an opened model folder (`conversion.open_base`).
        dtype: of activations and products; dense weights are held in it too, norms in float32.
        remat, attend: see `Llama`.

    Raises:
        ModelError: the model is not supported, or tensors are missing, unexpected or mis-shaped (all listed).
    """
    config = LlamaConfig.from_hf_config(base.config)
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, remat=remat, attend=attend, rngs=nnx.Rngs(0)))
    layers = config.architecture.num_hidden_layers
    values: dict[tuple[str, ...], Any] = {}
    for path, layer, tensor in base.flax_tensors():
        if layer is None:
            values[path] = tensor
        else:
            values.setdefault(path, {})[layer] = tensor
    _fill(model, values, layers, dtype)
    model.base_fingerprint = base.fingerprint
    model.base_model = base.name
    return model


def packed_weights(model: nnx.Module) -> Iterator[tuple[str, Nf4Weight]]:
    """Every NF4 weight of a model by its dotted path, as NumPy arrays."""
    for site in linear_sites(model):
        if isinstance(site.base, Nf4Linear):
            for index, name in enumerate(site.names):
                yield name, site.base.to_nf4(None if site.layers is None else index)


def _fill(model: Llama, values: dict[tuple[str, ...], Any], layers: int, dtype: jnp.dtype) -> None:
    """Put every value in its place and take it out of `values`, or raise one error that lists what does not fit.

    A value is a tensor, or {layer: tensor} where the model stacks its layers.
    """
    expected = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    by_site = {tuple(map(str, site.path)): site for site in linear_sites(model)}
    problems = [f"missing {'.'.join(path)}" for path in sorted(set(expected) - set(values))]
    problems += [f"unexpected {'.'.join(path)}" for path in sorted(set(values) - set(expected))]
    for path in sorted(set(values) & set(expected)):
        want = tuple(expected[path].get_value().shape)
        if isinstance(values[path], dict):
            problems += _stack_problems(path, values[path], layers, want[1:])
        else:
            problems += _shape_problems(".".join(path), values[path], want)
    if problems:
        raise ModelError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    packed = {path[:-1] for path, value in values.items() if _is_packed(value)}
    biases = {
        path[:-1]: _stacked(values.pop(path)) for path in list(values) if path[-1] == "bias" and path[:-1] in packed
    }
    for path in sorted(values):
        value = values.pop(path)
        if path[:-1] in packed:
            weights = [value[layer] for layer in range(layers)] if isinstance(value, dict) else value
            site = by_site[path[:-1]]
            _set(model, site.path, Nf4Linear(weights, bias=biases.get(path[:-1]), dtype=dtype))
        else:
            owner = _owner(model, path)
            keep = jnp.float32 if path[-1] == "weight" else dtype
            setattr(owner, path[-1], type(getattr(owner, path[-1]))(jnp.asarray(_stacked(value)).astype(keep)))


def _stack_problems(path: tuple[str, ...], rows: dict[int, Tensor], layers: int, want: tuple[int, ...]) -> list[str]:
    """What is wrong with the tensors of one place in every layer."""

    def name(layer: int) -> str:
        return ".".join(str(layer) if part == "block" else part for part in path)

    problems = [f"missing {name(layer)}" for layer in range(layers) if layer not in rows]
    problems += [
        f"unexpected {name(layer)}: config.json has {layers} layers" for layer in sorted(rows) if layer >= layers
    ]
    for layer in sorted(rows):
        problems += _shape_problems(name(layer), rows[layer], want)
    kinds = {frozenset(row.parts()) if isinstance(row, Nf4Weight) else None for row in rows.values()}
    if len(kinds) > 1:
        problems.append(f"{'.'.join(path)}: expected every layer dense, or every layer packed in the same way")
    return problems


def _shape_problems(name: str, value: Tensor, want: tuple[int, ...]) -> list[str]:
    got = value.shape[::-1] if isinstance(value, Nf4Weight) else value.shape
    return [] if tuple(got) == want else [f"{name}: expected shape {want}, got {tuple(got)}"]


def _is_packed(value: Tensor | dict[int, Tensor]) -> bool:
    return isinstance(next(iter(value.values())) if isinstance(value, dict) else value, Nf4Weight)


def _stacked(value: Any) -> np.ndarray:
    """The array, or the arrays of all layers with one leading axis."""
    return np.stack([value[layer] for layer in range(len(value))]) if isinstance(value, dict) else value


def _owner(model: nnx.Module, path: tuple[str, ...]) -> Any:
    owner: Any = model
    for part in path[:-1]:
        owner = getattr(owner, part)
    return owner


def _set(model: nnx.Module, path: tuple[str | int, ...], module: nnx.Module) -> None:
    setattr(_owner(model, tuple(map(str, path))), str(path[-1]), module)
