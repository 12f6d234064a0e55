"""`moka params`: counts and shapes from the architecture alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from moka_core import Architecture, ConfigError, LayerPlan, ModelError, MokaConfig, architecture, plan_model, preset
from moka_core.config import check_keys, plans_from_dict
from moka_core.plan import lora_parameters

LORA_RANK = 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def run_params(arch: str, preset_name: str, settings: list[str], *, as_json: bool) -> None:
    """Print the number of trainable parameters of a preset on an architecture, and its shapes."""
    model = read_architecture(arch)
    config = preset(preset_name, model, **_parse(settings))
    plans = plan_model(config, model.linear_layers())
    summary = summarise(model, config, plans)
    if as_json:
        print(json.dumps({**summary, "arch": arch, "preset": preset_name}, indent=2))
    else:
        _print(arch, preset_name, config, plans, summary)


def read_architecture(arch: str) -> Architecture:
    """The built-in architecture of that name, or that of a model folder's config.json.

    Raises:
        ModelError: neither such a name nor such a folder.
    """
    path = Path(arch)
    file = path / "config.json" if path.is_dir() else path
    if file.name != "config.json":
        return architecture(arch)
    try:
        return Architecture.from_hf_config(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file; expected a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}: expected JSON; {error}") from error


def summarise(model: Architecture, config: MokaConfig, plans: dict[str, LayerPlan]) -> dict[str, Any]:
    """The counts as plain values; "trainable" includes the gates."""
    trainable = sum(plan.trainable(config) for plan in plans.values())
    lora = lora_parameters(model.linear_layers(), LORA_TARGETS, LORA_RANK)
    shapes = {plan.key: [group.to_list() for group in plan.groups] for plan in plans.values()}
    return {
        "trainable": trainable,
        "base": model.parameters(),
        "share": trainable / model.parameters(),
        "layers": len(plans),
        "lora_r32": lora,
        "fewer_than_lora_r32": lora / trainable,
        "shapes": shapes,
        "config": config.to_dict(),
    }


def _parse(settings: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected key=value, such as r=20")
        values[key] = yaml.safe_load(text)
    check_keys(values, MokaConfig().to_dict(), where="--set")
    if "shapes" in values:
        values["shapes"] = plans_from_dict(values["shapes"])
    return values


def _print(arch: str, name: str, config: MokaConfig, plans: dict[str, LayerPlan], summary: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"[bold]{summary['trainable']:,}[/bold] trainable parameters: preset {name} on {arch}, "
        f"{summary['layers']} layers, {summary['share']:.4%} of {summary['base']:,}"
    )
    console.print(
        f"LoRA r={LORA_RANK} on {', '.join(LORA_TARGETS)} would train {summary['lora_r32']:,}: "
        f"{summary['fewer_than_lora_r32']:.1f} times as many"
    )
    table = Table("layer", "out x in", "layers", "terms of each shape", "parameters a layer")
    kinds = {path: (path.rpartition(".")[2], plan.key) for path, plan in plans.items()}
    counts = Counter(kinds.values())
    for (name, key), plan in {kinds[path]: plan for path, plan in plans.items()}.items():
        shapes = "\n".join(f"{group.copies} x {group.shape}" for group in plan.groups)
        table.add_row(name, key, str(counts[name, key]), shapes, f"{plan.trainable(config):,}")
    console.print(table)
