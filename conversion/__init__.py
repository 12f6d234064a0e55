"""Files and formats: adapters, base weights, the NF4 state, and the proof that both backends agree."""

from conversion.adapter_folder import load_adapter, save_adapter
from conversion.base_weights import BaseFolder, open_base

__all__ = ["BaseFolder", "load_adapter", "open_base", "save_adapter"]
