"""`moka report`: what a run did, as one page of HTML that needs nothing else."""

from __future__ import annotations

import importlib.resources
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moka_cli.inspect import Kind, analyse
from moka_core import Adapter, DataError, PathError
from moka_core.spectrum import LayerFigures

if TYPE_CHECKING:
    from moka_jax.train.saved import Which

MARK = '<meta name="generator" content="moka report">'  # by which a page of ours is known
_ROW: dict[str, Any] = {
    "name": str,
    "figure": (int, float, type(None)),
    "bound": (int, float),
    "unit": str,
    "worst": str,
    "passed": bool,
}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote before and after its training, and, if known, what it should have written."""

    prompt: str
    before: str
    after: str
    wanted: str | None = None


def run_report(
    run: Path,
    *,
    out: Path | None,
    base: Path | None,
    which: Which,
    parity: Path | None,
    before: Path | None,
    after: Path | None,
) -> None:
    """Write the page of a run, and say where it is."""
    from moka_cli.train import trained_model
    from moka_jax import export_adapter

    target = run / "report.html" if out is None else out
    check_target(target)
    figures = None if parity is None else read_parity(parity)
    completions = read_completions(before, after)
    console = Console()
    with console.status("reading the run"):
        model, step = trained_model(run, base=base, which=which)
        adapter = export_adapter(model)
    write_report(target, run, adapter, step, which=which, parity=figures, completions=completions)
    console.print(f"{target}: open it in a browser", highlight=False, markup=False, soft_wrap=True)


def write_report(
    target: Path,
    run: Path,
    adapter: Adapter,
    step: int,
    *,
    which: Which = "last",
    parity: Mapping[str, Any] | None = None,
    completions: Sequence[Completion] = (),
) -> None:
    """Write the page of a run; an earlier page is replaced, and it is written whole or not at all.

    Args:
        run: output folder of the run.
        adapter: of the run, after that step.
        which: the checkpoint that the adapter is of.
        parity: as `ParityReport.to_dict` gives it.

    Raises:
        CheckpointError, DataError: the run's settings or metrics cannot be read.
        PathError: the page cannot be written.
    """
    from conversion.new_folder import new_file

    check_target(target)
    page = render(run, adapter, step, which=which, parity=parity, completions=completions)
    with new_file(target) as draft:
        draft.write_text(page, encoding="utf-8")


def render(
    run: Path,
    adapter: Adapter,
    step: int,
    *,
    which: Which,
    parity: Mapping[str, Any] | None,
    completions: Sequence[Completion],
) -> str:
    """The page's HTML; see `write_report`."""
    from jinja2 import Environment, StrictUndefined

    from moka_cli.report_charts import data_uri, gates_figure, norms_figure, training_figure
    from moka_jax.train import read_metrics, saved_run

    settings, _ = saved_run(run, which=which)
    records = read_metrics(run / "metrics.jsonl", allow_cut_end=True)
    figures = analyse(adapter, rank=False)
    training, gates = training_figure(records), gates_figure(records, adapter, step)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = _figure
    template = environment.from_string(
        (importlib.resources.files("moka_cli") / "report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        name=run.resolve().name,
        base=settings["base"],
        tiles=list(tiles(records, adapter, step, of=settings["steps"])),
        events=list(events(records)),
        training=None if training is None else data_uri(training),
        gated=adapter.config.gate != "uniform",
        gates=None if gates is None else data_uri(gates),
        step=step,
        norms=data_uri(norms_figure(figures)),
        kinds=kind_rows(figures),
        parity=parity,
        completions=completions,
        settings=list(flat(settings)),
        starts=[record for record in records if record["kind"] == "start"],
        data=[record for record in records if record["kind"] == "data"],
    )


def tiles(records: Sequence[Mapping[str, Any]], adapter: Adapter, step: int, *, of: int) -> Iterator[tuple[str, str]]:
    """The few numbers that say how a run went, each with its name; `of` is how many steps it was to take."""
    from moka_jax.train.stopping import best_evaluation

    held_out = [record for record in records if record["kind"] == "eval"]
    trained = [record for record in records if record["kind"] == "train"]
    if held_out:
        yield "held-out loss", _change([record["loss"] for record in held_out])
        best = best_evaluation(records)
        if best is not None and best["step"] != held_out[-1]["step"]:
            yield "lowest held-out loss", f"{best['loss']:.4f} after step {best['step']}"
    if trained:
        losses = [record["loss"] for record in trained]
        few = max(1, len(losses) // 10)  # one batch alone says little
        means = [statistics.mean(losses[:few]), statistics.mean(losses[-few:])]
        yield "training loss, first and last tenth", _change(means[: len(losses)])
    yield "steps recorded", f"{max([step, *(record['step'] for record in records)])} of {of}"
    yield "trained parameters", f"{adapter.trainable:,} on {len(adapter.layers)} layers"
    if trained:
        yield "tokens a second (median)", f"{statistics.median(r['tokens_per_second'] for r in trained):,.0f}"
    seconds = max((record.get("seconds", 0.0) for record in records), default=0.0)
    yield "time, all included", f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
    counts = [record for record in records if record["kind"] in ("train", "skip")]
    skipped = counts[-1].get("skipped", 0) if counts else 0
    if skipped:
        yield "skipped steps", str(skipped)
    yield "adapter shown", f"after step {step}"


def events(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What happened to the run beside its steps, in words."""
    starts = Counter(record["step"] for record in records if record["kind"] == "start")
    for step, count in sorted(starts.items()):
        often = f", {count} times" if count > 1 else ""
        if step > 0:
            yield f"It was stopped, and went on from step {step}{often} (a dotted line in the charts)."
        elif often:
            yield f"It was started{often}, before its first step."
    for record in records:
        if record["kind"] == "fallback":
            lost = ", ".join(str(one["step"]) for one in record["damaged"])
            yield f"It went on from step {record['step']}, since newer checkpoints were damaged: {lost}."
    skipped = [record for record in records if record["kind"] == "skip"]
    if skipped:
        shown = ", ".join(f"{record['step']} ({record['reason']})" for record in skipped[:5])
        more = f", and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        yield f"Of the steps that changed nothing, these were recorded: {shown}{more}."


def kind_rows(figures: Mapping[str, LayerFigures]) -> list[dict[str, Any]]:
    """‖ΔW‖_F by kind of layer and number of terms, and what training left unused."""
    kinds: dict[Kind, list[LayerFigures]] = {}
    for path, layer in figures.items():
        kinds.setdefault((path.rpartition(".")[2], layer.plan), []).append(layer)
    return [
        {
            "kind": kind,
            "plan": plan.key,
            "terms": plan.terms,
            "layers": len(layers),
            "median": statistics.median(layer.norm for layer in layers),
            "least": min(layer.norm for layer in layers),
            "most": max(layer.norm for layer in layers),
            "untrained": sum(layer.untrained for layer in layers),
            "dead": sum(len(layer.dead) for layer in layers),
            "repeated": sum(len(layer.repeated) for layer in layers),
        }
        for (kind, plan), layers in kinds.items()
    ]


def flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str]]:
    """Settings as (dotted name, JSON)."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_parity(file: Path) -> dict[str, Any]:
    """The figures that `moka parity --json` wrote.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    expected = "expected the figures that moka parity --json FILE writes"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--parity {file}: {expected}; {error}") from error
    rows = values.get("rows") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(isinstance(values.get(name), list) for name in ("sides", "notes")):
        raise DataError(f"--parity {file}: {expected}; it has no rows, sides and notes")
    for number, row in enumerate(rows):
        wrong = [
            name for name, kind in _ROW.items() if not isinstance(row, dict) or not isinstance(row.get(name, ...), kind)
        ]
        if wrong:
            raise DataError(f"--parity {file}: {expected}; row {number} has no {' and no '.join(wrong)}")
    if values.get("passed") is not all(row["passed"] for row in rows):
        raise DataError(f"--parity {file}: {expected}; its verdict, {values.get('passed')!r}, is not that of its rows")
    return values


def read_completions(before: Path | None, after: Path | None) -> list[Completion]:
    """The completions that `moka generate --json` wrote of the same prompts, without the adapter and with it.

    Raises:
        DataError: one file is missing, cannot be read or holds something else; or the prompts differ.
    """
    if before is None and after is None:
        return []
    if before is None or after is None:
        raise DataError(
            "--before and --after: expected both, files that moka generate --json writes of the same prompts, without "
            "--adapter and with it; got one"
        )
    first, second = _lines("--before", before), _lines("--after", after)
    if [prompt for prompt, _ in first] != [prompt for prompt, _ in second]:
        alone = [prompt for prompt, _ in first if prompt not in dict(second)]
        alone += [prompt for prompt, _ in second if prompt not in dict(first)]
        told = f"only one has {alone[0]!r}" if alone else "their order differs"
        raise DataError(f"--before {before}, --after {after}: expected the same prompts in both; {told}")
    return [
        Completion(prompt=prompt, before=one, after=other)
        for (prompt, one), (_, other) in zip(first, second, strict=True)
    ]


def _lines(option: str, file: Path) -> list[tuple[str, str]]:
    expected = "expected lines that moka generate --json FILE writes"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {file}: {expected}; {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            pair = value["prompt"], value["completion"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pair = (None, None)
        if not all(isinstance(text, str) for text in pair):
            raise DataError(f"{option} {file}: {expected}; line {number} is {line[:60]}")
        found.append(pair)
    if not found:
        raise DataError(f"{option} {file}: {expected}; it is empty")
    return found


def check_target(target: Path) -> None:
    """Refuse, before anything is read, a page that could not be written; a page of ours may be replaced.

    Raises:
        PathError: something else stands there, or nothing can be written there.
    """
    from conversion.new_folder import check_file

    check_file(target)
    if target.is_file() and MARK not in target.read_bytes()[:4096].decode("utf-8", errors="replace"):
        raise PathError(
            f"{target}: expected a place without a file, or a page that moka report wrote; choose another name with "
            "--out, or remove it"
        )


def _change(losses: Sequence[float]) -> str:
    """The first and the last of them, or the one that there is."""
    return " → ".join(f"{loss:.4f}" for loss in (losses[:1] if len(losses) == 1 else (losses[0], losses[-1])))


def _figure(value: float | int | None) -> str:
    """A number to three digits, integers whole."""
    if value is None:
        return "not finite"
    return str(value) if isinstance(value, int) else f"{value:.3g}"
