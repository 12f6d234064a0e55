"""Which layers a config of PEFT means: its own fields beside target_modules, checked against the model."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from moka_core import LayerPlan
from moka_core.errors import ConfigError, TargetError
from moka_core.plan import matches
from moka_torch.config import MokaConfig
from moka_torch.targets import linear_layers, plan_stated, plan_targets

# PEFT adds these names to modules_to_save itself, by task, without looking for them.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def plan_choice(config: MokaConfig, model: nn.Module) -> dict[str, LayerPlan]:
    """The plan of every layer that a config of PEFT means: those that `layers` states, or those that are chosen.

    Raises:
        TargetError, ConfigError, AdapterError: see `plan_stated` and `plan_targets`.
        TargetError: a number of layers_to_transform, a name of layers_pattern or of modules_to_save is not there, or
            all layers that match are excluded.
    """
    core = config.to_core()
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ConfigError("layers_to_transform: this type of model has its target_modules as one string; name them")
    _check_modules_to_save(config, model)
    if config.layers:
        return plan_stated(core, config.layers, model)
    matching = [path for path in linear_layers(model) if matches(core.target_modules, path)]
    excluded = functools.partial(_excluded, config)
    if matching:
        _check_layer_numbers(config, matching)
        if all(map(excluded, matching)):
            names = ("exclude_modules", "layers_to_transform", "modules_to_save")
            said = [f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name) not in (None, [])]
            raise TargetError(
                f"target_modules: all of the {len(matching)} layers that match are excluded, by {' and '.join(said)}"
            )
    plans = plan_targets(core, model, excluded)
    _warn_of_idle_exclusion(config, model)
    _warn_of_idle_bias(config, model, plans)
    return plans


def _check_layer_numbers(config: MokaConfig, matching: list[str]) -> None:
    """Raise a TargetError for a number of layers_to_transform, or a layers_pattern, that no matching layer has."""
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None or wanted == []:
        return
    such = f"the layers that target_modules matches, such as {matching[0]!r}"
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        if not _numbers(matching, pattern):
            raise TargetError(
                f"layers_pattern: {pattern!r} is no numbered list on the paths of {such}; name what stands before the "
                "number there"
            )
    known = _numbers(matching, patterns)
    if not known:
        raise TargetError(
            f"layers_to_transform: found no number of a layer on the paths of {such}; name what stands before it in "
            "layers_pattern, or leave both out and name whole paths in target_modules"
        )
    absent = [number for number in ([wanted] if isinstance(wanted, int) else wanted) if number not in known]
    if absent:
        raise TargetError(
            f"layers_to_transform: expected some of {_spans(known)}, the numbers of {such}; got "
            f"{', '.join(map(str, absent))}"
        )


def _numbers(paths: Iterable[str], pattern: list[str] | str | None) -> set[int]:
    """The numbers that layers have to layers_to_transform, by PEFT's own rule."""
    numbers = set()
    for path in paths:
        for number in {int(part) for part in path.split(".") if part.isdecimal()}:
            rules = SimpleNamespace(target_modules=_ends(path), layers_to_transform=number, layers_pattern=pattern)
            if "." in path and check_target_module_exists(rules, path):
                numbers.add(number)
    return numbers


def _spans(numbers: Iterable[int]) -> str:
    """Whole numbers in order, runs of them written as a span: "0-3, 7"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _check_modules_to_save(config: MokaConfig, model: nn.Module) -> None:
    """Raise a TargetError for a name that no module ends in, which PEFT would pass over."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    expected = _HEADS_OF_TASKS.get(config.task_type or "", ())
    for name in config.modules_to_save or []:
        if name in expected or any(path.endswith(name) for path in paths):
            continue
        near = difflib.get_close_matches(name, sorted({path.rpartition(".")[2] for path in paths}), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else "; take it out"
        raise TargetError(f"modules_to_save: {name!r} matches no module of this model{hint}")


def _excluded(config: MokaConfig, path: str) -> bool:
    """Whether PEFT's rules leave a module out: exclude_modules, modules_to_save, layers_to_transform."""
    rules = SimpleNamespace(
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_modules=_ends(path),
        target_parameters=None,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return not check_target_module_exists(rules, path)


def _ends(path: str) -> list[str]:
    """Targets that match a path by its end: PEFT does not ask for the number of a layer that is named by its path."""
    return [path.rpartition(".")[2]]


def _warn_of_idle_exclusion(config: MokaConfig, model: nn.Module) -> None:
    if not config.exclude_modules:
        return
    rules = SimpleNamespace(exclude_modules=config.exclude_modules, target_modules=[], target_parameters=None)
    if not any(check_target_module_exists(rules, path) is not False for path, _ in model.named_modules() if path):
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. Check that it "
            "names modules of this model.",
            stacklevel=2,
        )


def _warn_of_idle_bias(config: MokaConfig, model: nn.Module, plans: Iterable[str]) -> None:
    if config.bias == "all":
        found = any(name.rpartition(".")[2] == "bias" for name, _ in model.named_parameters())
    else:
        found = any(getattr(model.get_submodule(path), "bias", None) is not None for path in plans)
    if config.bias != "none" and not found:
        holder = "this model has" if config.bias == "all" else "the adapted layers have"
        warnings.warn(f"bias={config.bias!r}: {holder} no bias, so that none is trained", stacklevel=2)
