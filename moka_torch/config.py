"""The config of MoKA as a PEFT method: PEFT's fields and the mixture's, as they stand in adapter_config.json."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

import moka_core
from moka_core.config import PATTERN_FIELDS, RUNTIME_FIELDS, check_keys
from moka_core.errors import ConfigError
from moka_torch.targets import stated_dims

FORMAT_VERSION = 1
# Fields of adapter_config.json that are there only where they say something.
OPTIONAL_FIELDS = (
    *PATTERN_FIELDS,
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
)
# What `get_peft_model` fills in, from the model.
STATED_FIELDS = ("target_modules", "shapes", *PATTERN_FIELDS, "layers", "base_fingerprint")
BIASES = ("none", "all", "moka_only")
# Fields that say how an adapter is made or computed, not what it is.
OWN_RUNTIME_FIELDS = (*RUNTIME_FIELDS, "init_weights", "filled_in")


class MokaPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads str(type) as "Class.NAME", which StrEnum is not
    """The method's name in PEFT's tables, and in the JSON; a `str` that equals and hashes like "MOKA"."""

    MOKA = "MOKA"


@dataclass
class MokaConfig(PeftConfig):
    """PEFT's fields and those of `moka_core.MokaConfig`, as they stand in adapter_config.json.

    Args:
        shapes: explicit plans, {"OUTxIN": [[copies, a_out, a_in, b_out, b_in], ...]}; after `get_peft_model`
            this states the plan of every adapted layer, or it stands under the layer's path in
            `shapes_pattern`.
        target_modules: as in `moka_core.MokaConfig`; None takes what PEFT takes for LoRA on this
            type of model: q_proj and v_proj on a LLaMA-like one.
        exclude_modules: names or one regular expression, matched as by `target_modules`: layers that are left out.
        layers_to_transform: the number, or numbers, of the model's layers to adapt; needs `target_modules` as a list.
        layers_pattern: name, or names, of the list of layers that those numbers count; any list if None.
        modules_to_save: names of modules that are trained and saved whole, such as a new classification head.
        bias: "none"; "all" trains every bias of the model, "moka_only" those of the adapted layers. With either of
            them, or `modules_to_save`, the adapter is more than a mixture, and stays with PEFT: `export_adapter` and
            the JAX side refuse it.
        init_weights: False draws every factor and logit at random, so that ΔW is not 0 at the start: for tests, as
            in PEFT. adapter_config.json does not hold it.
        execution: as in `moka_core.MokaConfig`; adapter_config.json does not hold it. It can be given when a folder is
            loaded: `PeftModel.from_pretrained(model, folder, execution=...)`. PEFT passes it on neither from
            `load_adapter` nor together with `config`: set it on that config, or `execution` on the layers.
        format_version: of the adapter folder.
        base_fingerprint: of the base model that the adapter belongs to; filled in by `get_peft_model`.
        layers: "OUTxIN" of every adapted layer by its path; filled in by `get_peft_model`. If it is there already,
            as in a saved adapter, it decides which layers are adapted, and `target_modules` is not read.

    The other fields are described in `moka_core.MokaConfig`. What PEFT offers for other methods and this
    one does not do (rank_dropout, use_dora, target_parameters, …) is no field: passing it is an error, and so is an
    unknown key in a file.

    Raises:
        ConfigError: a field is invalid, or the file is of a later format.

    >>> MokaConfig(r=4, num_shapes=2, target_modules=["q_proj"]).to_core().r
    4
    """

    r: int = 10
    num_shapes: int = 5
    block_entries: int = 4096
    shapes: dict[str, Any] = field(default_factory=dict)
    gate: str = "softmax"
    scaling: str = "none"
    scale: float = 1.0
    identity: str = "none"
    zero_factor: str = "b"
    dropout: float = 0.1
    target_modules: list[str] | str | None = None
    r_pattern: dict[str, int] = field(default_factory=dict)
    shapes_pattern: dict[str, Any] = field(default_factory=dict)
    scale_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    execution: str = "auto"
    format_version: int = FORMAT_VERSION
    base_fingerprint: str | None = None
    layers: dict[str, str] = field(default_factory=dict)
    filled_in: dict[str, Any] | None = field(default=None, repr=False, compare=False)  # see `stated`

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MokaPeftType.MOKA
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version: expected {FORMAT_VERSION}; got {self.format_version!r}. A later version of moka "
                "wrote this adapter; upgrade moka to read it."
            )
        if self.base_fingerprint is not None and not isinstance(self.base_fingerprint, str):
            raise ConfigError(f"base_fingerprint: expected a hexadecimal digest or null; got {self.base_fingerprint!r}")
        named = isinstance(self.layers, dict) and all(isinstance(key, str) for key in self.layers.values())
        if not named:
            raise ConfigError(f'layers: expected {{"path": "OUTxIN", ...}}; got {self.layers!r}')
        if isinstance(self.target_modules, (set, frozenset)):
            self.target_modules = sorted(self.target_modules)
        self._check_choice()
        core = self._core("all-linear" if self.target_modules is None else self.target_modules)
        written = core.to_dict()
        for name in ("shapes", *PATTERN_FIELDS):
            setattr(self, name, written[name])
        if self.target_modules is not None:
            self.target_modules = written["target_modules"]

    def _check_choice(self) -> None:
        """Check the fields that are PEFT's alone: which layers, and what else is trained."""
        for name in ("exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, value := sorted(value) if isinstance(value, (set, frozenset)) else list(value))
            text = isinstance(value, str) and name != "modules_to_save"
            names = isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
            if not (value is None or text or names):
                raise ConfigError(f"{name}: expected names, none of them empty; got {value!r}")
        layers = self.layers_to_transform
        if isinstance(layers, tuple):
            self.layers_to_transform = layers = list(layers)
        for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ConfigError(f"layers_to_transform: expected whole numbers >= 0; got {layers!r}")
        if layers is not None and (isinstance(self.target_modules, str) or self.target_modules == ["all-linear"]):
            raise ConfigError(
                "layers_to_transform: with target_modules as one string it would not be read; name the modules in a "
                "list, or put the layers into the regular expression"
            )
        if self.layers_pattern and layers is None:
            raise ConfigError("layers_pattern: says which layers layers_to_transform counts, and that is not given")
        if self.bias not in BIASES:
            raise ConfigError(f"bias: expected one of {', '.join(BIASES)}; got {self.bias!r}")
        if not isinstance(self.init_weights, bool):
            raise ConfigError(f"init_weights: expected true or false; got {self.init_weights!r}")

    @property
    def beyond_mixture(self) -> list[str]:
        """The fields that make the adapter train more than mixtures, which no other backend can take over."""
        return [name for name in ("modules_to_save", "bias") if getattr(self, name) not in (None, [], "none")]

    def stated(self, plans: Mapping[str, moka_core.LayerPlan], base_fingerprint: str | None) -> MokaConfig:
        """A copy that states which layers of a model it adapts, and the plan of each; see `STATED_FIELDS`."""
        copied, core = copy.deepcopy(self), self.to_core()
        layers = {p: (core.for_layer(p, plan.out_features, plan.in_features), plan) for p, plan in plans.items()}
        copied._take(moka_core.MokaConfig.of_layers(layers, r=self.r, scale=self.scale))
        copied.layers = {path: plan.key for path, plan in plans.items()}
        copied.base_fingerprint = base_fingerprint
        given = (self.filled_in or {}).get("given") or self._values()
        copied.filled_in = {"given": given, "stated": copied._values()}
        return copied

    def as_given(self) -> MokaConfig:
        """A copy without what `stated` filled in for a model: as its user gave it, or as a file holds it.

        What was changed since then stays as it was changed.
        """
        copied = copy.deepcopy(self)
        history, copied.filled_in = copied.filled_in, None
        for name, value in (history or {}).get("stated", {}).items():
            if history is not None and getattr(copied, name) == value:
                setattr(copied, name, history["given"][name])
        copied.filled_in = {"given": copied._values(), "stated": {}}
        return copied

    def take_over(self, stated: MokaConfig) -> MokaConfig:
        """The config to keep for a model: this very object, brought to `stated`, as PEFT's users expect; or `stated`
        itself, if this object says something else for another model already."""
        if (self.filled_in or {}).get("stated") and self._values() != stated._values():
            return stated
        vars(self).update(vars(stated))
        return self

    def spell_out(self) -> None:
        """Read the patterns of a saved adapter as the whole paths that they are there; see `MokaConfig.exact`."""
        self._take(self.to_core().exact(stated_dims(self.layers)))

    def _take(self, core: moka_core.MokaConfig) -> None:
        written = core.to_dict()
        for name in ("shapes", *PATTERN_FIELDS):
            setattr(self, name, written[name])

    def _values(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in STATED_FIELDS}

    def to_core(self) -> moka_core.MokaConfig:
        """The same settings as the value that both backends share.

        Raises:
            ConfigError: a field is invalid, or `target_modules` was left to the model and no model is known yet.
        """
        if self.target_modules is None:
            raise ConfigError("target_modules: expected names of layers; got None, which only a model can resolve")
        return self._core(self.target_modules)

    @classmethod
    def from_core(cls, config: moka_core.MokaConfig, **peft_fields: Any) -> MokaConfig:
        """The PEFT config with these settings; `peft_fields` are PEFT's own, such as task_type."""
        return cls(**config.to_dict(), **peft_fields)

    def to_dict(self) -> dict[str, Any]:
        """What stands in adapter_config.json: every field that says what the adapter is, not how it is computed."""
        return {
            key: value
            for key, value in super().to_dict().items()
            if key not in OWN_RUNTIME_FIELDS and not (key in OPTIONAL_FIELDS and value in (None, "none", [], {}))
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MokaConfig:
        """The config in a folder or on the Hub; `execution` is the caller's, everything else the file's.

        Raises:
            ConfigError: a field is invalid, or a key of the file is unknown.
        """
        runtime = {key: kwargs.pop(key) for key in OWN_RUNTIME_FIELDS if key in kwargs}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        return dataclasses.replace(config, **{key: value for key, value in runtime.items() if value is not None})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's hook on what a file holds: an unknown key is an error here, where PEFT would drop it.

        Raises:
            ConfigError: a key is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name not in OWN_RUNTIME_FIELDS]
        check_keys(kwargs, names, where="adapter_config.json")
        return kwargs

    def _core(self, targets: Any) -> moka_core.MokaConfig:
        names = [field.name for field in dataclasses.fields(moka_core.MokaConfig)]
        values = {name: getattr(self, name) for name in names}
        return moka_core.MokaConfig.from_dict({**values, "target_modules": targets})
