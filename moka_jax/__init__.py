"""Mixtures of Kronecker adapters for Flax NNX models."""

from moka_jax.attach import attach, export_adapter, import_adapter, merge
from moka_jax.general import register_einsum
from moka_jax.linear import MokaLinear, MokaParam, with_dropout_key
from moka_jax.nf4 import Nf4Linear
from moka_jax.product import moka_apply

__all__ = [
    "MokaLinear",
    "MokaParam",
    "Nf4Linear",
    "attach",
    "export_adapter",
    "import_adapter",
    "merge",
    "moka_apply",
    "register_einsum",
    "with_dropout_key",
]
