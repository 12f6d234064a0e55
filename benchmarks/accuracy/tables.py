"""The table and the picture of the accuracy study, from its rows.

    python -m benchmarks.accuracy.tables

Intervals are 95 % percentiles of a bootstrap that draws seeds and the questions' sources: what other seeds and another
test of the same kind would give. A difference is taken question by question, against `REFERENCE` or as `PAIRS` has it,
so that what is hard for both does not count; on the test only of methods with all `SEEDS`. Results:
results/accuracy_smollm2-135m.md, docs/accuracy.png
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.rows import BASE, ROWS, next_rates, read_rows
from benchmarks.harness import note, table

REFERENCE = "qlora-32"
SEEDS = 3
# (a method, another one, what their difference says)
PAIRS = (
    ("moka-recommended", "moka-paper", "the preset `recommended` for `paper`"),
    ("moka-recommended", "qlora-wide-3", "the preset `recommended` for a LoRA of its size"),
    ("moka-wide-3-scale", "moka-paper", "r=3 on five layers, scale 10, for r=10 on two"),
    ("moka-wide-3-scale", "moka-paper-scale", "r=3 on five layers for r=10 on two, both at scale 10"),
    ("qlora-wide-3", "qlora-matched", "LoRA r=3 on five layers for r=9 on two"),
    ("moka-recommended", "qlora-wide-3-scale", "the preset `recommended` for a LoRA of its size, alpha 20r"),
    ("moka-s-small", "qlora-matched", "MoKA_s for a LoRA of twice its size"),
    ("moka-paper-scale", "moka-paper", "scale 10, on the two layers"),
    ("qlora-wide-3-scale", "qlora-wide-3", "alpha 20r for 2r"),
    ("moka-recommended", "moka-wide-3-stable", "a LoRA of rank 1 for one of three balanced terms"),
    ("moka-wide-3-stable", "qlora-wide-3", "three balanced terms for a LoRA of their size"),
    ("moka-wide-3-stable", "moka-wide-3-scale", "scaling by shape, scale 30, for scale 10"),
    ("moka-paper", "moka-uniform", "a learned gate for a uniform one"),
    ("moka-gates", "moka-paper", "gates that learn ten times as fast"),
    ("moka-paper", "qlora-matched", "`paper` for a LoRA of its size"),
    ("moka-paper", "lokr", "`paper` for a LoKr of its size"),
    ("moka-stable", "moka-paper", "scaling by shape"),
    ("moka-paper", "moka-one-shape", "five shapes for one"),
    ("moka-paper", "moka-r5", "r=10 for r=5"),
    ("moka-wide-10-stable", "moka-wide-3-stable", "r=10 for r=3, on five layers"),
    ("moka-s", "moka-paper", "`paper-s` for `paper`"),
    ("qdora-32", "qlora-32", "DoRA for LoRA"),
)
DRAWS = 10_000
PICTURE = Path(__file__).parents[2] / "docs" / "accuracy.png"
Rows = Sequence[Mapping[str, Any]]
Interval = tuple[float, float, float]  # the mean, and its ends


def main(argv: Sequence[str] | None = None) -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.rows)
    if not rows:
        parser.error(f"{arguments.rows}: expected rows of benchmarks.accuracy.study; there are none")
    text = markdown(rows)
    arguments.rows.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, arguments.picture)
    note(text)


def markdown(rows: Rows) -> str:
    """A table of the test and one of the tries on validation for each task."""
    parts = ["# Accuracy study", _setting(rows)]
    for task in dict.fromkeys(row["task"] for row in rows):
        parts += [f"## {task}", _base_line(rows, task), _test_table(rows, task)]
        parts += ["Differences on the test, and on validation with its one seed:", _pairs_table(rows, task)]
        parts += ["Tries on validation: learning rate, loss of the right answers, accuracy", _tries_table(rows, task)]
    return "\n\n".join(parts) + "\n"


def chosen_rows(rows: Rows, task: str, method: str, split: str = "test") -> list[Mapping[str, Any]]:
    """The rows of a method on a split, by seed, at the learning rate that validation chose."""
    _, rate = next_rates(rows, task, method)  # type: ignore[arg-type]
    found = [row for row in rows if (row["task"], row["method"], row["split"]) == (task, method, split)]
    return sorted((row for row in found if row["rate"] == rate), key=lambda row: row["seed"])


def answered(rows: Rows, name: str) -> np.ndarray:
    """Whether each question was answered right, (seeds, questions)."""
    return np.array([[int(digit) for digit in row[f"{name}_each"]] for row in rows])


def lost(rows: Rows) -> np.ndarray:
    """What each question adds to the loss, (seeds, questions): nats of its right answer, whose mean is the loss."""
    each = np.array([row["lost_each"] for row in rows])
    return each * (np.array([row["loss"] for row in rows]) / each.mean(axis=1))[:, None]


def interval(values: np.ndarray, *, sources: Sequence[int] | None = None, draws: int = DRAWS) -> Interval:
    """The mean over seeds and questions, and the ends of its 95 % interval.

    What n seeds deviate from their mean is taken √(n / (n - 1)) times as far, since a bootstrap of few understates it.
    Even so, of three seeds that differ by a percentage point or more it holds what is true 9 times of 10 rather than
    19 of 20 (simulated).

    Args:
        values: (seeds, questions), such as 1 for a question that was answered right and 0 for one that was not; of two
            methods one minus the other, seed by seed, as a seed orders the examples alike for all methods.
        sources: which questions are drawn together, a number for each; None for each alone.
        draws: of the bootstrap.
    """
    rng = np.random.default_rng(0)
    groups = np.arange(values.shape[1]) if sources is None else np.unique(sources, return_inverse=True)[1]
    count, seeds = groups.max() + 1, len(values)
    drawn = rng.multinomial(count, np.full(count, 1 / count), draws)[:, groups]  # how often each question is drawn
    drawn = drawn / drawn.sum(axis=1, keepdims=True)
    times = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    wider = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    mean = values.mean(axis=0)
    found = drawn @ mean + wider * ((times @ (values - mean)) * drawn).sum(axis=1)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def base_row(rows: Rows, task: str, split: str = "test") -> Mapping[str, Any] | None:
    """The row of the base alone on a task's split."""
    found = (row for row in rows if (row["task"], row["method"], row["split"]) == (task, BASE, split))
    return next(found, None)


def sources(rows: Rows, task: str, split: str = "test") -> Sequence[int] | None:
    """Which questions of a task's split are about one thing, from the row of the base."""
    found = base_row(rows, task, split)
    return None if found is None else found.get("sources")


def differences(own: Rows, than: Rows, alike: Sequence[int] | None) -> tuple[Interval, Interval]:
    """Accuracy by character and loss minus another method's, over the seeds that both have, with their intervals."""
    seeds = {row["seed"] for row in own} & {row["seed"] for row in than}
    own, than = ([row for row in some if row["seed"] in seeds] for some in (own, than))
    return (
        interval(answered(own, "accuracy_norm") - answered(than, "accuracy_norm"), sources=alike),
        interval(lost(own) - lost(than), sources=alike),
    )


def _differences_told(own: Rows, than: Rows, alike: Sequence[int] | None) -> list[str]:
    accuracy, loss = differences(own, than, alike)
    return [_percent(*accuracy, sign=True), "{:+.3f} ({:+.3f} to {:+.3f})".format(*loss)]


def _setting(rows: Rows) -> str:
    trained = [row for row in rows if row["method"] != BASE]
    if not trained:
        return "No run yet."
    hardware = sorted({row["hardware"] for row in trained})
    versions = sorted({", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in trained})
    commits = sorted({row["commit"] or "unknown" for row in trained})
    epochs, batch = (", ".join(map(str, sorted({row[name] for row in trained}))) for name in ("epochs", "batch"))
    return (
        f"{len(trained)} runs; epochs: {epochs}; batches of {batch}; {rows[0]['dtype']} on a base decoded from NF4 "
        f"with double quantisation. {'; '.join(hardware)}. {'; '.join(versions)}. Commits {', '.join(commits)}."
    )


def _base_line(rows: Rows, task: str) -> str:
    found = base_row(rows, task)
    if found is None:
        return "The base alone has no row."
    mean, low, high = interval(answered([found], "accuracy_norm"), sources=sources(rows, task))
    return (
        f"The base alone: accuracy by character {_percent(mean, low, high)} %, plain "
        f"{100 * found['accuracy']:.1f} %, loss {found['loss']:.3f}; {found['questions']} questions."
    )


def _test_table(rows: Rows, task: str) -> str:
    reference, alike = chosen_rows(rows, task, REFERENCE), sources(rows, task)
    lines = []
    for method, what in METHODS.items():
        own = chosen_rows(rows, task, method)
        if not own:
            continue
        minus: list[str | None] = [None, None]
        if len(reference) >= SEEDS <= len(own) and method != REFERENCE:
            minus = list(_differences_told(own, reference, alike))
        lines.append(
            [
                method,
                what.about,
                f"{own[0]['parameters']:,}",
                f"{own[0]['rate']:g}",
                len(own),
                _percent(*interval(answered(own, "accuracy_norm"), sources=alike)),
                minus[0],
                f"{100 * answered(own, 'accuracy').mean():.1f}",
                f"{lost(own).mean():.3f}",
                minus[1],
                f"{np.median([row['train_seconds'] for row in own]):.0f} s",
            ]
        )
    headers = ["method", "what", "trainable", "rate", "seeds", "accuracy by character, %", f"minus {REFERENCE}"]
    return table([*headers, "plain, %", "loss", f"minus {REFERENCE}", "training"], lines)


def _pairs_table(rows: Rows, task: str) -> str:
    lines = []
    for one, other, about in PAIRS:
        cells: list[str | None] = []
        for split, least in (("test", SEEDS), ("validation", 1)):
            own, than = (chosen_rows(rows, task, method, split) for method in (one, other))
            enough = len(own) >= least <= len(than)
            cells += _differences_told(own, than, sources(rows, task, split)) if enough else [None, None]
        if any(cells):
            lines.append([about, f"{one} minus {other}", *cells])
    headers = ["what", "difference", "test: accuracy, %", "loss", "validation: accuracy, %", "loss"]
    return table(headers, lines)


def _tries_table(rows: Rows, task: str) -> str:
    lines = []
    for method in METHODS:
        tried = [row for row in rows if (row["task"], row["method"], row["split"]) == (task, method, "validation")]
        cells = [
            f"{row['rate']:g}: {row['loss']:.3f}, {100 * row['accuracy_norm']:.1f} %"
            for row in sorted(tried, key=lambda row: row["rate"])
        ]
        if cells:
            lines.append([method, "; ".join(cells)])
    return table(["method", "tries"], lines)


def _percent(mean: float, low: float, high: float, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return f"{100 * mean:{form}} ({100 * low:{form}} to {100 * high:{form}})"


def draw(rows: Rows, path: Path) -> None:
    """Accuracy against trainable parameters, and below it the loss minus that of `REFERENCE`; a column a task.

    Methods of about the same size are set apart a little, so that each can be seen. The accuracy of the base is a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(5.5 * len(tasks) + 2, 8), layout="constrained")
    shown: dict[str, Any] = {}
    above, below = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for task, accuracy, loss in zip(tasks, above, below, strict=True):
        alike, drawn_at, reference = sources(rows, task), 0.0, chosen_rows(rows, task, REFERENCE)
        found = {method: own for method in METHODS if (own := chosen_rows(rows, task, method))}
        for method, own in sorted(found.items(), key=lambda item: item[1][0]["parameters"]):
            drawn_at = max(own[0]["parameters"], 1.045 * drawn_at)
            shown[method] = _point(
                accuracy, method, drawn_at, interval(answered(own, "accuracy_norm"), sources=alike), 100
            )
            if method != REFERENCE and len(reference) >= SEEDS <= len(own):
                _point(loss, method, drawn_at, differences(own, reference, alike)[1])
        base = base_row(rows, task)
        if base is not None:
            shown["the base alone"] = accuracy.axhline(100 * base["accuracy_norm"], color="grey", linestyle="--")
        loss.axhline(0, color="lightgrey", zorder=0)
        accuracy.set(title=task, ylabel="accuracy by character, %")
        loss.set(xscale="log", xlabel="trainable parameters", ylabel=f"loss minus that of {REFERENCE}, nats")
        loss.set_xlim(1e5, 1e7)
        loss.xaxis.set_minor_formatter(NullFormatter())
    names = [name for name in (*METHODS, "the base alone") if name in shown]
    figure.legend([shown[name] for name in names], names, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=100)


def _point(axes: Any, method: str, at: float, found: Interval, times: float = 1) -> Any:
    """A method's interval in a panel, in the method's own colour and sign."""
    from matplotlib import colormaps

    mean, low, high = (times * value for value in found)
    style = list(METHODS).index(method)
    return axes.errorbar(
        at,
        mean,
        yerr=[[mean - low], [high - mean]],
        fmt="osD^v"[style % 5],
        color=colormaps["tab20"](style % 20),
        capsize=2,
    )


if __name__ == "__main__":
    main()
