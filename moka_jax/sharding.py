"""Where the arrays of a model, its adapter and its batches live on a mesh of devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moka_core import ConfigError
from moka_core.nf4 import BLOCK
from moka_jax.nf4 import packed_layout

MESH_AXES = ("data", "fsdp", "tensor")
# Which axes of the mesh share a logical axis of an array. What is split over "fsdp" is gathered where it is used.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
}
Axes = tuple[str | None, ...]


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data·fsdp·tensor devices: batches are split over data and fsdp, frozen weights over fsdp and tensor.

    Args:
        devices: all of them if None, of every process.

    Raises:
        ConfigError: there are fewer devices, or in several processes others.
    """
    found = list(jax.devices() if devices is None else devices)
    wanted = data * fsdp * tensor
    if wanted > len(found) or (jax.process_count() > 1 and wanted != len(found)):
        raise ConfigError(
            f"mesh: {data} (data) x {fsdp} (fsdp) x {tensor} (tensor) needs {wanted} devices; there are {len(found)} "
            f"in {jax.process_count()} processes: {found[0].device_kind}"
        )
    grid = np.array(found[:wanted]).reshape(data, fsdp, tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@dataclass(frozen=True)
class Layout:
    """A mesh, and the rules by which logical axes are split over it.

    Args:
        mesh: with the axes "data", "fsdp" and "tensor".
        shard_adapter: split the rows of the factors over fsdp too, where they can be; otherwise every device holds the
            whole adapter and its optimiser state, which is small.
    """

    mesh: Mesh
    shard_adapter: bool = False

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, axis: int = 0) -> NamedSharding:
        """Examples, along `axis`, split over the mesh."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, RULES["batch"]))

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.mesh.shape[name] for name in RULES["batch"])

    def spec(self, axes: Axes, shape: Sequence[int], units: Sequence[int] | None = None) -> PartitionSpec:
        """How an array is split: by `RULES`, where its axes can be divided evenly.

        A mesh axis that its logical axis cannot take goes to another axis of the array if it is "fsdp", since what is
        split over that is gathered before it is used, and is not used otherwise.

        Args:
            axes: the logical name of every axis of the array, None for one that is never split.
            units: entries of an axis that stay together.
        """
        sizes = [size // unit for size, unit in zip(shape, units or [1] * len(shape), strict=True)]
        split: list[tuple[str, ...]] = [() for _ in axes]

        def take(index: int, name: str) -> bool:
            if sizes[index] % self.mesh.shape[name]:
                return False
            sizes[index] //= self.mesh.shape[name]
            split[index] = (*split[index], name)
            return True

        wanted = [
            (index, name)
            for index, axis in enumerate(axes)
            for name in RULES.get(axis or "", ())
            if self.mesh.shape[name] > 1
        ]
        homeless = [name for index, name in wanted if not take(index, name)]
        if "fsdp" in homeless:
            any(take(index, "fsdp") for index, axis in enumerate(axes) if axis is not None)
        return PartitionSpec(*[names[0] if len(names) == 1 else names or None for names in split])

    def trained(self, shape: Sequence[int]) -> NamedSharding:
        """Of an array of the adapter or its optimiser: on every device, or its rows over fsdp with `shard_adapter`."""
        size = self.mesh.shape["fsdp"]
        if self.shard_adapter and len(shape) >= 2 and size > 1 and shape[-2] % size == 0:
            return NamedSharding(self.mesh, PartitionSpec(*[None] * (len(shape) - 2), "fsdp"))
        return self.replicated

    def used(self, axes: Axes, shape: Sequence[int]) -> NamedSharding:
        """Where an array is when it is used: gathered over fsdp."""
        return NamedSharding(self.mesh, _without_fsdp(self.spec(axes, shape)))

    def packed(self, axes: Axes, shape: tuple[int, int], *, nested: bool) -> dict[str, NamedSharding]:
        """Of the arrays of an NF4 weight: codes and scales are split alike, blocks stay whole.

        Args:
            axes: the logical axes of the weight (out, in).
        """
        arrays = packed_layout(shape, nested=nested)
        result = dict.fromkeys(arrays, self.replicated)
        if shape[1] % BLOCK == 0:
            spec = self.spec(axes, shape, units=(1, BLOCK))
            result |= dict.fromkeys(("codes", "absmax"), NamedSharding(self.mesh, spec))
        return result


@dataclass(frozen=True)
class GatherOverFsdp:
    """Gathers the codes and scales of an NF4 weight over the mesh's fsdp axis, packed as they are.

    What is left split is split over "tensor", as the product is. Without this a compiler may as well decode first and
    gather eight times the bytes.
    """

    shardings: tuple[tuple[str, NamedSharding], ...]

    @classmethod
    def of(cls, packed: Mapping[str, NamedSharding]) -> GatherOverFsdp | None:
        """For arrays held in these shardings; None if they are not split."""
        split = {name: sharding for name, sharding in packed.items() if any(sharding.spec)}
        kept = tuple((name, NamedSharding(at.mesh, _without_fsdp(at.spec))) for name, at in split.items())
        return cls(kept) if kept else None

    def __call__(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        constrained = {name: jax.lax.with_sharding_constraint(arrays[name], at) for name, at in self.shardings}
        return {**arrays, **constrained}


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    def keep(entry: Any) -> Any:
        names = tuple(name for name in ((entry,) if isinstance(entry, str) else entry or ()) if name != "fsdp")
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*map(keep, spec))


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A host's array on the devices; in several processes, all of them call this with the same array."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
