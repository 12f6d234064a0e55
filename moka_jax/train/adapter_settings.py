"""What a run trains: a fresh adapter of a preset, or one that there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moka_core import PRESETS, Architecture, ConfigError, MokaConfig, plan_model, preset
from moka_core.config import RUNTIME_FIELDS, check_keys, field_values
from moka_jax.train.checks import check_path, named_values

# Of an adapter that a run goes on from, what may be given otherwise: it says how one trains and computes, not what is.
STARTED_FIELDS = ("dropout", *RUNTIME_FIELDS)
# Of a preset, what may differ while its learning rate is still a first guess.
_RATE_FREE_FIELDS = ("target_modules", *STARTED_FIELDS)
# What decides the layers and their plans.
_PLANNED_FIELDS = (
    *("r", "num_shapes", "lora_terms", "block_entries", "shapes", "target_modules"),
    *("r_pattern", "shapes_pattern"),
)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What a run trains: a fresh adapter, of a preset and the fields in which it differs, or one that there is.

    Args:
        preset: name of a preset; None for "paper", or with a `start` for whatever that is.
        overrides: fields of `MokaConfig`; in YAML they stand beside `preset`.
        start: adapter folder that training goes on from. Of its settings only `STARTED_FIELDS` may be given otherwise;
            others, and a preset, may be given as they are, or as None. None for a fresh adapter, ΔW = 0.
        start_checksum: the checksum in that folder's adapter_config.json. A run notes it, and all of the
            adapter's settings in `overrides`, so that neither resuming nor exporting it needs the folder.

    Raises:
        ConfigError: the preset or a field is unknown, or a value is out of range.
    """

    preset: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    start_checksum: str | None = None

    def __post_init__(self) -> None:
        if self.start is not None:
            check_path("adapter.start", self.start)
        elif self.start_checksum is not None:
            raise ConfigError("adapter.start_checksum: expected adapter.start, the folder that it is of; got none")
        elif self.preset is None:
            object.__setattr__(self, "preset", "paper")
        if self.preset is not None and (not isinstance(self.preset, str) or self.preset not in PRESETS):
            raise ConfigError(f"adapter.preset: expected one of {', '.join(PRESETS)}; got {self.preset!r}")
        if self.start_checksum is not None and not isinstance(self.start_checksum, str):
            raise ConfigError(f"adapter.start_checksum: expected text; got {self.start_checksum!r}")
        overrides = named_values(self.overrides, where="adapter.overrides")
        check_keys(overrides, [f.name for f in dataclasses.fields(MokaConfig)], where="adapter")
        left_out = [key for key, value in overrides.items() if value is None and self.start is not None]
        object.__setattr__(self, "overrides", {key: overrides[key] for key in overrides if key not in left_out})
        try:
            if self.start_checksum is not None or (
                self.preset is not None and self.start is None and not PRESETS[self.preset].needs_model
            ):
                self.moka_config()
            else:
                MokaConfig.from_dict({key: value for key, value in self.overrides.items() if key != "shapes"})
        except ConfigError as error:
            raise ConfigError(str(error) if str(error).startswith("adapter") else f"adapter.{error}") from error

    def moka_config(self, model: Architecture | None = None) -> MokaConfig:
        """The adapter's config, fitted to a model.

        Args:
            model: the architecture; some presets need it.

        Raises:
            ConfigError: there is a `start` that was not looked at yet; or see `moka_core.preset` and `MokaConfig`.
        """
        if self.start is None:
            assert self.preset is not None
            return preset(self.preset, model, **field_values(self.overrides, where="adapter"))
        if self.start_checksum is None:
            raise ConfigError(f"adapter.start: the shapes stand in {self.start}; see AdapterSettings.started_from")
        return MokaConfig.from_dict(self.overrides)

    def started_from(self, config: MokaConfig, checksum: str, model: Architecture) -> AdapterSettings:
        """These settings, once it is known what `start` holds: the checksum, and all of the adapter's settings.

        Args:
            config: of the adapter in the folder.
            checksum: of that adapter.
            model: the architecture of the base.

        Raises:
            ConfigError: the preset or a field contradicts the adapter (all that do are named), or `start_checksum` is
                that of another one.
        """
        if self.start_checksum not in (None, checksum):
            raise ConfigError(
                f"adapter.start: expected the adapter that the run started from, checksum {self.start_checksum}; "
                f"{self.start} holds another one, {checksum}"
            )
        given = field_values(self.overrides, where="adapter")
        others = [
            name
            for name, value in given.items()
            if name not in STARTED_FIELDS and _comparable(value) != _comparable(getattr(config, name))
        ]
        if self.preset is not None:
            fresh = preset(self.preset, model, **{name: given[name] for name in given if name not in others})
            others = ["preset"] * (not _makes_the_same(fresh, config, model)) + others
        if others:
            names = [f"adapter.{name}" for name in others]
            raise ConfigError(
                f"{' and '.join(names)}: the adapter in adapter.start, {self.start}, has "
                f"{'others' if others[1:] else 'another'}; of its settings only {' and '.join(STARTED_FIELDS)} can be "
                f"changed, so leave {' and '.join(names)} out (on the command line: "
                f"{' '.join(f'{name}=null' for name in names)})"
            )
        own = {name: given[name] for name in STARTED_FIELDS if name in given}
        values = dataclasses.replace(config, **own).to_dict()
        return AdapterSettings(overrides=values, start=self.start, start_checksum=checksum)

    def resolved(self, model: Architecture | None) -> AdapterSettings:
        """These settings with every value of the preset, which a later version may define otherwise: what a run notes.

        Args:
            model: the architecture; without one a preset that needs it stays a name.
        """
        if self.start is not None or (model is None and PRESETS[self.preset or ""].needs_model):
            return self
        return dataclasses.replace(self, overrides=self.moka_config(model).to_dict())

    def learning_rate(self) -> float | None:
        """That of AdamW with which the preset did best; None if it was not tuned, or the adapter is none of a preset.

        Raises:
            ConfigError: a fresh adapter differs from its preset in more than targets, dropout and how it is computed.
        """
        if self.preset is None or self.start is not None:
            return None
        rate = PRESETS[self.preset].learning_rate
        if rate is None:
            return None
        own, others = self.moka_config(), preset(self.preset)
        differing = [
            f"adapter.{name}"
            for name in self.overrides
            if name not in _RATE_FREE_FIELDS and getattr(own, name) != getattr(others, name)
        ]
        if differing:
            raise ConfigError(
                f"optimiser.learning_rate: expected a number; got none, and that of the preset {self.preset}, "
                f"{rate:g}, is not taken with another {' and '.join(differing)} (docs/choosing.md)"
            )
        return rate

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        own = {name: getattr(self, name) for name in ("preset", "start", "start_checksum")}
        return {name: value for name, value in own.items() if value is not None} | dict(self.overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterSettings:
        """The settings that `to_dict` wrote, or that a user typed: `preset` or `start`, and fields of `MokaConfig`."""
        values = named_values(values, where="adapter")
        own = ("preset", "start", "start_checksum")
        check_keys(values, [*own, *(f.name for f in dataclasses.fields(MokaConfig))], where="adapter")
        overrides = {key: value for key, value in values.items() if key not in own}
        return cls(overrides=overrides, **{key: values[key] for key in own if key in values})


def _makes_the_same(one: MokaConfig, other: MokaConfig, model: Architecture) -> bool:
    """Whether two configs adapt the same layers of a model with the same mixtures, however they say it."""
    linear = model.linear_layers()
    if plan_model(one, linear) != plan_model(other, linear):
        return False
    planned = {name: getattr(other, name) for name in (*_PLANNED_FIELDS, *STARTED_FIELDS)}
    return dataclasses.replace(one, **planned) == other


def _comparable(value: Any) -> Any:
    """A field of `MokaConfig`, in whatever form and order it was given."""
    if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
        return value
    return set(value.items() if isinstance(value, Mapping) else value)
