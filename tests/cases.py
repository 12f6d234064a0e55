"""The shared case table: one list of layers that the oracle, the PyTorch side and the JAX side are all held to.

NumPy and moka_core only, so that either backend's tests can import it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moka_core import KronShape, LayerFactors, LayerPlan, MokaConfig, ShapeGroup, plan_layer
from moka_core.adapter import expected_tensors


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One linear layer and the settings of its mixture; `shapes` rows are (copies, a_out, a_in, b_out, b_in)."""

    name: str
    out_features: int
    in_features: int
    shapes: tuple[tuple[int, int, int, int, int], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> MokaConfig:
        plans: tuple[LayerPlan, ...] = ()
        settings = {"dropout": 0.0, "target_modules": ("layer",), **self.settings}
        if self.shapes:
            groups = tuple(ShapeGroup(KronShape(*dims), copies) for copies, *dims in self.shapes)
            plans = (LayerPlan(out_features=self.out_features, in_features=self.in_features, groups=groups),)
            settings["r"] = sum(row[0] for row in self.shapes)
        return MokaConfig(shapes=plans, **settings)

    @property
    def plan(self) -> LayerPlan:
        return plan_layer(self.config, self.out_features, self.in_features)


CASES: tuple[LayerCase, ...] = (
    LayerCase(name="square", out_features=64, in_features=64),
    LayerCase(name="tall", out_features=96, in_features=24, settings={"r": 6, "num_shapes": 3}),
    LayerCase(name="wide", out_features=16, in_features=144, settings={"r": 6, "num_shapes": 3}),
    LayerCase(name="prime dims", out_features=13, in_features=7, settings={"r": 4, "num_shapes": 2}),
    LayerCase(name="prime out", out_features=17, in_features=60, settings={"r": 5, "num_shapes": 4}),
    LayerCase(name="one term", out_features=24, in_features=36, settings={"r": 1, "num_shapes": 1}),
    LayerCase(name="many terms", out_features=32, in_features=32, settings={"r": 40, "num_shapes": 3}),
    LayerCase(name="unequal copies", out_features=12, in_features=40, shapes=((3, 4, 5, 3, 8), (1, 2, 10, 6, 4))),
    LayerCase(name="trivial factors", out_features=6, in_features=10, shapes=((1, 1, 1, 6, 10), (2, 6, 10, 1, 1))),
    LayerCase(name="row and column", out_features=9, in_features=8, shapes=((2, 9, 1, 1, 8), (1, 1, 8, 9, 1))),
    LayerCase(
        name="uniform gate", out_features=48, in_features=32, settings={"r": 5, "num_shapes": 2, "gate": "uniform"}
    ),
    LayerCase(
        name="stable scaling",
        out_features=48,
        in_features=80,
        settings={"r": 7, "num_shapes": 3, "scaling": "stable", "scale": 1.5},
    ),
    LayerCase(
        name="stable, zero a, uniform",
        out_features=48,
        in_features=80,
        settings={
            "r": 7,
            "num_shapes": 3,
            "scaling": "stable",
            "zero_factor": "a",
            "gate": "uniform",
            "scale": -0.5,
        },
    ),
    LayerCase(
        name="identity a",
        out_features=32,
        in_features=48,
        settings={"r": 4, "identity": "a", "block_entries": 24},
    ),
    LayerCase(
        name="identity b",
        out_features=32,
        in_features=48,
        settings={"r": 4, "identity": "b", "zero_factor": "a", "block_entries": 24, "scaling": "stable"},
    ),
    LayerCase(
        name="identity a, two blocks",
        out_features=24,
        in_features=36,
        shapes=((2, 12, 12, 2, 3), (1, 6, 6, 4, 6), (1, 1, 1, 24, 36)),
        settings={"identity": "a", "scaling": "stable"},
    ),
    LayerCase(
        name="identity b, two blocks, uniform",
        out_features=24,
        in_features=36,
        shapes=((1, 2, 3, 12, 12), (3, 4, 6, 6, 6)),
        settings={"identity": "b", "zero_factor": "a", "gate": "uniform"},
    ),
    LayerCase(name="many copies", out_features=12, in_features=20, settings={"r": 18, "num_shapes": 1}),
)


def random_layer(case: LayerCase, seed: int = 0) -> LayerFactors:
    """A trained-looking layer of this case: float32, no entry near zero, unequal gates."""
    rng = np.random.default_rng(seed)
    return random_factors(case.plan, case.config, rng)


def random_factors(plan: LayerPlan, config: MokaConfig, rng: np.random.Generator) -> LayerFactors:
    """Random factors for any plan: magnitudes in [0.2, 1), random signs, float32."""
    tensors = {
        name: (rng.uniform(0.2, 1.0, shape) * rng.choice([-1.0, 1.0], shape)).astype(np.float32)
        for name, shape in expected_tensors(plan, config).items()
    }
    return LayerFactors.from_tensors(plan, config, tensors)
