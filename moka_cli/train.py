"""`moka train` and `moka export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from moka_core import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moka_jax.llama import Llama
    from moka_jax.train import TrainConfig, TrainResult


def run_train(config_file: Path, overrides: list[str]) -> None:
    """Train as a YAML file says, and tell what came out."""
    from moka_jax.train import TrainConfig

    config = TrainConfig.from_yaml(config_file, overrides)
    console = Console()
    result = train_from_config(config, console)
    if result.interrupted:
        raise KeyboardInterrupt
    console.print(
        f"metrics: {result.metrics}\nnext: moka export {config.output} ADAPTER_FOLDER", highlight=False, soft_wrap=True
    )


def train_from_config(config: TrainConfig, console: Console) -> TrainResult:
    """Load the base, attach the adapter, and train it or go on with the run in `config.output`."""
    from moka_jax.train import train

    with console.status(f"loading {config.base}"):
        model = load_model(config.base, quantise=config.quantise, dtype=config.dtype, remat=config.remat)
        tokenizer = load_tokenizer(config.base)
    attach_fresh(model, config)
    return train(model, tokenizer, config, console=console)


def run_export(run: Path, out: Path) -> None:
    """Write the newest adapter of a run."""
    from conversion import save_adapter
    from moka_jax import export_adapter

    model, step = trained_model(run)
    adapter = export_adapter(model)
    save_adapter(adapter, out)
    told = f"{out}: {adapter.trainable:,} parameters on {len(adapter.layers)} layers, after step {step}"
    Console().print(told, highlight=False, soft_wrap=True)


def trained_model(run: Path) -> tuple[Llama, int]:
    """A model that holds a run's newest adapter and no base weights, and the step of that adapter."""
    from flax import nnx

    from conversion import open_base
    from moka_jax.llama import Llama, LlamaConfig
    from moka_jax.train import TrainConfig, restore_adapter, saved_config

    config = TrainConfig.from_dict(saved_config(run))
    base = open_base(config.base, quantise="none")

    def build() -> Llama:
        model = Llama(LlamaConfig.from_hf_config(base.config), rngs=nnx.Rngs(0))
        attach_fresh(model, config)
        return model

    model = nnx.eval_shape(build)
    model.base_fingerprint, model.base_model = base.fingerprint, base.name
    return model, restore_adapter(run, model)


def attach_fresh(model: Llama, config: TrainConfig) -> None:
    """Attach the adapter that a run starts from."""
    from moka_jax import attach

    attach(model, config.adapter.moka_config(model.architecture), seed=config.seed)


def load_model(base: str | Path, *, quantise: str, dtype: str = "float32", remat: bool = True) -> Llama:
    """The base model in JAX."""
    import jax.numpy as jnp

    from conversion import open_base
    from moka_jax.llama import load_llama

    opened = open_base(base, quantise=quantise)  # type: ignore[arg-type]
    return load_llama(opened, dtype=jnp.dtype(dtype), remat=remat)


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not (Path(base) / "tokenizer.json").is_file() and not (Path(base) / "tokenizer.model").is_file():
        raise ModelError(f"{base}: expected a tokenizer (tokenizer.json or tokenizer.model); found none")
    return AutoTokenizer.from_pretrained(base)
