"""The optimisers by name: which options each reads, the learning rate over the steps, and the updates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import optax

from moka_core import ConfigError
from moka_jax.train.checks import Within, check_choice, check_fields, constructor_arguments

OptimiserName = Literal["adamw", "lion", "adafactor"]
Schedule = Literal["cosine", "linear", "constant"]

# The options that an optimiser reads, with the defaults of its paper. The others are refused, not ignored.
OPTIONS: dict[str, dict[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "lion": {"b1": 0.9, "b2": 0.99},
    "adafactor": {},
}
_OF_BITSANDBYTES = re.compile(r"paged|8_?bit", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """An optimiser, its learning rate over the steps, and gradient clipping.

    The learning rate of step s = 0, 1, … of S, with w warm-up steps, peak η, final fraction f and t = (s-w)/(S-w):

        η · (s+1)/w                                s < w
        η · (f + (1-f) · (1 + cos(π t)) / 2)       s ≥ w, "cosine"
        η · (f + (1-f) · (1 - t))                  s ≥ w, "linear"
        η                                          s ≥ w, "constant"

    Every optimiser ends with p ← p - rate · (update + weight_decay · p). An option that is None takes the optimiser's
    own default, if it reads it:

    | | b1 | b2 | eps |
    |---|---|---|---|
    | adamw (arXiv 1711.05101) | 0.9 | 0.999 | 1e-8 |
    | lion (arXiv 2302.06675) | 0.9 | 0.99 | – |
    | adafactor (arXiv 1804.04235) | – | – | – |

    Lion wants a learning rate 3 to 10 times smaller than AdamW's. Adafactor keeps one row and one column of second
    moments for a factor of at least 128 × 128 entries, and all of them for a smaller one; its updates are clipped to a
    root mean square of 1 and, since factors start at zero, not scaled by the size of what they change.

    Args:
        learning_rate: the peak η, above 0.
        name: "adamw", "lion" or "adafactor".
        warmup_steps: w; fewer than the steps of the run.
        schedule: "cosine", "linear" or "constant".
        final_fraction: f, 0 <= f <= 1; 0 if None. "constant" does not read it.
        weight_decay: decoupled decay of every trained entry, at least 0.
        clip_norm: longest gradient over all trained entries; None for no clipping.
        b1: decay of the first moment, 0 <= b1 < 1.
        b2: decay of the second one, 0 <= b2 < 1.
        eps: added to the root of the second moment, above 0.

    Raises:
        ConfigError: a value is out of range, or given though the optimiser or the schedule does not read it.
    """

    learning_rate: Annotated[float, Within("(0, inf)")]
    name: OptimiserName = "adamw"
    warmup_steps: Annotated[int, Within("[0, inf)")] = 0
    schedule: Schedule = "cosine"
    final_fraction: Annotated[float, Within("[0, 1]")] | None = None
    weight_decay: Annotated[float, Within("[0, inf)")] = 0.0
    clip_norm: Annotated[float, Within("(0, inf)")] | None = 1.0
    b1: Annotated[float, Within("[0, 1)")] | None = None
    b2: Annotated[float, Within("[0, 1)")] | None = None
    eps: Annotated[float, Within("(0, inf)")] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.name, str) and _OF_BITSANDBYTES.search(self.name):
            raise ConfigError(
                f"optimiser.name: {self.name!r} is one of bitsandbytes' optimisers, for PyTorch; optax has none with "
                "8-bit or paged moments, and those of an adapter are small (AdamW: 8 bytes a trained parameter); "
                f"use one of {', '.join(OPTIONS)}"
            )
        check_choice("optimiser.name", self.name, tuple(OPTIONS))
        if self.schedule == "constant" and self.final_fraction is not None:
            raise ConfigError("optimiser.final_fraction: schedule 'constant' does not read it; leave it out")
        for option in ("b1", "b2", "eps"):
            if getattr(self, option) is not None and option not in OPTIONS[self.name]:
                readers = " and ".join(name for name, options in OPTIONS.items() if option in options)
                raise ConfigError(f"optimiser.{option}: {self.name} does not read it ({readers} would); leave it out")
        defaults = OPTIONS[self.name] | ({} if self.schedule == "constant" else {"final_fraction": 0.0})
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_fields(self, "optimiser.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimiserConfig:
        """The settings from plain values; a field left out takes its default."""
        return cls(**constructor_arguments(cls, values, where="optimiser"))


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """A gradient transformation for a learning rate of 1, clipping included, and the learning rate of each step.

    The rate stands outside of the transformation, so that it is a function of the step alone: a step that is skipped
    leaves the moments as they are, but not the schedule behind.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimiser(config: OptimiserConfig, *, steps: int) -> Optimiser:
    """The optimiser of a run of `steps` steps; see `OptimiserConfig`."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    options: dict[str, Any] = {option: getattr(config, option) for option in OPTIONS[config.name]}
    if config.name == "adamw":
        rule = optax.adamw(1.0, weight_decay=config.weight_decay, **options)
    elif config.name == "lion":
        rule = optax.lion(1.0, weight_decay=config.weight_decay, **options)
    else:
        decay = config.weight_decay or None
        rule = optax.adafactor(1.0, multiply_by_parameter_scale=False, weight_decay_rate=decay, **options)
    return Optimiser(transform=optax.chain(clip, rule), schedule=_make_schedule(config, steps))


def _make_schedule(config: OptimiserConfig, steps: int) -> optax.Schedule:
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        schedule = optax.constant_schedule(peak)
    else:
        assert config.final_fraction is not None
        if config.schedule == "cosine":
            schedule = optax.cosine_decay_schedule(peak, decay_steps=steps - warmup, alpha=config.final_fraction)
        else:
            schedule = optax.linear_schedule(peak, peak * config.final_fraction, steps - warmup)
    if not warmup:
        return schedule
    # The first step already moves: a warm-up from 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rise, schedule], boundaries=[warmup])
