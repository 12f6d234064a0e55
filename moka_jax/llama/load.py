"""A LLaMA from a base model's tensors, dense or packed in NF4: planned whole, then filled a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ModelError, Nf4Weight
from moka_core.tensor_spec import TensorSpec
from moka_jax.llama.axes import parameter_axes, weight_axes
from moka_jax.llama.config import Attend, LlamaConfig
from moka_jax.llama.model import Llama
from moka_jax.nf4 import Nf4Linear, packed_arrays, packed_layout
from moka_jax.sharding import GatherOverFsdp, Layout, place
from moka_jax.sites import linear_sites

Path = tuple[str, ...]
Tensor = np.ndarray | Nf4Weight


class BaseTensors(Protocol):
    """A base model as `conversion.open_base` gives it: anything with these will do."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The fields of config.json."""

    @property
    def name(self) -> str:
        """What to call the model in an adapter's config."""

    @property
    def fingerprint(self) -> str:
        """See `moka_core.base_fingerprint`."""

    def flax_specs(self) -> Iterator[tuple[Path, int | None, TensorSpec]]:
        """(path in our LLaMA, layer or None, what it will be): shape (in, out) if dense, (out, in) if packed."""

    def flax_tensors(self) -> Iterator[tuple[Path, int | None, Tensor]]:
        """(path in our LLaMA, layer or None, value), one after the other, as `flax_specs` says."""


def load_llama(
    base: BaseTensors,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = True,
    attend: Attend = "xla",
    layout: Layout | None = None,
) -> Llama:
    """The model with a checkpoint's weights; packed weights stay packed.

    Everything is checked before a weight is read. Then one tensor after the other is read, packed if it is to be, and
    put into its place, which may be split over many devices: besides the model, the memory of one tensor is needed.

    Args:
        base: an opened model folder (`conversion.open_base`).
        dtype: of activations and products; dense weights are held in it too, norms in float32.
        remat: see `Llama`.
        attend: see `Llama`.
        layout: how the weights are split over a mesh; None holds them whole on the default device.

    Raises:
        ModelError: the model is not supported, or tensors are missing, unexpected or mis-shaped (all listed).
    """
    model = abstract_llama(base, dtype=dtype, remat=remat, attend=attend, layout=layout)
    state = nnx.state(model)
    variables = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    for variable in variables.values():
        like = variable.get_value()
        variable.set_value(jnp.zeros(like.shape, like.dtype, device=like.sharding))
    for path, layer, tensor in base.flax_tensors():
        arrays = {path[-1]: tensor} if isinstance(tensor, np.ndarray) else packed_arrays(tensor)
        for name, array in arrays.items():
            _put(variables[(*path[:-1], name)], array, layer)
    nnx.update(model, state)
    return model


def abstract_llama(
    base: BaseTensors,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: bool = True,
    attend: Attend = "xla",
    layout: Layout | None = None,
) -> Llama:
    """The model that `load_llama` would give, with shapes, dtypes and shardings in place of arrays.

    Raises:
        ModelError: see `load_llama`.
    """
    config = LlamaConfig.from_hf_config(base.config)
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, remat=remat, attend=attend, rngs=nnx.Rngs(0)))
    packed = _check(model, base, config.architecture.num_hidden_layers)
    for site in linear_sites(model):
        path = tuple(map(str, site.path))
        if (*path, "kernel") in packed:
            _replace(model, path, _abstract_packed(site.module, packed[(*path, "kernel")], site.layers, dtype))
    state = nnx.state(model)
    for names, variable in nnx.to_flat_state(state):
        like = variable.get_value()
        keep = names[-1] in ("weight", *packed_layout((1, 64), nested=True))
        variable.set_value(jax.ShapeDtypeStruct(like.shape, like.dtype if keep else dtype, sharding=like.sharding))
    nnx.update(model, state)
    if layout is not None:
        _lay_out(model, layout)
    model.base_fingerprint = base.fingerprint
    model.base_model = base.name
    packings = {spec.packing or "none" for spec in packed.values()} or {"none"}
    model.base_quantisation = packings.pop() if len(packings) == 1 else None
    return model


def packed_weights(model: nnx.Module) -> Iterator[tuple[str, Nf4Weight]]:
    """Every NF4 weight of a model by its dotted path, as NumPy arrays."""
    for site in linear_sites(model):
        if isinstance(site.base, Nf4Linear):
            for index, name in enumerate(site.names):
                yield name, site.base.to_nf4(None if site.layers is None else index)


def _abstract_packed(dense: Any, spec: TensorSpec, layers: int | None, dtype: jnp.dtype) -> Nf4Linear:
    out, in_ = spec.shape
    lead = () if layers is None else (layers,)

    def build() -> Nf4Linear:
        arrays = packed_layout((out, in_), nested=spec.packing == "nf4-double")
        return Nf4Linear(
            {name: jnp.zeros((*lead, *like.shape), like.dtype) for name, like in arrays.items()},
            (out, in_),
            bias=None if dense.bias is None else jnp.zeros((*lead, out), dtype),
            packed_from=spec.dtype,
            dtype=dtype,
        )

    return nnx.eval_shape(build)


def _lay_out(model: Llama, layout: Layout) -> None:
    """Say of every array of an abstract model how it is split."""
    packed: dict[Path, dict[str, Any]] = {}
    for site in linear_sites(model):
        if isinstance(site.base, Nf4Linear):
            path = tuple(map(str, site.path))
            shardings = layout.packed(weight_axes(path[-1]), site.base.shape, nested=site.base.nested)
            site.base.gather = GatherOverFsdp.of(shardings)
            packed[path] = shardings
    state = nnx.state(model)
    for keys, variable in nnx.to_flat_state(state):
        names, like = tuple(map(str, keys)), variable.get_value()
        stacked = names[:3] == ("model", "layers", "block")
        if names[-1] in packed.get(names[:-1], {}):
            spec = packed[names[:-1]][names[-1]].spec
        else:
            spec = layout.spec(parameter_axes(names), like.shape[stacked:])
        sharding = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(None, *spec) if stacked else spec)
        variable.set_value(jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding))
    nnx.update(model, state)
    model.layout = layout


def _put(variable: nnx.Variable, array: np.ndarray, layer: int | None) -> None:
    """Put one layer's array, or the only one, into the place that was made for it."""
    held = variable.get_value()
    array = array.astype(held.dtype, copy=False)
    if layer is None:
        variable.set_value(place(array, held.sharding))
        return
    at: Any = held.sharding
    if isinstance(at, jax.sharding.NamedSharding):
        at = jax.sharding.NamedSharding(at.mesh, jax.sharding.PartitionSpec(*at.spec[1:]))
    variable.set_value(_set_layer(held.sharding)(held, place(array, at), layer))


@cache
def _set_layer(sharding: jax.sharding.Sharding) -> Any:
    """(stack, array, layer) -> the stack with that layer's array, in the stack's own memory."""

    def write(stack: jax.Array, array: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, array, layer, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _check(model: Llama, base: BaseTensors, layers: int) -> dict[Path, TensorSpec]:
    """What each packed weight will be, by its path; or one error that lists all that does not fit the model."""
    found: dict[Path, dict[int | None, TensorSpec]] = {}
    for path, layer, spec in base.flax_specs():
        found.setdefault(path, {})[layer] = spec
    expected = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    problems = [f"missing {'.'.join(path)}" for path in sorted(set(expected) - set(found))]
    problems += [f"unexpected {'.'.join(path)}" for path in sorted(set(found) - set(expected))]
    packed = {}
    for path in sorted(set(found) & set(expected)):
        rows, want = found[path], tuple(expected[path].get_value().shape)
        if None in rows:
            problems += _shape_problems(".".join(path), rows[None], want)
        else:
            problems += _stack_problems(path, rows, layers, want[1:])
        first = next(iter(rows.values()))
        if first.packing is not None:
            packed[path] = first
    if problems:
        raise ModelError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return packed


def _stack_problems(path: Path, rows: Mapping[int | None, TensorSpec], layers: int, want: tuple[int, ...]) -> list[str]:
    """What is wrong with the tensors of one place in every layer."""

    def name(layer: int | None) -> str:
        return ".".join(str(layer) if part == "block" else part for part in path)

    numbers = sorted(layer for layer in rows if layer is not None)
    problems = [f"missing {name(layer)}" for layer in range(layers) if layer not in rows]
    problems += [f"unexpected {name(layer)}: config.json has {layers} layers" for layer in numbers if layer >= layers]
    for layer in numbers:
        problems += _shape_problems(name(layer), rows[layer], want)
    if len({spec.packing for spec in rows.values()}) > 1:
        dense = [name(layer) for layer in numbers if rows[layer].packing is None]
        problems.append(
            f"{'.'.join(path)}: expected every layer dense, or every layer packed in the same way"
            + (
                f"; {', '.join(dense[:3])} {'are' if dense[1:] else 'is'} dense (llm_int8_skip_modules)"
                if dense
                else ""
            )
        )
    elif len({spec.dtype for spec in rows.values() if spec.packing is not None}) > 1:
        problems.append(f"{'.'.join(path)}: expected every layer packed from one dtype")
    return problems


def _shape_problems(name: str, spec: TensorSpec, want: tuple[int, ...]) -> list[str]:
    got = spec.shape if spec.packing is None else spec.shape[::-1]
    return [] if got == want else [f"{name}: expected shape {want}, got {got}"]


def _replace(model: nnx.Module, path: Path, module: nnx.Module) -> None:
    owner: Any = model
    for part in path[:-1]:
        owner = getattr(owner, part)
    setattr(owner, path[-1], module)
