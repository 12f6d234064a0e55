"""The config of MoKA as a PEFT method: PEFT's fields and the mixture's, as they stand in adapter_config.json."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import LoKrConfig, LoraConfig, PeftConfig

import moka_core
from moka_core.adapter import QUANTISATIONS
from moka_core.config import PATTERN_FIELDS, RUNTIME_FIELDS, SPARSE_FIELDS, check_keys
from moka_core.errors import ConfigError
from moka_core.seal import FORMAT_VERSION, sealed_text
from moka_torch.targets import stated_dims

_FILE = "adapter_config.json"
# Fields of adapter_config.json that are there only where they say something.
OPTIONAL_FIELDS = (
    *SPARSE_FIELDS,
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "checksum",
)
# Fields that every adapter_config.json must hold; conversion/adapter_folder.py asks for the same.
REQUIRED_FIELDS = (
    "peft_type",
    "format_version",
    "layers",
    *(f.name for f in dataclasses.fields(moka_core.MokaConfig) if f.name not in (*RUNTIME_FIELDS, *SPARSE_FIELDS)),
)
# Only a file holds these: a dictionary that a user writes for `peft.get_peft_config` may leave out what it likes.
_FILE_FIELDS = ("format_version", "layers", "base_fingerprint", "base_quantisation", "checksum", "peft_version")
# How the layers were chosen; read only where `layers` does not state them.
CHOICE_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What `get_peft_model` fills in, from the model.
STATED_FIELDS = ("target_modules", "shapes", *PATTERN_FIELDS, "layers", "base_fingerprint", "base_quantisation")
BIASES = ("none", "all", "moka_only")
# Fields that say how an adapter is made or computed, not what it is.
OWN_RUNTIME_FIELDS = (*RUNTIME_FIELDS, "init_weights", "allow_other_base", "filled_in", "sealed", "taken")

# What LoRA and LoKr call it: MoKA's name, or why it has none.
_NAMES_HERE = {
    "lora_alpha": "is scale here, which multiplies ΔW as it is (LoRA's factor is lora_alpha / r)",
    "alpha": "is scale here, which multiplies ΔW as it is (LoKr's factor is alpha / r)",
    "alpha_pattern": "is scale_pattern here, of factors as they are (LoRA's are alpha / r)",
    "lora_dropout": "is dropout here",
    "rank_pattern": "is r_pattern here",
    "use_rslora": 'is scaling="stable" here',
    "init_lora_weights": "is init_weights here, True or False",
    "fan_in_fan_out": "is not needed: transformers' Conv1D is told by its type",
    "decompose_both": "has no counterpart; shapes, or num_shapes, say how a layer is split",
    "decompose_factor": "has no counterpart; shapes, or num_shapes, say how a layer is split",
    "rank_dropout": "has no counterpart; dropout acts on the input of ΔW",
    "module_dropout": "has no counterpart; dropout acts on the input of ΔW",
    "lora_bias": 'has no counterpart; bias="moka_only" trains the biases of the adapted layers',
    "trainable_token_indices": "has no counterpart; modules_to_save trains an embedding whole",
    "target_parameters": "has no counterpart; MoKA goes on linear layers, not on bare parameters",
    "layer_replication": "has no counterpart; MoKA takes the model's layers as they are",
    "use_dora": "has no counterpart; MoKA learns no magnitudes beside ΔW",
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "has no counterpart; such a start takes factors of a small rank from W, which Kronecker terms are not",
    ),
}
_Class = TypeVar("_Class", bound=type)


class UnknownFieldError(ConfigError, TypeError):
    """A keyword that `MokaConfig` has no field for; a TypeError too, as Python's own refusal is."""


class MokaPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads str(type) as "Class.NAME", which StrEnum is not
    """The method's name in PEFT's tables, and in the JSON; a `str` that equals and hashes like "MOKA"."""

    MOKA = "MOKA"


def _checks_arguments(cls: _Class) -> _Class:
    """A decorator of `MokaConfig`: its constructor first looks at which fields it was given."""
    generated = cls.__init__  # type: ignore[misc]

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_arguments(type(self), kwargs)
        generated(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_checks_arguments
@dataclass
class MokaConfig(PeftConfig):
    """PEFT's fields and those of `moka_core.MokaConfig`, as they stand in adapter_config.json.

    For a linear layer with frozen weight W (out, in) the adapter adds ΔW = scale · Σ_t α_t · c_t · (A_t ⊗ B_t), with
    ⊗ the Kronecker product, A_t (a_out, a_in), B_t (b_out, b_in), a_out·b_out = out and a_in·b_in = in.

    Args:
        r: number of terms of each layer, at least 1.
        num_shapes: how many different shapes those terms are spread over, if `shapes` does not say.
        lora_terms: how many of those terms are (1 x in) ⊗ (out x 1), together a LoRA of that rank, likewise.
        block_entries: number of entries of the stored factor that a mixture with `identity` aims at.
        shapes: explicit plans, {"OUTxIN": [[copies, a_out, a_in, b_out, b_in], ...]}; after `get_peft_model`
            this states the plan of every adapted layer, or it stands under the layer's path in
            `shapes_pattern`.
        gate: "softmax": α = softmax of one learned logit a term; "uniform": α_t = 1/r, nothing is learned.
        scaling: "none": c_t = 1; "stable": c_t = √r / √(columns of the zero factor), as rsLoRA is to LoRA.
        scale: multiplies every term; finite, not 0. LoRA's lora_alpha / r.
        identity: "a" or "b" makes that factor a fixed identity that is not stored (MoKA_s); "none".
        zero_factor: the factor that starts at zero, "a" or "b", so that ΔW = 0 at the start.
        dropout: probability that an input of ΔW is dropped in training, 0 <= dropout < 1.
        target_modules: names, or dotted ends of paths, of linear layers; or one regular expression for the whole
            path; or "all-linear", every linear layer but the output head and those that are never called (see
            `moka_torch.uncalled.uncalled_layers`). None takes what PEFT takes for LoRA on this type of model:
            q_proj and v_proj on a LLaMA-like one.
        r_pattern: other numbers of terms for some layers, {pattern: r}. A pattern is a layer's path, or a regular
            expression for its end from a dot on; of each field at most one may match a layer.
        shapes_pattern: explicit shapes for some layers, {pattern: [[copies, a_out, a_in, b_out, b_in], ...]}.
        scale_pattern: other scales for some layers, {pattern: scale}.
        exclude_modules: names or one regular expression, matched as by `target_modules`: layers that are left out.
        layers_to_transform: the number, or numbers, of the model's layers to adapt; needs `target_modules` as a list.
            Each must be there.
        layers_pattern: name, or names, of the list of layers that those numbers count; any list if None.
        modules_to_save: list of names of modules that are trained and saved whole, such as a new classification head.
        bias: "none"; "all" trains every bias of the model, "moka_only" those of the adapted layers. With either of
            them, or `modules_to_save`, the adapter is more than a mixture, and stays with PEFT: `export_adapter` and
            the JAX side refuse it.
        init_weights: False draws every factor and logit at random, so that ΔW is not 0 at the start: for tests, as
            in PEFT. adapter_config.json does not hold it.
        execution: how ΔW x is computed, not what it is: "auto", "factored" or "merged" (see `MokaLinear`).
            adapter_config.json does not hold it. It can be given when a folder is loaded:
            `PeftModel.from_pretrained(model, folder, execution=...)`. PEFT passes it on neither from
            `load_adapter` nor together with `config`: set it on that config, or `execution` on the layers.
        allow_other_base: let a saved adapter go on another base model than its own, whose fingerprint it then states;
            given and kept like `execution`.
        format_version: of the adapter folder.
        base_fingerprint: of the base model that the adapter belongs to; filled in by `get_peft_model`.
        base_quantisation: how that base's linear weights are held, "nf4-double", "nf4" or "none"; filled in likewise,
            None if in another way.
        checksum: of a saved adapter, over its settings and tensors; it is written and checked with them.
        layers: "OUTxIN" of every adapted layer by its path; filled in by `get_peft_model`. If it is there already,
            as in a saved adapter, it decides which layers are adapted, and `target_modules` is not read.

    What PEFT offers for other methods and this one does not do (rank_dropout, use_dora, target_parameters, …) is no
    field: passing it is an error, and so is an unknown key in a file.

    Raises:
        ConfigError: a field is invalid, the file is of a later format, or lacks a field.
        UnknownFieldError: there is no such field; a ConfigError, and a TypeError.

    >>> MokaConfig(r=4, num_shapes=2, target_modules=["q_proj"]).to_core().r
    4
    """

    r: int = 10
    num_shapes: int = 5
    lora_terms: int = 0
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
    allow_other_base: bool = False
    format_version: int = FORMAT_VERSION
    base_fingerprint: str | None = None
    base_quantisation: str | None = None
    checksum: str | None = None
    layers: dict[str, str] = field(default_factory=dict)
    filled_in: dict[str, Any] | None = field(default=None, repr=False, compare=False)  # see `stated`
    sealed: str | None = field(default=None, repr=False, compare=False)  # what `checksum` covers in the file, "": none
    taken: str | None = field(default=None, repr=False, compare=False)  # the checksum of what is about to be saved

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MokaPeftType.MOKA
        _check_format_version(self.format_version)
        if self.base_fingerprint is not None and not isinstance(self.base_fingerprint, str):
            raise ConfigError(f"base_fingerprint: expected text or null; got {self.base_fingerprint!r}")
        if self.base_quantisation not in (None, *QUANTISATIONS):
            raise ConfigError(
                f"base_quantisation: expected {', '.join(QUANTISATIONS)} or null; got {self.base_quantisation!r}"
            )
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
        if self.layers and self.filled_in is None:
            self.filled_in = {"choice": self._choice()}
        if self.checksum is not None and self.sealed is None:
            self.sealed = self.seal_text()

    def _check_choice(self) -> None:
        """Check the fields that are PEFT's alone: which layers, and what else is trained."""
        for name in ("exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, value := sorted(value) if isinstance(value, (set, frozenset)) else list(value))
            text = isinstance(value, str) and name != "modules_to_save"
            names = isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
            if isinstance(value, str) and not text:
                raise ConfigError(f"{name}: expected a list of names; got {value!r}. Write [{value!r}]")
            if not (value is None or text or names):
                raise ConfigError(f"{name}: expected names, none of them empty; got {value!r}")
        layers: Any = self.layers_to_transform
        if isinstance(layers, (tuple, range, set, frozenset)):
            layers = self.layers_to_transform = sorted(layers) if isinstance(layers, (set, frozenset)) else list(layers)
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
        for name in ("init_weights", "allow_other_base"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false; got {getattr(self, name)!r}")

    @property
    def beyond_mixture(self) -> list[str]:
        """The fields that make the adapter train more than mixtures, which no other backend can take over."""
        return [name for name in ("modules_to_save", "bias") if getattr(self, name) not in (None, [], "none")]

    def seal_text(self) -> str:
        """What the checksum of an adapter with this config covers, besides its tensors; see `moka_core.seal`."""
        return sealed_text(vars(self))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; the checksum is the one of the tensors that PEFT has just taken from the model."""
        pending = self.checksum
        self.checksum = self.taken
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.checksum, self.taken = pending, None  # the live adapter may change

    def stated(
        self, plans: Mapping[str, moka_core.LayerPlan], base_fingerprint: str | None, base_quantisation: str | None
    ) -> MokaConfig:
        """A copy that states which layers of a model it adapts, and the plan of each; see `STATED_FIELDS`.

        One that stated its layers before and is not trained here (`inference_mode`), as from a file, stays what it was:
        no base is made up for it if none was known.
        """
        copied, core = copy.deepcopy(self), self.to_core()
        layers = {p: (core.for_layer(p, plan.out_features, plan.in_features), plan) for p, plan in plans.items()}
        copied._take(moka_core.MokaConfig.of_layers(layers, r=self.r, scale=self.scale))
        copied.layers = {path: plan.key for path, plan in plans.items()}
        if not (self.inference_mode and self.layers):
            copied.base_fingerprint, copied.base_quantisation = base_fingerprint, base_quantisation
        elif self.base_fingerprint is not None:
            copied.base_fingerprint = base_fingerprint
        given = (self.filled_in or {}).get("given") or self._values()
        copied.filled_in = {**(self.filled_in or {}), "given": given, "stated": copied._values()}
        return copied

    def as_given(self) -> MokaConfig:
        """A copy without what `stated` filled in for a model: as its user gave it, or as a file holds it.

        What was changed since then stays as it was changed.

        Raises:
            ConfigError: a choice of layers was changed on a config whose `layers` states them already.
        """
        copied = copy.deepcopy(self)
        history, copied.filled_in = copied.filled_in, None
        for name, value in (history or {}).get("stated", {}).items():
            if history is not None and getattr(copied, name) == value:
                setattr(copied, name, history["given"][name])
        chosen = (history or {}).get("choice") or copied._choice()
        changed = [name for name, value in copied._choice().items() if value != chosen[name]]
        if copied.layers and changed:
            raise ConfigError(
                f"{', '.join(changed)}: changed on a config that states its layers, as a saved adapter's does, so that "
                "it would not be read. Take paths out of `layers` for a fresh adapter on fewer layers; a saved one is "
                "loaded whole"
            )
        copied.filled_in = {**(history or {}), "given": copied._values(), "stated": {}}
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

    def _choice(self) -> dict[str, Any]:
        return {name: copy.deepcopy(_listed(getattr(self, name))) for name in CHOICE_FIELDS}

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
            if key not in OWN_RUNTIME_FIELDS and not (key in OPTIONAL_FIELDS and _says_nothing(key, value))
        }

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MokaConfig:
        """The config in a folder or on the Hub; how it is computed is the caller's, everything else the file's.

        Args:
            kwargs: `execution`, `allow_other_base`, `init_weights`, and what `huggingface_hub.hf_hub_download` takes.
                Fields that the file holds may be given only as they stand there.

        Raises:
            ConfigError: a field is invalid, missing, or given otherwise than in the file, or a key of the file is
                unknown.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "revision"]  # a revision on the Hub
        fields = {key: kwargs.pop(key) for key in names if key in kwargs}
        given = {key: value for key, value in fields.items() if value is not None}
        runtime = {key: given.pop(key) for key in OWN_RUNTIME_FIELDS if key in given}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if config.checksum is None:
            config.sealed = ""  # it is told from a config that a caller made, if tensors come with it
        contrary = [key for key, value in given.items() if getattr(config, key) != _listed(value)]
        if contrary:
            said = [f"{key}: got {given[key]!r}, but {_FILE} has {getattr(config, key)!r}" for key in contrary]
            raise ConfigError(
                f"{'; '.join(said)}. A saved adapter is what its file says: leave that out, or change it on the config "
                "that this returns, and pass that on as config="
            )
        return dataclasses.replace(config, **runtime)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's hook on what a file holds, where PEFT would drop unknown keys and guess missing ones.

        Raises:
            ConfigError: a key is unknown or missing, the file is another method's or of a later format, or `shapes`
                lacks the plan of a layer.
        """
        if kwargs.get("peft_type", "MOKA") != "MOKA":
            raise ConfigError(f"{_FILE}: expected peft_type 'MOKA'; got {kwargs['peft_type']!r}, another method")
        _check_format_version(kwargs.get("format_version", FORMAT_VERSION))
        names = [field.name for field in dataclasses.fields(cls) if field.name not in OWN_RUNTIME_FIELDS]
        check_keys(kwargs, names, where=_FILE)
        missing = sorted(set(REQUIRED_FIELDS) - set(kwargs))
        if missing:
            raise ConfigError(
                f"{_FILE}: missing {', '.join(missing)}; a saved adapter states all of its settings, and none of them "
                "can be guessed. Take the file as it was saved"
            )
        if kwargs["layers"] and not isinstance(kwargs.get("checksum"), str):
            raise ConfigError(
                f"{_FILE}: checksum: expected 64 hexadecimal digits; got {kwargs.get('checksum')!r}. It is written "
                "with the tensors (the model's save_pretrained, or conversion.save_adapter); take the folder as it was "
                "saved"
            )
        layers, shapes, own = kwargs["layers"], kwargs["shapes"], kwargs.get("shapes_pattern")
        if all(isinstance(value, Mapping) for value in (layers, shapes, own or {})):
            unplanned = [path for path, key in layers.items() if path not in (own or {}) and str(key) not in shapes]
            if unplanned:
                keys = ", ".join(sorted({str(layers[path]) for path in unplanned}))
                more = f" and of {len(unplanned) - 1} more" if unplanned[1:] else ""
                raise ConfigError(f"{_FILE}: shapes lacks {keys}, the plan of {unplanned[0]}{more}")
        return kwargs

    def _core(self, targets: Any) -> moka_core.MokaConfig:
        names = [field.name for field in dataclasses.fields(moka_core.MokaConfig)]
        values = {name: getattr(self, name) for name in names}
        return moka_core.MokaConfig.from_dict({**values, "target_modules": targets})


def _check_arguments(cls: type[MokaConfig], given: Mapping[str, Any]) -> None:
    """Refuse unknown fields by name, and a file that lacks some; `PeftConfig.from_pretrained` asks nothing else."""
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in given if name not in names]
    if unknown:
        hints = [f"{name} {_instead(name, names)}" for name in unknown]
        raise UnknownFieldError(f"{cls.__name__} has no such field: " + "; ".join(hints))
    # a file's type is plain text, and MokaPeftType in what dataclasses.replace hands over
    if type(given.get("peft_type")) is str and any(name in given for name in _FILE_FIELDS):
        cls.check_kwargs(**given)


def _instead(name: str, names: list[str]) -> str:
    if name in _NAMES_HERE:
        return _NAMES_HERE[name]
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"(did you mean {near[0]}?)"
    for method, config in (("LoRA", LoraConfig), ("LoKr", LoKrConfig)):
        if name in {field.name for field in dataclasses.fields(config)}:
            return f"is {method}'s, and has no counterpart"
    return f"(known: {', '.join(name for name in names if name not in OWN_RUNTIME_FIELDS)})"


def _check_format_version(version: Any) -> None:
    if type(version) is not int or version != FORMAT_VERSION:
        raise ConfigError(
            f"format_version: expected {FORMAT_VERSION}; got {version!r}. A later version of moka wrote this adapter; "
            "upgrade moka to read it. (A lower number is from before its first release.)"
        )


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field of adapter_config.json may be left out at this value. A layer's number may be 0, too."""
    return value in (None, "none", [], {}) or (name == "lora_terms" and value == 0)


def _listed(value: Any) -> Any:
    """A value as it stands in JSON: any collection of names or numbers is a list."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) else value
