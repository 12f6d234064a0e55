"""Config, shape plans, the adapter value, the NF4 codec and the float64 oracle. NumPy and the standard library only."""

from moka_core.adapter import Adapter, LayerFactors
from moka_core.architecture import Architecture, architecture
from moka_core.config import MokaConfig
from moka_core.errors import AdapterError, ConfigError, DataError, ModelError, MokaError, PathError, TargetError
from moka_core.fingerprint import base_difference, base_fingerprint, check_base
from moka_core.nf4 import Nf4Weight, dequantise_nf4, quantise_nf4
from moka_core.plan import KronShape, LayerPlan, ShapeGroup, plan_layer, plan_model
from moka_core.presets import PRESETS, Preset, preset

__all__ = [
    "PRESETS",
    "Adapter",
    "AdapterError",
    "Architecture",
    "ConfigError",
    "DataError",
    "KronShape",
    "LayerFactors",
    "LayerPlan",
    "ModelError",
    "MokaConfig",
    "MokaError",
    "Nf4Weight",
    "PathError",
    "Preset",
    "ShapeGroup",
    "TargetError",
    "architecture",
    "base_difference",
    "base_fingerprint",
    "check_base",
    "dequantise_nf4",
    "plan_layer",
    "plan_model",
    "preset",
    "quantise_nf4",
]
