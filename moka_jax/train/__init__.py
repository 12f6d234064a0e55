"""Training of adapters: examples, steps, checkpoints, metrics and the loop over them, for any NNX model."""

from moka_jax.train.adapter_settings import AdapterSettings
from moka_jax.train.checkpoint import CheckpointError
from moka_jax.train.config import DataConfig, EarlyStopping, MeshConfig, Profile, TrainConfig
from moka_jax.train.data import Dataset, Example, load_dataset
from moka_jax.train.loop import TrainingError, TrainResult, train
from moka_jax.train.metrics import plot_losses, read_metrics
from moka_jax.train.optimiser import OptimiserConfig, make_optimiser
from moka_jax.train.overrides import merge_overrides, parse_overrides
from moka_jax.train.saved import restore_adapter, saved_run
from moka_jax.train.step import make_eval_step, make_train_step, start_state

__all__ = [
    "AdapterSettings",
    "CheckpointError",
    "DataConfig",
    "Dataset",
    "EarlyStopping",
    "Example",
    "MeshConfig",
    "OptimiserConfig",
    "Profile",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "load_dataset",
    "make_eval_step",
    "make_optimiser",
    "make_train_step",
    "merge_overrides",
    "parse_overrides",
    "plot_losses",
    "read_metrics",
    "restore_adapter",
    "saved_run",
    "start_state",
    "train",
]
