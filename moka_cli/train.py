"""`moka train` and `moka export`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moka_core import Adapter, AdapterError, ConfigError, ModelError, base_difference
from moka_core.adapter import SHOWN, raise_problems
from moka_core.paths import json_object, no_file, no_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moka_jax.llama import Llama
    from moka_jax.sharding import Layout
    from moka_jax.train import TrainConfig, TrainResult
    from moka_jax.train.saved import Which

PROBED = 20  # examples of a file that a dry run reads
# What a tokenizer's JSON objects are called in a model folder; those that transformers writes no more may be there.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def run_train(config_file: Path, overrides: list[str]) -> None:
    """Train as a YAML file says, and tell what came out."""
    from moka_jax.train import TrainConfig

    config = TrainConfig.from_yaml(config_file, overrides)
    console = Console()
    result = train_from_config(config, console)
    if result.interrupted:
        raise KeyboardInterrupt
    better = result.best_step not in (None, result.step)
    hint = f"; step {result.best_step} had the lowest held-out loss: --checkpoint best" if better else ""
    console.print(
        f"metrics: {result.metrics}\nnext: moka export {config.output} ADAPTER_FOLDER{hint}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def run_dry(config_file: Path, overrides: list[str]) -> None:
    """Tell what memory a run will take on each device, and refuse one that cannot fit; no weight is read.

    Of each file of examples the first ones are read as the run will read them.
    """
    from moka_jax.train import TrainConfig
    from moka_jax.train.memory import GIGA, plan_memory

    config = TrainConfig.from_yaml(config_file, overrides)
    console = Console()
    with console.status("planning"):
        config, start = resolve_start(config)
        planned, tokenizer = preflight(config)
        told = probe_data(config, tokenizer)
        plan = plan_memory(planned, config)
    tell_start(console, config, start)
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("on each device", "GB", title=f"{config.base} on {plan.devices} x {plan.device}")
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / GIGA:.3f}")
    table.add_section()
    table.add_row("together", f"{plan.total / GIGA:.3f}")
    table.add_row("there is", "unknown" if plan.capacity is None else f"{plan.capacity / GIGA:.3f}")
    console.print(table)
    console.print("(arrays only; the program and its compiling take memory besides: 1.5 GB with SmolLM2-135M on a CPU)")
    plan.check()


def probe_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the first examples of each file are, in words; a pipe is left alone, as what is read from it is gone.

    Raises:
        DataError: see `load_dataset`.
    """
    from moka_jax.train import load_dataset

    lines, settings = [], config.data
    for name, path in (("data.train", settings.train), ("data.eval", settings.eval)):
        if path is None or Path(path).is_fifo():
            continue
        found = load_dataset(
            path, tokenizer, max_length=settings.max_length, chat_template=settings.chat_template, first=PROBED
        )
        told = f"the first {len(found.examples)}" if len(found.examples) == PROBED else f"all {len(found.examples)}"
        lines.append(f"{name}: {told} examples of {path} can be used, the longest of these has {found.longest} tokens")
    return lines


def train_from_config(config: TrainConfig, console: Console) -> TrainResult:
    """Load the base, attach the adapter, and train it or go on with the run in `config.output`."""
    from moka_jax.train import train
    from moka_jax.train.memory import plan_weights
    from moka_jax.train.processes import is_first, start_processes

    start_processes()
    config, start = resolve_start(config)
    planned, tokenizer = preflight(config)
    probe_data(config, tokenizer)
    plan_weights(planned).check()
    console.quiet = not is_first()
    tell_start(console, config, start)
    with console.status(f"loading {config.base}"):
        model = load_run_model(config)
    attach_start(model, config, start)
    return train(model, tokenizer, config, console=console)


def preflight(config: TrainConfig) -> tuple[Llama, PreTrainedTokenizerBase]:
    """The run's model with shapes in place of arrays, and its tokenizer, once all is refused that can be by now.

    A dry run and a run both begin so: what the one lets pass, the other does not refuse before it has read the data.

    Raises:
        ConfigError: data.max_length is beyond the base model's context; or see `check_run`, `abstract_run_model`.
        DataError: see `check_run`.
        ModelError: see `load_llama`, `load_tokenizer`.
    """
    from moka_jax.train.preflight import check_run

    check_run(config, _layout(config))
    planned = abstract_run_model(config)
    context = planned.config.max_position_embeddings
    if config.data.max_length > context:
        raise ConfigError(
            f"data.max_length: expected at most the base model's context of {context}; got {config.data.max_length}"
        )
    return planned, load_tokenizer(config.base)


def run_export(run: Path, out: Path, *, base: Path | None = None, which: Which = "last") -> None:
    """Write an adapter of a run."""
    from conversion import save_adapter
    from conversion.new_folder import check_new
    from moka_jax import export_adapter

    check_new(out)
    console = Console()
    with console.status("reading the run"):
        model, step = trained_model(run, base=base, which=which)
        adapter = export_adapter(model)
        save_adapter(adapter, out)
    told = f"{out}: {adapter.trainable:,} parameters on {len(adapter.layers)} layers, after step {step}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def trained_model(run: Path, *, base: Path | None = None, which: Which = "last") -> tuple[Llama, int]:
    """A model that holds an adapter of a run and no base weights, and the step of that adapter.

    Args:
        base: where the base model is now, if not where the run found it.
        which: the newest checkpoint, or the one of the lowest held-out loss.

    Raises:
        ModelError: the folder holds another model than the one that the run trained on.
    """
    from flax import nnx

    from conversion import open_base
    from moka_jax.llama import Llama, LlamaConfig
    from moka_jax.train import TrainConfig, restore_adapter, saved_run

    values, fingerprint = saved_run(run, which=which)
    config = TrainConfig.from_dict(values)
    folder = config.base if base is None else base
    if why := no_folder(folder):
        raise ModelError(f"{folder}: {why}; expected the run's base model; say where it is with --base FOLDER")
    opened = open_base(folder, quantise="none")
    difference = None if fingerprint is None else base_difference(fingerprint, opened.fingerprint)
    if difference is not None:
        raise ModelError(
            f"{folder}: holds another model than the one that {run} trained on: {difference}; say where the base is "
            "with --base FOLDER"
        )

    def build() -> Llama:
        model = Llama(LlamaConfig.from_hf_config(opened.config), rngs=nnx.Rngs(0))
        attach_fresh(model, config)
        return model

    model = nnx.eval_shape(build)
    model.base_fingerprint, model.base_model = opened.fingerprint, opened.name
    model.base_quantisation = open_base(folder, quantise=config.quantise).quantisation
    return model, restore_adapter(run, model, which=which)


def resolve_start(config: TrainConfig) -> tuple[TrainConfig, Adapter | None]:
    """The config with all settings of the adapter that the run starts from, and that adapter; None for a fresh one.

    A run that has checkpoints goes on from those, so that the adapter's folder may be gone by then.

    Raises:
        AdapterError: the folder holds no adapter, or one for another base or for layers that this one has not.
        ConfigError: a setting contradicts that adapter; or the folder is gone, and the run has no checkpoint that can
            be read.
    """
    from conversion import load_adapter, open_base
    from conversion.adapter_folder import folder_config
    from moka_core import Architecture, plan_model
    from moka_jax.train import AdapterSettings
    from moka_jax.train.checkpoint import CheckpointError
    from moka_jax.train.saved import readable_settings

    start = config.adapter.start
    if start is None:
        return config, None
    if why := no_folder(start):
        try:
            saved = readable_settings(config.output)
        except CheckpointError as error:
            checkpoints = Path(config.output) / "checkpoints"
            raise ConfigError(
                f"adapter.start: {why}: {start}; expected the adapter folder that the run started from, as "
                f"{error}\nput that folder back and delete {checkpoints} to start again from the beginning, or put a "
                "sound checkpoint back"
            ) from error
        noted = AdapterSettings.from_dict((saved or {}).get("adapter", {}))
        if noted.start_checksum is None:
            raise ConfigError(f"adapter.start: {why}: {start}; expected an adapter folder")
        model = Architecture.from_hf_config(open_base(config.base, quantise=config.quantise).config)
        settings = config.adapter.started_from(noted.moka_config(), noted.start_checksum, model)
        return dataclasses.replace(config, adapter=settings), None
    adapter = load_adapter(start)
    base = open_base(config.base, quantise=config.quantise)
    expected = adapter.base_fingerprint
    difference = None if expected is None else base_difference(expected, base.fingerprint)
    if difference is not None:
        raise AdapterError(
            f"adapter.start: {start} was trained on another base model than {config.base}: {difference}; set base to "
            "the adapter's own (base_model_name_or_path in its adapter_config.json)"
        )
    model = Architecture.from_hf_config(base.config)
    linear = model.linear_layers()
    raise_problems(
        [
            f"{path}: it is for {layer.plan.key}, the base's layer is {'x'.join(map(str, linear.get(path, ['none'])))}"
            for path, layer in adapter.layers.items()
            if linear.get(path) != (layer.plan.out_features, layer.plan.in_features)
        ],
        f"{start}: this adapter does not fit {config.base}",
        shown=SHOWN,
    )
    own = adapter.config
    if plan_model(own, linear).keys() != adapter.layers.keys():  # targets that were meant for another model
        own = dataclasses.replace(own, target_modules=tuple(adapter.layers))
    settings = config.adapter.started_from(own, folder_config(adapter)["checksum"], model)
    adapter = dataclasses.replace(adapter, config=settings.moka_config())
    return dataclasses.replace(config, adapter=settings), adapter


def tell_start(console: Console, config: TrainConfig, start: Adapter | None) -> None:
    """Say if a run holds its base in another way than the adapter's training did."""
    from conversion import open_base

    held = open_base(config.base, quantise=config.quantise).quantisation
    if start is not None and start.base_quantisation not in (None, held):
        console.print(
            f"[yellow]note[/yellow]: the adapter in adapter.start was trained on a base held as "
            f"{start.base_quantisation}; this run holds it as {held} (quantise), on which it computes something else",
            highlight=False,
            soft_wrap=True,
        )


def attach_start(model: Llama, config: TrainConfig, start: Adapter | None) -> None:
    """Attach what a run starts from: an adapter, or a fresh one."""
    from moka_jax import import_adapter

    if start is None:
        attach_fresh(model, config)
    else:
        import_adapter(model, start)


def attach_fresh(model: Llama, config: TrainConfig) -> None:
    """Attach a fresh adapter of a run's settings: what it starts from, unless it goes on from another."""
    from moka_jax import attach

    attach(model, config.adapter.moka_config(model.architecture), seed=config.seed)


def load_run_model(config: TrainConfig) -> Llama:
    """The base model of a run, on the devices of its mesh."""
    from conversion import open_base
    from moka_jax.llama import load_llama

    return load_llama(open_base(config.base, quantise=config.quantise), **_model_options(config))


def abstract_run_model(config: TrainConfig) -> Llama:
    """The same with the adapter that the run starts from, and shapes in place of all arrays."""
    from flax import nnx

    from conversion import open_base
    from moka_jax import MokaLinear
    from moka_jax.llama.load import abstract_llama
    from moka_jax.sites import linear_sites, replace_module

    model = abstract_llama(open_base(config.base, quantise=config.quantise), **_model_options(config))

    def attached(model: Llama) -> Llama:
        attach_fresh(model, config)
        return model

    # nothing is drawn, but the base's arrays lose where they will be: its layers are put back
    bases = {site.path: site.module for site in linear_sites(model)}
    for site in linear_sites(nnx.eval_shape(attached, model)):
        if isinstance(site.module, MokaLinear):
            site.module.base = bases[site.path]
            replace_module(model, site.path, site.module)
    return model


def _model_options(config: TrainConfig) -> dict[str, Any]:
    import jax.numpy as jnp

    options = {"dtype": jnp.dtype(config.dtype), "remat": config.remat, "attend": config.attend}
    return options | {"layout": _layout(config)}


def _layout(config: TrainConfig) -> Layout | None:
    return None if config.mesh is None else config.mesh.layout()


def load_model(base: str | Path, *, quantise: str) -> Llama:
    """The base model in JAX, in float32."""
    from conversion import open_base
    from moka_jax.llama import load_llama

    return load_llama(open_base(base, quantise=quantise))  # type: ignore[arg-type]


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: the folder has none, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    if why := no_folder(base):
        raise ModelError(f"{base}: {why}; expected a Hugging Face model folder (config.json, safetensors)")
    if no_file(Path(base) / "tokenizer.json") and no_file(Path(base) / "tokenizer.model"):
        raise ModelError(f"{base}: expected a tokenizer (tokenizer.json or tokenizer.model); found none")
    for name in _TOKENIZER_FILES:
        file = Path(base) / name
        if os.path.lexists(file):
            json_object(file, ModelError, needed="expected what save_pretrained of a tokenizer writes, or no such name")
    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception as error:  # tokenizers raises bare Exceptions for contents that it cannot use
        raise ModelError(
            f"{base}: expected a tokenizer that transformers can load; got {type(error).__name__}: {error}; "
            "copy the tokenizer's files from the original model folder"
        ) from error
