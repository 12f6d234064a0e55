"""MoKA in PyTorch: a PEFT method for dense and quantised models. Importing this registers "MOKA" with PEFT."""

from moka_torch.attach import attach, export_adapter, import_adapter
from moka_torch.config import MokaConfig
from moka_torch.exactness import exact_on_cpu
from moka_torch.fingerprint import model_fingerprint
from moka_torch.linear import MokaLinear
from moka_torch.merge import merge
from moka_torch.mixture import delta_weight, moka_apply
from moka_torch.tuner import MokaModel, register

register()

__all__ = [
    "MokaConfig",
    "MokaLinear",
    "MokaModel",
    "attach",
    "delta_weight",
    "exact_on_cpu",
    "export_adapter",
    "import_adapter",
    "merge",
    "model_fingerprint",
    "moka_apply",
]
