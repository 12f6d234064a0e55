"""The proof that both backends compute the same: each stage compared, with its figure and its bound.

JAX and PyTorch are imported inside the functions that need both; the comparisons handle NumPy arrays alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from conversion.adapter_folder import load_adapter
from conversion.base_weights import Quantise, open_base
from moka_core import Adapter, ConfigError, DataError
from moka_core.oracle import dense_delta
from moka_core.probe import AdamW, Batch, Probe

# Bounds of the design. What was measured on SmolLM2-135M and on small random models stands in docs/parity.md.
DELTA_BOUND = 1e-6
LOGITS_BOUND = 1e-4
GRADIENT_BOUND = 1e-4
TRAINING_BOUND = 1e-4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: what was compared, the figure, the bound that it must not exceed, and where it was worst."""

    name: str
    figure: float
    bound: float
    unit: str
    worst: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is within its bound; a figure that is not a number is not."""
        return bool(self.figure <= self.bound)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All comparisons of one adapter on one base, and the two loss curves."""

    rows: tuple[Row, ...]
    losses: dict[str, list[float]]

    @property
    def passed(self) -> bool:
        """Whether every figure is within its bound."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {"passed": self.passed, "rows": rows, "losses": self.losses}


def check_parity(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    quantise: Quantise = "nf4-double",
    steps: int = 50,
    batch_size: int = 2,
    length: int = 64,
    optimiser: AdamW | None = None,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """What an adapter computes on a base in JAX and in PyTorch (PEFT on bitsandbytes), stage by stage, in float32.

    Each side quantises the base for itself and loads the same adapter folder, PyTorch through plain
    `PeftModel.from_pretrained`. Compared are the packed weights, the decoded weights, ΔW (each side against the
    float64 oracle), logits, next tokens, gradients, and the losses of `steps` optimiser steps.

    Args:
        adapter: an adapter folder.
        base: a Hugging Face model folder.
        quantise: see `open_base`.
        steps: optimiser steps of the training comparison; 0 leaves it out.
        batch_size, length: of the token batches.
        optimiser: by default AdamW with a constant rate of 1e-3.
        seed: of the tokens, where the base has no tokenizer.
        on_stage: called with the name of each stage as it begins.

    Raises:
        AdapterError, ModelError: the folders cannot be used.
        ConfigError: a number is out of range.
    """
    for name, value, least in (("steps", steps, 0), ("batch_size", batch_size, 1), ("length", length, 2)):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}; got {value}")
    from moka_jax.probe import JaxProbe
    from moka_torch.probe import TorchProbe

    opened = open_base(base, quantise=quantise)
    trained = load_adapter(adapter)
    on_stage("loading the base and the adapter in JAX")
    ours: Probe = JaxProbe(opened, trained)
    on_stage("loading the base and the adapter in PyTorch")
    theirs: Probe = TorchProbe(base, adapter, quantise=quantise)
    batches = token_batches(
        base, opened.config["vocab_size"], count=max(steps, 1), batch_size=batch_size, length=length, seed=seed
    )
    return compare(ours, theirs, trained, batches, optimiser=optimiser or AdamW(), steps=steps, on_stage=on_stage)


def compare(
    ours: Probe,
    theirs: Probe,
    adapter: Adapter,
    batches: Sequence[Batch],
    *,
    optimiser: AdamW,
    steps: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """Every comparison between two probes of one adapter; `theirs` is the reference."""
    on_stage("comparing the packed weights")
    rows = list(_packed_rows(ours, theirs))
    on_stage("comparing ΔW with the float64 oracle")
    rows += _delta_rows(ours, theirs, adapter)
    on_stage("comparing logits")
    rows += _logits_rows(ours.logits(batches[0].tokens), theirs.logits(batches[0].tokens))
    on_stage("comparing gradients")
    rows += _gradient_rows(ours.gradients(batches[0]), theirs.gradients(batches[0]))
    losses: dict[str, list[float]] = {}
    if steps:
        on_stage(f"training {steps} steps in JAX")
        losses["jax"] = ours.train(batches[:steps], optimiser)
        on_stage(f"training {steps} steps in PyTorch")
        losses["torch"] = theirs.train(batches[:steps], optimiser)
        gaps = np.abs(np.array(losses["jax"]) - np.array(losses["torch"]))
        worst = int(np.argmax(gaps))
        fall = f"loss {losses['torch'][0]:.3f} to {losses['torch'][-1]:.3f}"
        rows.append(
            Row(
                name=f"losses of {steps} optimiser steps",
                figure=float(gaps.max()),
                bound=TRAINING_BOUND,
                unit="largest difference",
                worst=f"step {worst}; {fall}",
            )
        )
    return ParityReport(rows=tuple(rows), losses=losses)


def token_batches(
    base: str | os.PathLike[str], vocab_size: int, *, count: int, batch_size: int, length: int, seed: int
) -> list[Batch]:
    """Batches of English text from Python's own help topics, or of random tokens where the base has no tokenizer.

    All tokens are learned but the first of each row, which nothing predicts.
    """
    need = count * batch_size * length
    if os.path.exists(os.path.join(base, "tokenizer.json")):
        from pydoc_data import topics

        from transformers import AutoTokenizer

        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        stream = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not stream:
            raise DataError(f"{base}: its tokenizer makes no tokens of English text")
        tokens = np.resize(np.array(stream, np.int32), need)
    else:
        tokens = np.random.default_rng(seed).integers(0, vocab_size, need, dtype=np.int32)
    grid = tokens.reshape(count, batch_size, length)
    return [Batch(tokens=rows, learned=np.ones(rows.shape, bool)) for rows in grid]


def _packed_rows(ours: Probe, theirs: Probe) -> Iterator[Row]:
    """Bit-equality of every part of every packed weight, and of the weights decoded from them."""
    mine = {name: (weight, decoded) for name, weight, decoded in ours.packed()}
    layers, differing, where = (
        set(),
        {"codes": 0, "absmax": 0, "decoded": 0},
        dict.fromkeys(("codes", "absmax", "decoded"), ""),
    )
    for name, weight, decoded in theirs.packed():
        layers.add(name)
        if name not in mine:
            continue
        own, own_decoded = mine[name]
        own_parts, parts = own.parts(), weight.parts()
        counts = {"codes": _differing(own_parts["codes"], parts["codes"]), "absmax": 0}
        for part in sorted((own_parts.keys() | parts.keys()) - {"codes"}):
            if part in own_parts and part in parts:
                counts["absmax"] += _differing(own_parts[part], parts[part])
            else:
                counts["absmax"] += 1
        counts["decoded"] = _differing(own_decoded, decoded)
        for stage, count in counts.items():
            differing[stage] += count
            where[stage] = where[stage] or (name if count else "")
    apart = len(layers ^ mine.keys())
    if not layers and not mine:
        return
    yield Row(
        name=f"NF4 layers ({len(layers)})",
        figure=apart,
        bound=0,
        unit="in one backend only",
        worst=", ".join(sorted(layers ^ mine.keys())[:1]),
    )
    labels = {"codes": "NF4 codes", "absmax": "NF4 scales (absmax)", "decoded": "decoded weights"}
    for stage, label in labels.items():
        yield Row(name=label, figure=differing[stage], bound=0, unit="entries that differ", worst=where[stage])


def _delta_rows(ours: Probe, theirs: Probe, adapter: Adapter) -> list[Row]:
    """‖ΔW - oracle‖ / ‖oracle‖ (Frobenius), the worst layer of each backend."""
    worst = {"JAX": (0.0, ""), "PyTorch": (0.0, "")}
    sides = {"JAX": dict(ours.deltas()), "PyTorch": dict(theirs.deltas())}
    for path, layer in adapter.layers.items():
        oracle = dense_delta(layer, adapter.layer_config(path))
        for side, deltas in sides.items():
            error = _relative(deltas[path], oracle) if path in deltas else float("inf")
            if error > worst[side][0] or not worst[side][1]:
                worst[side] = (error, path)
    return [
        Row(name=f"ΔW, {side}, against float64", figure=error, bound=DELTA_BOUND, unit="relative error", worst=path)
        for side, (error, path) in worst.items()
    ]


def _logits_rows(ours: np.ndarray, theirs: np.ndarray) -> Iterator[Row]:
    gap = np.abs(ours.astype(np.float64) - theirs)
    spread = float(theirs.max() - theirs.min())
    row, position, _ = np.unravel_index(int(np.argmax(gap)), gap.shape)
    yield Row(
        name="logits",
        figure=float(gap.max()) / spread if np.isfinite(gap).all() else float("inf"),
        bound=LOGITS_BOUND,
        unit="of their range",
        worst=f"row {row}, position {position}",
    )
    other = ours.argmax(-1) != theirs.argmax(-1)
    yield Row(
        name=f"next tokens ({other.size} positions)",
        figure=int(other.sum()),
        bound=0,
        unit="that differ",
        worst="row {}, position {}".format(*np.argwhere(other)[0]) if other.any() else "",
    )


def _gradient_rows(
    ours: tuple[float, dict[str, np.ndarray]], theirs: tuple[float, dict[str, np.ndarray]]
) -> Iterator[Row]:
    """‖g - g'‖ / ‖g'‖ of every trained array, the worst of them."""
    worst, where = 0.0, ""
    for name, reference in theirs[1].items():
        error = _relative(ours[1][name], reference) if name in ours[1] else float("inf")
        if error > worst or not where:
            worst, where = error, name
    missing = sorted(ours[1].keys() ^ theirs[1].keys())
    yield Row(
        name=f"gradients ({len(theirs[1])} arrays)",
        figure=float("inf") if missing else worst,
        bound=GRADIENT_BOUND,
        unit="relative error",
        worst=f"{missing[0]}: in one backend only" if missing else where,
    )


def _relative(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value - reference‖ / ‖reference‖, in float64; infinite if an entry is not finite or only the reference is 0."""
    reference = reference.astype(np.float64)
    gap = float(np.linalg.norm(value.astype(np.float64) - reference))
    size = float(np.linalg.norm(reference))
    if not (np.isfinite(gap) and np.isfinite(size)):
        return float("inf")
    if size == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / size


def _differing(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many entries differ in their bits; all of them if the shapes do."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return max(ours.size, theirs.size)
    bits = np.dtype(f"u{ours.dtype.itemsize}")
    return int((np.atleast_1d(ours).view(bits) != np.atleast_1d(theirs).view(bits)).sum())
