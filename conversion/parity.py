"""The proof that both backends compute the same: each stage compared, with its figure and its bound.

JAX and PyTorch are imported inside the functions that need them; the comparisons handle NumPy arrays alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from conversion.adapter_folder import load_adapter
from conversion.base_weights import BaseFolder, Quantise, open_base
from conversion.causes import relative
from conversion.comparisons import (
    Row,
    delta_rows,
    frozen_rows,
    gradient_rows,
    logits_rows,
    modules_row,
    training_row,
)
from conversion.diagnosis import MODULE_BOUND, Diagnosis, Found, Traces, compare_traces, diagnose
from conversion.oracle_probe import OracleProbe
from moka_core import Adapter, ConfigError, DataError, ModelError, check_base
from moka_core.probe import AdamW, Batch, ForwardProbe, Probe

Backend = Literal["both", "jax", "torch"]

STEPS = 50
SHAPE = (2, 64)  # batch, length
QUICK_SHAPE = (1, 16)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All comparisons of one adapter on one base.

    Args:
        sides: the labels of what was compared, the reference last: "JAX", "PyTorch" or "float64".
        rows: the comparisons.
        losses: the loss curves, by backend.
        diagnosis: the first difference, if a row failed.
        modules: every module's relative difference in order of computation, where the outputs were traced.
        notes: what was not compared, or compared in an unusual way.
    """

    sides: tuple[str, str]
    rows: tuple[Row, ...]
    losses: dict[str, list[float]]
    diagnosis: Diagnosis | None = None
    modules: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every figure is within its bound."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; a figure that is no finite number is null."""
        rows = [{**asdict(row), "figure": _number(row.figure), "passed": row.passed} for row in self.rows]
        first = self.diagnosis
        return {
            "passed": self.passed,
            "sides": list(self.sides),
            "rows": rows,
            "losses": {side: [_number(loss) for loss in losses] for side, losses in self.losses.items()},
            "diagnosis": None if first is None else {**asdict(first), "figure": _number(first.figure)},
            "modules": {name: _number(figure) for name, figure in self.modules},
            "notes": list(self.notes),
        }


def check_parity(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    backend: Backend = "both",
    quantise: Quantise | None = None,
    train: int | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    quick: bool = False,
    trace: bool = False,
    allow_other_base: bool = False,
    optimiser: AdamW | None = None,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """What an adapter computes on a base, stage by stage, in JAX and in PyTorch, or in one of them and by definition.

    Everything is float32 here. Each backend quantises the base for itself and loads the same adapter folder, PyTorch
    through plain `PeftModel.from_pretrained`. Compared are the frozen tensors, packed and decoded, ΔW (each side with
    the float64 oracle), logits, next tokens, gradients, and the losses of optimiser steps. One backend is compared with
    a LLaMA in float64 in NumPy, module by module; there are no gradients then, and the other backend need not be there.
    Where a figure exceeds its bound, `ParityReport.diagnosis` names the first module that differs, and why.

    Args:
        adapter: an adapter folder.
        base: a Hugging Face model folder, dense or packed.
        backend: "both", or the one to hold to the float64 definition.
        quantise: see `open_base`; None takes what the adapter was trained on, "nf4-double" if it does not say.
        train: optimiser steps of the training comparison; 0 leaves it out. None: 50, or 0 with `quick` or one backend.
        batch_size, length: of the token batches; None: 2 and 64.
        quick: by default 1 x 16 tokens and no training.
        trace: compare the outputs of all modules even if everything agrees.
        allow_other_base: take an adapter that was trained on another base.
        optimiser: by default AdamW with a constant rate of 1e-3.
        seed: of the tokens, where the base has no tokenizer.
        on_stage: called with the name of each stage as it begins.

    Raises:
        AdapterError, ModelError: the folders cannot be used.
        ConfigError: a setting is unknown or out of range, or a backend's packages are missing.
    """
    if backend not in ("both", "jax", "torch"):
        raise ConfigError(f"backend: expected both, jax or torch; got {backend!r}")
    if backend != "both" and train:
        raise ConfigError(
            f"train: expected 0 with one backend, as optimiser steps are compared between both; got {train}"
        )
    shape = QUICK_SHAPE if quick else SHAPE
    steps = (0 if quick or backend != "both" else STEPS) if train is None else train
    rows, columns = (
        given if given is not None else usual for given, usual in zip((batch_size, length), shape, strict=True)
    )
    for name, value, least in (("train", steps, 0), ("batch_size", rows, 1), ("length", columns, 2), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}; got {value}")

    notes = []
    opened = open_base(base, quantise=quantise or "nf4-double")
    trained = load_adapter(adapter)
    held = trained.base_quantisation
    if quantise is None and held is not None:
        opened = open_base(base, quantise=held)  # type: ignore[arg-type]
    if held not in (None, opened.quantisation):
        notes.append(f"the adapter was trained on a base held as {held}; here it is {opened.quantisation}")
    on_stage("telling the base")
    check_base(trained.base_fingerprint, opened.fingerprint, allow_other_base=allow_other_base)
    truth = OracleProbe(opened, trained)
    if backend != "both" and truth.config.rope is None:
        raise ModelError(
            f"{base}: the float64 LLaMA that one backend is compared with does not know this model's rope type; "
            "compare both backends with each other instead (--backend both)"
        )
    probes: list[Any] = []
    if backend != "torch":
        on_stage("loading the base and the adapter in JAX")
        probes.append(_jax_probe(opened, trained, allow_other_base))
    if backend != "jax":
        on_stage("loading the base and the adapter in PyTorch")
        probes.append(_torch_probe(opened, adapter, allow_other_base))
    batches = token_batches(
        base, opened.config["vocab_size"], count=max(steps, 1), batch_size=rows, length=columns, seed=seed
    )
    if backend != "both":
        return compare_with_oracle(probes[0], truth, batches[0].tokens, notes=notes, on_stage=on_stage)
    ours, theirs = probes
    return compare(
        ours,
        theirs,
        truth,
        batches,
        optimiser=optimiser or AdamW(),
        train=steps,
        trace=trace,
        notes=notes,
        on_stage=on_stage,
    )


def _jax_probe(base: BaseFolder, adapter: Adapter, allow_other_base: bool) -> Probe:
    try:
        from moka_jax.probe import JaxProbe
    except ModuleNotFoundError as error:
        raise ConfigError(_missing("JAX", "jax", "torch", error)) from error
    return JaxProbe(base, adapter, allow_other_base=allow_other_base)


def _torch_probe(base: BaseFolder, adapter: str | os.PathLike[str], allow_other_base: bool) -> Probe:
    try:
        from moka_torch.probe import TorchProbe
    except ModuleNotFoundError as error:
        raise ConfigError(_missing("PyTorch", "torch", "jax", error)) from error
    return TorchProbe(base.folder, adapter, quantise=base.quantise, allow_other_base=allow_other_base)


def _missing(side: str, extra: str, other: str, error: ModuleNotFoundError) -> str:
    return (
        f"backend: {side}'s side needs the package {error.name!r}; install moka[{extra}], or compare the other backend "
        f"alone with --backend {other}"
    )


def compare(
    ours: Probe,
    theirs: Probe,
    truth: OracleProbe,
    batches: Sequence[Batch],
    *,
    optimiser: AdamW,
    train: int,
    trace: bool = False,
    notes: Sequence[str] = (),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """Every comparison between two probes of one adapter; `theirs` is the reference, `truth` says which one is wrong.

    Optimiser steps are left out where something disagrees before them.
    """
    tokens = batches[0].tokens
    rows, found = _stored(ours, theirs, truth, on_stage)
    on_stage("comparing logits")
    logits = ours.logits(tokens), theirs.logits(tokens)
    rows += logits_rows(*logits)
    on_stage("comparing gradients")
    rows += gradient_rows(ours.gradients(batches[0]), theirs.gradients(batches[0]), truth.adapter.layers)
    traces, diagnosis = None, None
    agrees = all(row.passed for row in rows)
    if trace or not agrees:
        on_stage("comparing the outputs of every module")
        traces = compare_traces(ours, theirs, tokens)
    if traces is not None and trace:
        rows.append(modules_row(traces))
        agrees = agrees and rows[-1].passed
    if traces is not None and not agrees:
        on_stage("looking for the cause")
        diagnosis = (
            _random((ours, theirs), logits, tokens, traces)
            or _own_logits((ours, theirs), logits, traces)
            or diagnose(ours, theirs, truth, found, traces)
        )
        if diagnosis.module == "none":
            diagnosis = _backward(rows) or diagnosis
    losses: dict[str, list[float]] = {}
    if train and not agrees:
        notes = [*notes, f"{train} optimiser steps: not compared, as what comes before them differs"]
    elif train:
        on_stage(f"training {train} steps in JAX")
        losses["jax"] = ours.train(batches[:train], optimiser)
        on_stage(f"training {train} steps in PyTorch")
        losses["torch"] = theirs.train(batches[:train], optimiser)
        row, diagnosis = training_row(losses)
        rows.append(row)
    return ParityReport(
        sides=(ours.label, theirs.label),
        rows=tuple(rows),
        losses=losses,
        diagnosis=diagnosis,
        modules=() if traces is None else traces.figures,
        notes=tuple(notes),
    )


def compare_with_oracle(
    probe: ForwardProbe,
    truth: OracleProbe,
    tokens: np.ndarray,
    *,
    notes: Sequence[str] = (),
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ParityReport:
    """Every comparison of one backend with what the folders stand for, in float64, which has no gradients."""
    rows, found = _stored(probe, truth, truth, on_stage)
    on_stage("comparing the outputs of every module with float64")
    traces = compare_traces(probe, truth, tokens)
    rows.append(modules_row(traces))
    logits = probe.logits(tokens)
    rows += logits_rows(logits, traces.logits[1])
    diagnosis = None
    if not all(row.passed for row in rows):
        on_stage("looking for the cause")
        diagnosis = (
            _random((probe,), (logits,), tokens, traces)
            or _own_logits((probe,), (logits,), traces)
            or diagnose(probe, truth, truth, found, traces)
        )
    return ParityReport(
        sides=(probe.label, truth.label),
        rows=tuple(rows),
        losses={},
        diagnosis=diagnosis,
        modules=traces.figures,
        notes=(*notes, "gradients and optimiser steps: not compared with one backend, as the float64 side has none"),
    )


def _stored(
    ours: ForwardProbe, theirs: ForwardProbe, truth: OracleProbe, on_stage: Callable[[str], None]
) -> tuple[list[Row], Found]:
    """The rows of the stored numbers, and what they found."""
    on_stage("comparing the frozen weights")
    rows, found = frozen_rows(ours, theirs)
    on_stage("comparing ΔW with the float64 oracle")
    rows += delta_rows([side for side in (ours, theirs) if side is not truth], truth, found)
    return rows, found


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
        if max(stream) >= vocab_size:
            raise DataError(
                f"{base}: its tokenizer makes the token {max(stream)}, but config.json has vocab_size {vocab_size}; "
                "expected the tokenizer of this model"
            )
        tokens = np.resize(np.array(stream, np.int32), need)
    else:
        tokens = np.random.default_rng(seed).integers(0, vocab_size, need, dtype=np.int32)
    grid = tokens.reshape(count, batch_size, length)
    return [Batch(tokens=rows, learned=np.ones(rows.shape, bool)) for rows in grid]


def _random(
    sides: Sequence[ForwardProbe], logits: Sequence[np.ndarray], tokens: np.ndarray, traces: Traces
) -> Diagnosis | None:
    """A model that does not agree with itself: the batch run again, and one of its rows twice over in one batch.

    Two equal rows show masks that differ by row alone, as those of a fixed key do.
    """
    for side, before in zip(sides, logits, strict=True):
        again, twice = side.logits(tokens), side.logits(np.repeat(tokens[:1], 2, axis=0))
        if not (np.isfinite(again).all() and np.isfinite(twice).all() and np.isfinite(before).all()):
            continue
        if (error := relative(again, before)) > MODULE_BOUND:
            cause = (
                f"randomness, in {side.label}: the same tokens give other logits when they run again ({error:.1e}); "
                "dropout is left on, in the adapter or in the model"
            )
        elif (error := relative(twice[0], twice[1])) > MODULE_BOUND:
            cause = (
                f"rows, in {side.label}: the same tokens give other logits in another row of a batch ({error:.1e}), "
                "each time the same; dropout is left on with a fixed key, or rows are not computed alike"
            )
        else:
            continue
        first = traces.first
        where, figure = ("logits", error) if first is None else (first.module, first.figure)
        return Diagnosis(module=where, figure=figure, bound=MODULE_BOUND, cause=cause)
    return None


def _own_logits(sides: Sequence[ForwardProbe], logits: Sequence[np.ndarray], traces: Traces) -> Diagnosis | None:
    """A model whose logits are not those of its modules run one at a time: then no module is to blame."""
    for side, own, traced in zip(sides, logits, traces.logits, strict=False):
        error = relative(own, traced)
        if not error <= MODULE_BOUND and np.isfinite(traced).all():
            cause = f"{side.label}'s logits are not what its modules give one by one: how the layers are run as a whole"
            return Diagnosis(module="logits", figure=error, bound=MODULE_BOUND, cause=cause)
    return None


def _backward(rows: Sequence[Row]) -> Diagnosis | None:
    """The gradients, where they alone differ."""
    failed = [row for row in rows if row.name.startswith("gradient") and not row.passed]
    if not failed:
        return None
    row = max(failed, key=lambda row: (bool(row.worst), row.figure))  # that of all arrays as one names none
    cause = "the backward pass: every module's output agrees"
    return Diagnosis(module=row.worst or "no layer alone", figure=row.figure, bound=row.bound, cause=cause)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
