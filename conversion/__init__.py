"""Files and formats: adapters, base weights, merged models, the NF4 state, and the proof that both backends agree."""

from conversion.adapter_folder import load_adapter, save_adapter
from conversion.base_weights import BaseFolder, open_base
from conversion.merge_report import MergeError, MergeReport
from conversion.merged_folder import merge_folder

__all__ = [
    "BaseFolder",
    "MergeError",
    "MergeReport",
    "load_adapter",
    "merge_folder",
    "open_base",
    "save_adapter",
]
