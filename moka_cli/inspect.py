"""`moka inspect`: what an adapter holds, and what its training made of it."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from moka_cli.figures import check_json, text_console, write_json
from moka_core import Adapter, ConfigError, LayerPlan
from moka_core.adapter import path_order
from moka_core.config import RUNTIME_FIELDS
from moka_core.fingerprint import has_sketch
from moka_core.spectrum import DEAD, REPEATS, LayerFigures, effective_rank, layer_figures, stable_rank

Kind = tuple[str, LayerPlan]  # the last part of a layer's path, and its shapes

_RANK_TITLES = {
    "spectral_norm": "‖ΔW‖₂",
    "stable_rank": "stable\nrank",
    "effective_rank": "effective\nrank",
    "rank": "rank",
}

LISTED = 10  # dead and repeated terms that are listed one by one without --layers


def run_inspect(
    folder: Path, *, rank: bool, layers: bool, json_file: Path | None, gates_png: Path | None, shares_png: Path | None
) -> None:
    """Print an adapter's figures, and draw them where pictures were asked for."""
    from conversion import load_adapter
    from conversion.new_folder import new_file

    check_json(json_file)
    for option, file in (("--png", gates_png), ("--shares-png", shares_png)):
        if file is not None:
            _check_picture(option, file)
    if gates_png is not None and gates_png == shares_png:
        raise ConfigError(f"--png and --shares-png: expected two files; both are {gates_png}")
    adapter = load_adapter(folder)
    if gates_png is not None and adapter.config.gate == "uniform":
        raise ConfigError(
            f"--png: {folder} has a uniform gate, so there are none to draw; --shares-png draws its terms"
        )
    figures = analyse(adapter, rank=rank)
    if gates_png is not None:
        with new_file(gates_png) as draft:
            _pictures("--png").plot_gates(adapter, draft)
    if shares_png is not None:
        with new_file(shares_png) as draft:
            _pictures("--shares-png").plot_shares(figures, draft)
    summary = summarise(folder, adapter, figures)
    _print(text_console(json_file), summary, adapter, figures, every=layers)
    write_json(json_file, summary)


def analyse(adapter: Adapter, *, rank: bool) -> dict[str, LayerFigures]:
    """The figures of every layer, in the model's order, with a bar of progress on a terminal.

    Args:
        rank: compute the singular values too.
    """
    errors = Console(stderr=True)
    columns = (TextColumn("singular values" if rank else "norms"), BarColumn(), MofNCompleteColumn())
    figures = {}
    with Progress(
        *columns, TimeRemainingColumn(), console=errors, transient=True, disable=not errors.is_terminal
    ) as bar:
        for path in bar.track(sorted(adapter.layers, key=path_order)):
            figures[path] = layer_figures(adapter.layers[path], adapter.layer_config(path), spectrum=rank)
    return figures


def summarise(folder: Path, adapter: Adapter, figures: Mapping[str, LayerFigures]) -> dict[str, Any]:
    """Everything that is known of an adapter, as plain values."""
    from conversion.adapter_folder import CONFIG_FILE, WEIGHTS_FILE

    stated = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    dtypes: Counter[str] = Counter()
    for layer in adapter.layers.values():
        for _, array in layer.tensors():
            dtypes[str(array.dtype)] += array.size
    config = {key: value for key, value in adapter.config.to_dict().items() if key not in RUNTIME_FIELDS}
    return {
        "adapter": str(folder),
        "format_version": stated["format_version"],
        "checksum": stated["checksum"],
        "base": {
            "model": adapter.base_model,
            "fingerprint": adapter.base_fingerprint,
            "quantisation": adapter.base_quantisation,
        },
        "config": config,
        "trainable": adapter.trainable,
        "dtypes": dict(sorted(dtypes.items())),
        "bytes": {name: (folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)},
        "bounds": {"dead": DEAD, "repeats": REPEATS},
        "untrained": sum(layer.untrained for layer in figures.values()),
        "dead": sum(len(layer.dead) for layer in figures.values()),
        "repeated": sum(len(layer.repeated) for layer in figures.values()),
        "layers": {path: _layer_values(layer) for path, layer in figures.items()},
    }


def _layer_values(layer: LayerFigures) -> dict[str, Any]:
    values: dict[str, Any] = {
        "out_features": layer.plan.out_features,
        "in_features": layer.plan.in_features,
        "norm": layer.norm,
        **_ranks(layer),
        "untrained": layer.untrained,
        "cosine": layer.cosine,
    }
    shape_lists = itertools.chain.from_iterable([group.to_list()[1:]] * group.copies for group in layer.plan.groups)
    values["terms"] = [
        {
            "shape": shape,
            "gate": term.gate,
            "norm": term.norm,
            "share": term.share,
            "dead": term.dead,
            "repeats": term.repeats,
        }
        for shape, term in zip(shape_lists, layer.terms, strict=True)
    ]
    return values


def _ranks(layer: LayerFigures) -> dict[str, Any]:
    """What the singular values say; nothing if there are none."""
    values = layer.singular_values
    if values is None:
        return {}
    return {
        "spectral_norm": float(values[0]),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
        "rank": int(np.count_nonzero(values)),
    }


def _pictures(option: str) -> ModuleType:
    try:
        from moka_cli import pictures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError(f"{option}: needs matplotlib, which is not installed; run: pip install matplotlib") from None
    return pictures


def _check_picture(option: str, file: Path) -> None:
    """Refuse, before anything is computed, a picture that could not be written in the end."""
    from conversion.new_folder import check_file

    _pictures(option)
    if os.path.lexists(file):
        raise ConfigError(f"{option} {file}: expected a file that does not exist yet; choose another name or remove it")
    check_file(file)


def _print(
    console: Console, summary: dict[str, Any], adapter: Adapter, figures: Mapping[str, LayerFigures], *, every: bool
) -> None:
    _print_head(console, summary, adapter)
    kinds: dict[Kind, dict[str, LayerFigures]] = {}
    for path, layer in figures.items():
        kinds.setdefault((path.rpartition(".")[2], layer.plan), {})[path] = layer
    by_kind = {kind: list(layers.values()) for kind, layers in kinds.items()}
    console.print(_kinds_table(by_kind))
    console.print(_terms_table(by_kind))
    for kind, layers in kinds.items() if every else ():
        console.print(_layers_table(kind, layers))
    _print_findings(console, figures, every=every)


def _print_head(console: Console, summary: dict[str, Any], adapter: Adapter) -> None:
    config, base = summary["config"], summary["base"]
    fingerprint = f"fingerprint {base['fingerprint'][:12]}…" if base["fingerprint"] else "no fingerprint"
    if base["fingerprint"] and not has_sketch(base["fingerprint"]):
        fingerprint += " without linear weights"
    targets = config["target_modules"]
    own = [name for name in ("shapes_pattern", "scale_pattern") if config[name]]
    rows = {
        "adapter": f"{summary['adapter']}, format version {summary['format_version']}, "
        f"checksum {summary['checksum'][:12]}… right",
        "base": f"{base['model'] or 'not named'}, {fingerprint}, held as {base['quantisation'] or 'not stated'}",
        "trained": f"{summary['trainable']:,} parameters of {len(adapter.layers)} layers, "
        + ", ".join(f"{count:,} in {dtype}" for dtype, count in summary["dtypes"].items()),
        "settings": ", ".join(
            f"{name} {config[name]}" for name in ("r", "gate", "scaling", "scale", "identity", "zero_factor", "dropout")
        )
        + (f"; {' and '.join(own)} for some layers" if own else ""),
        "targets": targets if isinstance(targets, str) else ", ".join(targets),
        "on disk": ", ".join(f"{name} {size:,} bytes" for name, size in summary["bytes"].items()),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", text)
    console.print(table, highlight=False)


def _kinds_table(kinds: Mapping[Kind, list[LayerFigures]]) -> Table:
    """ΔW by kind of layer: the median, and the range below it."""
    ranks = _ranks(next(iter(kinds.values()))[0])
    titles = ("layers", "‖ΔW‖F", *(_RANK_TITLES[name] for name in ranks))
    table = _table("layer", *titles, title="ΔW: median and range")
    for (kind, plan), layers in kinds.items():
        found = [_ranks(layer) for layer in layers]
        cells = [_spread(layer.norm for layer in layers), *(_spread(row[name] for row in found) for name in ranks)]
        table.add_row(f"{kind}\n{plan.key}", str(len(layers)), *cells)
    return table


def _table(name: str, *numbers: str, title: str) -> Table:
    """A table whose numbers are never broken or cut; with the shapes of a 7B model it has 80 columns at most."""
    columns = Column(name, overflow="fold"), *(Column(number, no_wrap=True) for number in numbers)
    return Table(*columns, title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _terms_table(kinds: Mapping[Kind, list[LayerFigures]]) -> Table:
    """Gates and shares by kind of layer and shape."""
    titles = ("layer", "terms of each shape", "gate", "share", "dead", "repeat")
    table = _table(*titles, title="Terms: median and range")
    for (kind, plan), layers in kinds.items():
        first = 0
        for group in plan.groups:
            numbers = range(first, first + group.copies)
            first += group.copies
            terms = [layer.terms[number] for layer in layers for number in numbers]
            table.add_row(
                kind if not numbers.start else "",
                f"{group.copies} x {group.shape}",
                _spread((term.gate for term in terms), "{:.3f}".format),
                _spread((term.share for term in terms), "{:.3f}".format),
                str(sum(number in layer.dead for layer in layers for number in numbers)),
                str(sum(number in layer.repeated for layer in layers for number in numbers)),
            )
        table.add_section()
    return table


def _layers_table(kind: Kind, figures: Mapping[str, LayerFigures]) -> Table:
    """One kind's layers, a row each, named by what their paths do not share."""
    title, labels = _labels(list(figures))
    ranks = _ranks(next(iter(figures.values())))
    ranks.pop("rank", None)
    titles = ("layer", "‖ΔW‖F", *(_RANK_TITLES[name] for name in ranks), "gates", "shares", "dead", "repeat")
    table = _table(*titles, title=f"\n{title}, {kind[1].key}")
    for label, layer in zip(labels, figures.values(), strict=True):
        gates, shares = ([getattr(term, name) for term in layer.terms] for name in ("gate", "share"))
        table.add_row(
            label,
            _figure(layer.norm),
            *(_figure(value) for name, value in _ranks(layer).items() if name in ranks),
            _range(gates, "{:.3f}".format),
            _range(shares, "{:.3f}".format),
            str(len(layer.dead)),
            str(len(layer.repeated)),
        )
    return table


def _labels(paths: list[str]) -> tuple[str, list[str]]:
    """What paths share, "*" for the rest; and the rest of each: ("layers.*.q", ["0", "1"])."""

    def shared(parts: list[list[str]]) -> list[str]:
        columns = zip(*parts, strict=False)
        return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]

    parts = [path.split(".") for path in paths]
    start = shared(parts)
    rest = [own[len(start) :] for own in parts]
    end = shared([own[::-1] for own in rest])[::-1]
    labels = [".".join(own[: len(own) - len(end)]) for own in rest]
    if not all(labels):
        return parts[0][-1], paths
    return ".".join([*start, "*", *end]), labels


def _print_findings(console: Console, figures: Mapping[str, LayerFigures], *, every: bool) -> None:
    """How many layers are untrained and terms dead or repeated, and which."""
    untrained = [path for path, layer in figures.items() if layer.untrained]
    dead = [
        f"{path} term {number}, {term.shape}: {term.dead}; gate {term.gate:.2g}, share {term.share:.2g}"
        for path, layer in figures.items()
        for number in layer.dead
        for term in [layer.terms[number]]
    ]
    repeated = [
        f"{path} term {number}, {layer.terms[number].shape}: as term {layer.terms[number].repeats}"
        for path, layer in figures.items()
        for number in layer.repeated
    ]
    for title, lines in (
        ("untrained layers (ΔW = 0: every term is zero)", untrained),
        ("dead terms (leaving one out changes ΔW by no more than rounding ΔW to bfloat16 may)", dead),
        ("repeated terms (an earlier term of the same shape has the same direction: the two are one)", repeated),
    ):
        shown = lines if every else lines[:LISTED]
        console.print(f"[bold]{len(lines)}[/bold] {title}" + ":" * bool(lines), highlight=False)
        for line in shown:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
        if len(shown) < len(lines):
            console.print(f"  and {len(lines) - len(shown)} more: --layers lists them", highlight=False)


def _spread(values: Iterable[float], shown: Callable[[float], str] | None = None) -> str:
    """The median over the range, or the one value that there is."""
    found, shown = list(values), shown or _figure
    median = shown(float(np.median(found)))
    return median if min(found) == max(found) else f"{median}\n[dim]{_range(found, shown)}[/dim]"


def _range(values: list[float], shown: Callable[[float], str]) -> str:
    return f"{shown(min(values))}–{shown(max(values))}"


def _figure(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
