"""`moka import`: the mixtures nearest to what a LoRA adapter, or a fine-tuned model, changes of its base."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from moka_cli.bases import open_held
from moka_cli.figures import TOLD_EVERY, check_json, text_console, write_json
from moka_cli.params import parse_settings
from moka_core import (
    Adapter,
    AdapterError,
    Architecture,
    ConfigError,
    LayerPlan,
    ModelError,
    MokaConfig,
    ShapeGroup,
    TargetError,
    plan_model,
    preset,
)
from moka_core.paths import no_folder
from moka_core.plan import lora_shape

if TYPE_CHECKING:
    from conversion import BaseFolder
    from conversion.lora_folder import LoraLayer
    from conversion.nearest import Nearest

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is imported: ΔW by layer, and what of it no mixture on these layers can hold.

    Args:
        delta: ΔW (out, in) of a layer of the base, by its path.
        lora: the layers of a LoRA adapter; None of a fine-tuned model.
        left_behind: ‖change‖ over ‖what it was‖, by name, of what changed beside the targeted layers; for layers of
            a LoRA the share of its whole ‖ΔW‖.
    """

    delta: Callable[[str], np.ndarray]
    lora: dict[str, LoraLayer] | None
    left_behind: dict[str, float]


def run_import(
    source: Path,
    out: Path,
    *,
    base: Path,
    preset_name: str,
    settings: list[str],
    lora_terms: int,
    quantise: str | None,
    only_targets: bool,
    max_error: float | None,
    json_file: Path | None,
) -> None:
    """Write the adapter, and tell how near it comes, kind by kind."""
    from conversion import save_adapter

    _check_options(out, json_file, max_error, lora_terms)
    opened = open_held(base, quantise)
    layers = base_layers(opened)
    lora = read_lora(source, layers, base=str(base))
    given = parse_settings(settings)
    if lora is not None:
        given.setdefault("target_modules", target_names(lora, layers))
    config = preset(preset_name, Architecture.from_hf_config(opened.config), **given)
    if lora_terms:
        config = with_lora_terms(config, lora_terms)
    plans = plan_model(config, layers)
    console = text_console(json_file)
    notes = [] if lora is None else _notes(source, base)
    for note in notes:
        console.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False, soft_wrap=True)
    with console.status("comparing with the base"):
        read = _read_source(source, base, lora, plans)
    if read.left_behind and not only_targets:
        raise TargetError(_left_behind_message(source, read.left_behind))

    found, sizes = project(read, config, plans, console)
    summary = summarise(config, plans, found, sizes, read)
    _print(console, source, summary)
    _check_errors(found, max_error)
    adapter = Adapter(
        config=config,
        layers={path: nearest.layer for path, nearest in found.items()},
        base_fingerprint=opened.fingerprint,
        base_model=opened.name,
        base_quantisation=opened.quantisation,
    )
    save_adapter(adapter, out)
    write_json(json_file, {"source": str(source), "base": str(base), "notes": notes, **summary})
    told = f"{out}: {adapter.trainable:,} parameters on {len(adapter.layers)} layers"
    console.print(f"{told}\nnext: adapter: {{start: {out}}} in the config of moka train", highlight=False, markup=False)


def base_layers(base: BaseFolder) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer that a base folder holds, by path.

    Raises:
        ModelError: a weight has not the shape that config.json says, or is not there.
    """
    model = Architecture.from_hf_config(base.config)
    layers = model.linear_layers()
    if model.tie_word_embeddings:
        del layers["lm_head"]  # it is the embedding, which no adapter changes
    specs = base.specs()
    found = {path: specs[f"{path}.weight"].shape if f"{path}.weight" in specs else None for path in layers}
    wrong = [
        f"{path}.weight: expected {layers[path]}, got {dims}" for path, dims in found.items() if dims != layers[path]
    ]
    if wrong:
        raise ModelError(f"{base.folder}: not the weights that config.json says:\n  " + "\n  ".join(wrong[:_SHOWN]))
    return layers


def read_lora(
    source: Path, layers: dict[str, tuple[int, int]], *, base: str = "the base"
) -> dict[str, LoraLayer] | None:
    """The layers of a LoRA adapter, or None if the folder holds a model.

    Raises:
        AdapterError: the folder holds neither; or see `load_lora`.
    """
    from conversion.lora_folder import load_lora

    if why := no_folder(source):
        raise AdapterError(f"{source}: {why}; expected the folder of a LoRA adapter or of a fine-tuned model")
    if os.path.lexists(source / "adapter_config.json"):
        return load_lora(source, layers, base=base)
    if not os.path.lexists(source / "config.json"):
        raise AdapterError(
            f"{source}: expected a LoRA adapter of PEFT (adapter_config.json) or a model fine-tuned from the base "
            "(config.json); found neither"
        )
    return None


def target_names(lora: dict[str, LoraLayer], layers: dict[str, tuple[int, int]]) -> list[str]:
    """The adapted layers as target_modules: their last names, or whole paths if those would catch others, too."""
    names = {path.rpartition(".")[2] for path in lora}
    caught = [path for path in layers if path.rpartition(".")[2] in names]
    return sorted(names) if set(caught) == set(lora) else list(lora)


def with_lora_terms(config: MokaConfig, terms: int) -> MokaConfig:
    """The config with `terms` more `lora_terms` on each layer: alone, the nearest matrix of that rank.

    Raises:
        ConfigError: one factor is a fixed identity, or some layers have shapes or an r of their own.
    """
    if config.identity != "none" or config.r_pattern or config.shapes_pattern:
        raise ConfigError(
            "--lora-terms: expected identity=none and no r_pattern or shapes_pattern: its terms are added to all layers"
        )

    def extended(plan: LayerPlan) -> LayerPlan:
        mine = lora_shape(plan.out_features, plan.in_features)
        others = tuple(group for group in plan.groups if group.shape != mine)
        copies = terms + sum(group.copies for group in plan.groups if group.shape == mine)
        return dataclasses.replace(plan, groups=(ShapeGroup(mine, copies), *others))

    return dataclasses.replace(
        config,
        r=config.r + terms,
        lora_terms=config.lora_terms + terms,
        shapes=tuple(extended(plan) for plan in config.shapes),
    )


def project(
    source: Source, config: MokaConfig, plans: dict[str, LayerPlan], console: Console
) -> tuple[dict[str, Nearest], dict[str, float]]:
    """The nearest mixture of every planned layer, and ‖ΔW‖ of each; a bar on a terminal, else a line now and then.

    Raises:
        AdapterError: no layer has changed, so that there is nothing to project; or factors would not be finite.
    """
    from conversion.nearest import nearest_layer

    found, sizes = {}, {}
    began = told = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("nearest mixtures", total=len(plans))
        for index, (path, plan) in enumerate(plans.items()):
            delta = source.delta(path)
            sizes[path] = float(np.linalg.norm(delta))
            own = config.for_layer(path, *delta.shape)
            with np.errstate(over="ignore", invalid="ignore"):  # checked in the next line
                found[path] = nearest_layer(delta, plan, own, seed=index)
            if not math.isfinite(found[path].error):
                raise AdapterError(
                    f"{path}: its factors do not fit into float32 with scale {own.scale:g}; ‖ΔW‖ is {sizes[path]:.3g}: "
                    "choose a scale nearer to it"
                )
            progress.advance(task)
            now, done = time.monotonic(), index + 1
            if not console.is_terminal and now - told >= TOLD_EVERY and done < len(plans):
                told = now
                left = datetime.timedelta(seconds=round((now - began) / done * (len(plans) - done)))
                console.print(f"layer {done}/{len(plans)}  left {left}", highlight=False)
    if not any(sizes.values()):
        raise AdapterError(
            f"nothing to project: ΔW = 0 on all {len(plans)} targeted layers; train from a fresh adapter, or target "
            "layers that have changed"
        )
    return found, sizes


def summarise(
    config: MokaConfig,
    plans: dict[str, LayerPlan],
    found: dict[str, Nearest],
    sizes: dict[str, float],
    source: Source,
) -> dict[str, Any]:
    """Errors and counts as plain values, by kind of layer and in all. Layers with ΔW = 0 have no error."""
    lora = source.lora or {}
    rows: dict[tuple[str, str], list[str]] = {}
    for path, plan in plans.items():
        rows.setdefault((path.rpartition(".")[2], plan.key), []).append(path)

    def figures(paths: list[str]) -> dict[str, Any]:
        changed = [path for path in paths if sizes[path]]
        errors = [found[path].error for path in changed]
        left = sum((found[path].error * sizes[path]) ** 2 for path in changed)
        return {
            "layers": len(paths),
            "unchanged": len(paths) - len(changed),
            "median_error": statistics.median(errors) if errors else None,
            "worst_error": max(errors, default=None),
            "error": (left / sum(sizes[path] ** 2 for path in changed)) ** 0.5 if changed else None,
            "parameters": sum(plans[path].trainable(config) for path in paths),
            "lora_parameters": sum(lora[path].parameters for path in paths if path in lora) if lora else None,
        }

    return {
        "kinds": [{"kind": name, "shape": key, **figures(paths)} for (name, key), paths in rows.items()],
        "total": figures(list(plans)),
        "layers": {
            path: {"error": nearest.error, "norm": sizes[path], "sweeps": nearest.sweeps}
            for path, nearest in found.items()
        },
        "left_behind": source.left_behind,
        "config": config.to_dict(),
    }


def _read_source(source: Path, base: Path, lora: dict[str, LoraLayer] | None, plans: dict[str, LayerPlan]) -> Source:
    from conversion.model_pair import open_pair

    if lora is None:
        pair = open_pair(base, source)
        return Source(delta=pair.delta, lora=None, left_behind=dict(pair.others(plans)))
    sizes = {path: float(np.linalg.norm(layer.delta())) for path, layer in lora.items()}
    whole = float(np.linalg.norm(list(sizes.values()))) or 1.0

    def delta(path: str) -> np.ndarray:
        plan = plans[path]
        return lora[path].delta() if path in lora else np.zeros((plan.out_features, plan.in_features))

    left_behind = {path: size / whole for path, size in sizes.items() if size and path not in plans}
    return Source(delta=delta, lora=lora, left_behind=left_behind)


def _notes(source: Path, base: Path) -> list[str]:
    """That a LoRA names another base than the one given: it may be the same model, so this is no error."""
    from conversion.lora_folder import stated_base

    stated = stated_base(source)
    if stated is None or Path(stated).resolve() == base.resolve():
        return []
    return [
        f"the LoRA was trained on {stated!r}, says its adapter_config.json; the base given is {str(base)!r}. Only on "
        "the same model does its ΔW mean the same"
    ]


def _check_options(out: Path, json_file: Path | None, max_error: float | None, lora_terms: int) -> None:
    from conversion.new_folder import check_new

    check_new(out)
    check_json(json_file)
    if max_error is not None and not max_error >= 0:
        raise ConfigError(f"--max-error: expected a number >= 0; got {max_error}")
    if lora_terms < 0:
        raise ConfigError(f"--lora-terms: expected a whole number >= 0; got {lora_terms}")


def _check_errors(found: dict[str, Nearest], max_error: float | None) -> None:
    worse = {} if max_error is None else {path: n.error for path, n in found.items() if n.error > max_error}
    if worse:
        path = max(worse, key=lambda path: worse[path])
        raise AdapterError(
            f"--max-error {max_error}: {len(worse)} of {len(found)} layers are worse; the worst is {path} with "
            f"{worse[path]:.4f}; nothing was written. More terms (--set r=...), other shapes (--set shapes=...) or "
            "--lora-terms N come nearer"
        )


def _left_behind_message(source: Path, changes: dict[str, float]) -> str:
    listed = [f"{name}: {change:.2%}" for name, change in sorted(changes.items(), key=lambda item: -item[1])]
    more = [f"… {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
    return (
        f"{source}: changes more than the targeted layers; target them, too (--set target_modules=[...]), or leave "
        f"them behind with --only-targets. {len(listed)} others (change, relative):\n  "
        + "\n  ".join(listed[:_SHOWN] + more)
    )


def _print(console: Console, source: Path, summary: dict[str, Any]) -> None:
    lora = summary["total"]["lora_parameters"] is not None
    columns = ["layer", "out x in", "layers", "median error", "worst", *["LoRA parameters"] * lora, "MoKA parameters"]
    table = Table(*columns, title=f"nearest mixtures to {escape(str(source))}")
    for row in [*summary["kinds"], {"kind": "all", "shape": "", **summary["total"]}]:
        errors = ["-" if row[name] is None else f"{row[name]:.4f}" for name in ("median_error", "worst_error")]
        counts = [f"{row['lora_parameters']:,}"] if lora else []
        if row["kind"] == "all":
            table.add_section()
        table.add_row(row["kind"], row["shape"], str(row["layers"]), *errors, *counts, f"{row['parameters']:,}")
    console.print(table)
    total = summary["total"]
    console.print(f"error: ‖ΔW − MoKA‖ / ‖ΔW‖; of all layers together {total['error']:.4f}", highlight=False)
    if total["unchanged"]:
        console.print(f"{total['unchanged']} layers have ΔW = 0 and a fresh start", highlight=False)
    if summary["left_behind"]:
        told = ", ".join(f"{name} ({change:.2%})" for name, change in list(summary["left_behind"].items())[:_SHOWN])
        more = len(summary["left_behind"]) - _SHOWN
        console.print(f"left behind: {told}{f' and {more} more' if more > 0 else ''}", highlight=False, markup=False)
