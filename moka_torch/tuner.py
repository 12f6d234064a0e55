"""MoKA as a PEFT method: the config that stands in adapter_config.json, and the tuner that PEFT drives."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import nn

import moka_core
from moka_core.config import RUNTIME_FIELDS, check_keys
from moka_core.errors import ConfigError
from moka_torch.base_weight import refuse_special
from moka_torch.fingerprint import check_fingerprint
from moka_torch.linear import MokaLinear, refuse_adapter_names
from moka_torch.loading import check_state_dict
from moka_torch.targets import check_adapter_name, plan_stated, plan_targets, refuse_module

FORMAT_VERSION = 1
PREFIX = "moka_"
DEFAULT_TARGETS = {
    model_type: ["q_proj", "v_proj"]
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
}


class MokaPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads str(type) as "Class.NAME", which StrEnum is not
    """The method's name in PEFT's tables, and in the JSON; a `str` that equals and hashes like "MOKA"."""

    MOKA = "MOKA"


@dataclass
class MokaConfig(PeftConfig):
    """PEFT's fields and those of `moka_core.MokaConfig`, as they stand in adapter_config.json.

    Args:
        shapes: explicit plans, {"OUTxIN": [[copies, a_out, a_in, b_out, b_in], ...]}; after `get_peft_model`
            the model's own copy of the config states the plan of every adapted layer here.
        target_modules: as in `moka_core.MokaConfig`; None takes q_proj and v_proj on a LLaMA-like model.
        execution: as in `moka_core.MokaConfig`; adapter_config.json does not hold it. It can be given when a folder is
            loaded: `PeftModel.from_pretrained(model, folder, execution=...)`. PEFT passes it on neither from
            `load_adapter` nor together with `config`: set it on that config, or `execution` on the layers.
        format_version: of the adapter folder.
        base_fingerprint: of the base model that the adapter belongs to; filled in by `get_peft_model`.
        layers: "OUTxIN" of every adapted layer by its path; filled in by `get_peft_model`. If it is there already,
            as in a saved adapter, it decides which layers are adapted, and `target_modules` is not read.

    The other fields are described in `moka_core.MokaConfig`. What PEFT offers for other methods and this
    one does not do (modules_to_save, exclude_modules, layers_to_transform, bias, …) is no field: passing it
    is an error, and so is an unknown key in a file.

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
    execution: str = "auto"
    format_version: int = FORMAT_VERSION
    base_fingerprint: str | None = None
    layers: dict[str, str] = field(default_factory=dict)

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
        core = self._core("all-linear" if self.target_modules is None else self.target_modules)
        self.shapes = core.to_dict()["shapes"]
        if self.target_modules is not None:
            self.target_modules = core.to_dict()["target_modules"]

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
        return {key: value for key, value in super().to_dict().items() if key not in RUNTIME_FIELDS}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MokaConfig:
        """The config in a folder or on the Hub; `execution` is the caller's, everything else the file's.

        Raises:
            ConfigError: a field is invalid, or a key of the file is unknown.
        """
        runtime = {key: kwargs.pop(key) for key in RUNTIME_FIELDS if key in kwargs}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        return dataclasses.replace(config, **{key: value for key, value in runtime.items() if value is not None})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT's hook on what a file holds: an unknown key is an error here, where PEFT would drop it.

        Raises:
            ConfigError: a key is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name not in RUNTIME_FIELDS]
        check_keys(kwargs, names, where="adapter_config.json")
        return kwargs

    def _core(self, targets: Any) -> moka_core.MokaConfig:
        names = [field.name for field in dataclasses.fields(moka_core.MokaConfig)]
        values = {name: getattr(self, name) for name in names}
        return moka_core.MokaConfig.from_dict({**values, "target_modules": targets})


class MokaModel(BaseTuner):
    """The tuner: puts a `MokaLinear` around every targeted linear layer, after everything has been checked.

    Holds for every adapter: `peft_config[name]` is this model's own copy of the config it was given, with
    `target_modules`, `shapes`, `layers` and `base_fingerprint` filled in, so that a saved folder states all of them.
    """

    prefix = PREFIX
    tuner_layer_cls = MokaLinear
    target_module_mapping = DEFAULT_TARGETS

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wrap the targeted layers of `model`; on an error the model is as it was.

        Raises:
            ConfigError: the config or the adapter's name is unusable, `state_dict` was given, or the execution is
                "merged" and a targeted layer cannot take W + ΔW.
            TargetError: a target matches no linear layer, or matches something that is none.
            AdapterError: the config belongs to an adapter of another base model.
        """
        if state_dict is not None:
            raise ConfigError(
                "state_dict: MoKA takes the layers to adapt from the config, not from a state dict; inject without "
                "state_dict, then load it with peft.set_peft_model_state_dict"
            )
        given = self.peft_config[adapter_name]
        if not isinstance(given, MokaConfig):
            raise ConfigError(f"adapter {adapter_name!r}: expected a moka_torch.MokaConfig; got {type(given).__name__}")
        config = copy.deepcopy(given)
        check_adapter_name(adapter_name, model)
        self._prepare_adapter_config(config, self.get_model_config(model))
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        core = config.to_core()
        plans = plan_stated(core, config.layers, model) if config.layers else plan_targets(core, model)
        refuse_special(core.execution, {path: _base_layer(model.get_submodule(path)) for path in plans})
        config.base_fingerprint = check_fingerprint(config.base_fingerprint, model)
        config.layers = {path: plan.key for path, plan in plans.items()}
        config.shapes = {plan.key: [group.to_list() for group in plan.groups] for _, plan in sorted(plans.items())}
        self.peft_config[adapter_name] = config
        # PEFT matches names by rules of its own (it would take every module that a regular expression matches, and
        # writes "all-linear" out); it is handed exactly the planned paths, and the config keeps what the user wrote.
        targets, config.target_modules = config.target_modules, "|".join(map(re.escape, plans))
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
        finally:
            config.target_modules = targets

    def _create_and_replace(  # type: ignore[override]  # PEFT hands over the config that it was given
        self,
        peft_config: MokaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        core = dataclasses.replace(peft_config.to_core(), target_modules=("unused",))
        kwargs = get_quantization_kwargs(self.model)
        out_features, in_features = refuse_module(current_key, target, **kwargs)
        plan = moka_core.plan_layer(core, out_features, in_features)
        if isinstance(target, MokaLinear):
            target.update_layer(adapter_name, plan=plan, config=core, inference_mode=peft_config.inference_mode)
            return
        layer = MokaLinear(target, adapter_name, plan=plan, config=core, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around every forward: without it PEFT drops `adapter_names` and computes something else."""
        refuse_adapter_names(kwargs)
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's hook on loading: strict here, where PEFT takes extra keys, NaNs and missing keys."""
        check_state_dict(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, MokaLinear) else module


def register() -> None:
    """Put MoKA into PEFT's tables, from outside; a second call changes nothing.

    (`peft.utils.register_peft_method` takes only names of PEFT's own enum.)
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[MokaPeftType.MOKA] = MokaConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[MokaPeftType.MOKA] = MokaModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[MokaPeftType.MOKA] = PREFIX  # type: ignore[index]
