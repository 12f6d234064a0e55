"""The adapter whose folder is pinned byte for byte, and what of an adapter a folder must keep."""

from __future__ import annotations

import numpy as np

from moka_core import Adapter, KronShape, LayerFactors, LayerPlan, MokaConfig, ShapeGroup


def bits(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Of every tensor its dtype, shape and bytes."""
    return {
        f"{path}.{name}": (str(array.dtype), array.shape, array.tobytes())
        for path, layer in adapter.layers.items()
        for name, array in layer.tensors()
    }


def golden() -> Adapter:
    """Every number is a multiple of a quarter, counted up in storage order, so that anyone can rebuild it."""
    groups = (ShapeGroup(KronShape(2, 3, 2, 2), 2), ShapeGroup(KronShape(1, 2, 4, 3), 1))
    plan = LayerPlan(out_features=4, in_features=6, groups=groups)
    config = MokaConfig(r=3, num_shapes=2, shapes=(plan,), dropout=0.0, target_modules=("q_proj",))
    layer = LayerFactors(
        plan=plan,
        factor_a=(counted(1, 2, 2, 3), counted(20, 1, 1, 2)),
        factor_b=(counted(-10, 2, 2, 2), counted(40, 1, 4, 3)),
        gate_logits=counted(-1, 3),
    )
    return Adapter(
        config=config,
        layers={"model.layers.0.self_attn.q_proj": layer},
        base_fingerprint="00ff",
        base_model="tiny",
        base_quantisation="nf4-double",
    )


def counted(start: int, *shape: int) -> np.ndarray:
    """The multiples of a quarter from start/4 on, in storage order."""
    return ((np.arange(np.prod(shape)) + start) / 4).astype(np.float32).reshape(shape)
