"""A LLaMA from a base model's tensors, dense or packed in NF4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ModelError, Nf4Weight
from moka_jax.attach import linear_sites
from moka_jax.llama.config import LlamaConfig
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


def load_llama(base: BaseTensors, *, dtype: jnp.dtype = jnp.float32) -> Llama:
    """The model with a checkpoint's weights; packed weights stay packed.

    Args:
        base: an opened model folder (`conversion.open_base`).
        dtype: of activations and products; dense weights are held in it too, norms in float32.

    Raises:
        ModelError: the model is not supported, or tensors are missing, unexpected or mis-shaped (all listed).
    """
    config = LlamaConfig.from_hf_config(base.config)
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    layers = config.architecture.num_hidden_layers
    values: dict[tuple[str, ...], Any] = {}
    for path, layer, tensor in base.flax_tensors():
        if layer is None:
            values[path] = tensor
        elif isinstance(tensor, Nf4Weight):
            values.setdefault(path, [None] * layers)[layer] = tensor
        else:
            if path not in values:
                values[path] = np.empty((layers, *tensor.shape), tensor.dtype)
            values[path][layer] = tensor
    _fill(model, values, dtype)
    model.base_fingerprint = base.fingerprint
    model.base_model = base.name
    return model


def packed_weights(model: nnx.Module) -> Iterator[tuple[str, Nf4Weight]]:
    """Every NF4 weight of a model by its dotted path, as NumPy arrays."""
    for site in linear_sites(model):
        if isinstance(site.base, Nf4Linear):
            for index, name in enumerate(site.names):
                yield name, site.base.to_nf4(None if site.layers is None else index)


def _fill(model: Llama, values: dict[tuple[str, ...], Any], dtype: jnp.dtype) -> None:
    """Put every value in its place, or raise one error that lists what does not fit."""
    expected = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    by_site = {tuple(map(str, site.path)): site for site in linear_sites(model)}
    problems = [f"missing {'.'.join(path)}" for path in sorted(set(expected) - set(values))]
    problems += [f"unexpected {'.'.join(path)}" for path in sorted(set(values) - set(expected))]
    for path in sorted(set(values) & set(expected)):
        value = values[path]
        want = tuple(expected[path].get_value().shape)
        packed = isinstance(value, (Nf4Weight, list))
        if packed:
            first = value if isinstance(value, Nf4Weight) else value[0]
            got = first.shape[::-1] if isinstance(value, Nf4Weight) else (len(value), *first.shape[::-1])
        else:
            got = tuple(value.shape)
        if got != want:
            problems.append(f"{'.'.join(path)}: expected shape {want}, got {got}")
            continue
        owner = _owner(model, path)
        if packed:
            site = by_site[path[:-1]]
            bias = values.get((*path[:-1], "bias"))
            _set(model, site.path, Nf4Linear(value, bias=bias, dtype=dtype))
        elif not (path[-1] == "bias" and isinstance(owner, Nf4Linear)):
            keep = jnp.float32 if path[-1] == "weight" else dtype
            array = jnp.asarray(value).astype(keep)
            variable = getattr(owner, path[-1])
            setattr(owner, path[-1], type(variable)(array))
    if problems:
        raise ModelError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))


def _owner(model: nnx.Module, path: tuple[str, ...]) -> Any:
    owner: Any = model
    for part in path[:-1]:
        owner = getattr(owner, part)
    return owner


def _set(model: nnx.Module, path: tuple[str | int, ...], module: nnx.Module) -> None:
    setattr(_owner(model, tuple(map(str, path))), str(path[-1]), module)


def parameter_bytes(model: nnx.Module) -> int:
    """Bytes of all variables of a model."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))
