"""`moka params`: counts and shapes from the architecture alone."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from moka_cli.figures import check_json, text_console, write_json
from moka_core import Architecture, ConfigError, LayerPlan, ModelError, MokaConfig, architecture, plan_model, preset
from moka_core.config import field_values
from moka_core.execution import EXECUTIONS, costs, plan_execution
from moka_core.paths import json_object, no_folder
from moka_core.plan import lora_parameters

LORA_RANK = 32
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
EXPLAINED_TOKENS = (1, 128, 512, 2048, 8192)


def run_params(arch: str, preset_name: str, settings: list[str], *, explain: bool, json_file: Path | None) -> None:
    """Print the number of trainable parameters of a preset on an architecture, and its shapes."""
    check_json(json_file)
    model = read_architecture(arch)
    config = preset(preset_name, model, **parse_settings(settings))
    plans = plan_model(config, model.linear_layers())
    summary = summarise(model, config, plans)
    if explain:
        summary["execution"] = explain_execution(config, plans)
    _print(text_console(json_file), arch, preset_name, config, plans, summary)
    write_json(json_file, {**summary, "arch": arch, "preset": preset_name})


def read_architecture(arch: str) -> Architecture:
    """The built-in architecture of that name, or that of a model folder's config.json.

    Raises:
        ModelError: neither such a name nor such a folder.
    """
    path = Path(arch)
    file = path / "config.json" if no_folder(path) is None else path
    if file.name != "config.json":
        return architecture(arch)
    values = json_object(file, ModelError, needed="expected a Hugging Face model folder")
    try:
        return Architecture.from_hf_config(values)
    except ModelError as error:
        raise ModelError(f"{file.parent}: {error}") from error


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


def explain_execution(config: MokaConfig, plans: dict[str, LayerPlan]) -> list[dict[str, Any]]:
    """How a layer of each shape is computed, by backend and number of tokens, as plain values.

    "added" is the predicted time that the mixture adds to the forward and backward of the frozen layer, as a share of
    that time: 2·tokens·out·in multiply-adds.
    """
    rows = []
    for plan in {plan.key: plan for plan in plans.values()}.values():
        for backend, tokens, dropout in itertools.product(("cpu", "gpu"), EXPLAINED_TOKENS, (False, True)):
            if dropout and not config.dropout:
                continue
            schedule = plan_execution(plan, config, tokens, own_product=dropout, backend=backend)
            priced = costs(plan, config.identity, tokens, own_product=dropout, backend=backend)
            forward = priced.merged if schedule.forward == "merged" else priced.factored
            gradient = priced.gradient_merged if schedule.gradient == "merged" else priced.gradient_factored
            rows.append(
                {
                    "layer": plan.key,
                    "backend": backend,
                    "tokens": tokens,
                    "dropout": dropout,
                    "forward": schedule.forward,
                    "gradient": schedule.gradient,
                    "first": list(schedule.first),
                    "added": (2 * forward + gradient) / (2 * tokens * plan.out_features * plan.in_features),
                }
            )
    return rows


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """The values of --set key=value, each as YAML.

    Raises:
        ConfigError: one has no "=", or a key is no field of `MokaConfig`.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected key=value, such as r=20")
        values[key] = yaml.safe_load(text)
    return field_values(values, where="--set")


def _print(
    console: Console,
    arch: str,
    name: str,
    config: MokaConfig,
    plans: dict[str, LayerPlan],
    summary: dict[str, Any],
) -> None:
    console.print(
        f"[bold]{summary['trainable']:,}[/bold] trainable parameters: preset {name} on {arch}, "
        f"{summary['layers']} layers, {summary['share']:.4%} of {summary['base']:,}"
    )
    console.print(
        f"LoRA r={LORA_RANK} on {', '.join(LORA_TARGETS)} would train {summary['lora_r32']:,}: "
        f"{summary['fewer_than_lora_r32']:.1f} times as many"
    )
    numbers = ("out x in", "layers", "terms of each shape", "parameters")
    table = Table(Column("layer", overflow="fold"), *(Column(name, no_wrap=True) for name in numbers))
    table.caption = "parameters: of one such layer"
    kinds = {path: (path.rpartition(".")[2], plan.key) for path, plan in plans.items()}
    counts = Counter(kinds.values())
    for (name, key), plan in {kinds[path]: plan for path, plan in plans.items()}.items():
        shapes = "\n".join(f"{group.copies} x {group.shape}" for group in plan.groups)
        table.add_row(name, key, str(counts[name, key]), shapes, f"{plan.trainable(config):,}")
    console.print(table)
    if "execution" in summary:
        _print_execution(console, config, summary["execution"])


def _print_execution(console: Console, config: MokaConfig, rows: list[dict[str, Any]]) -> None:
    ways = {"factored": "halves", "merged": "dyᵀx"}
    titles = ("out x in", "backend", "tokens", "dropout", "forward", "gradient", "added")
    table = Table(*(Column(title, no_wrap=True) for title in titles))
    for row in rows:
        into = " into W" if row["forward"] == "merged" and not row["dropout"] else ""
        table.add_row(
            row["layer"],
            row["backend"],
            str(row["tokens"]),
            "on" if row["dropout"] else "off",
            row["forward"] + into,
            ways[row["gradient"]],
            f"{row['added']:.0%}",
        )
    console.print(
        f"How each of these layers is computed: execution {config.execution!r} (--set execution=NAME takes "
        f"{', '.join(EXECUTIONS)}).\n"
        'tokens: batch x length. forward: factored, two small products a shape; merged, ΔW is formed and, "into W", '
        "added to the frozen weight. gradient of the factors: from half products, or from dyᵀx.\n"
        "added: the mixture's predicted time over that of this frozen layer alone, forward and backward; the other "
        "layers of a model add nothing. A prediction can be off several times over; those for a gpu were not measured."
    )
    console.print(table)
