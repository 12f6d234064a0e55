"""MoKA as a PEFT method: the tuner that PEFT drives, and its place in PEFT's tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import nn

import moka_core
from moka_core.config import Identity
from moka_core.errors import AdapterError, ConfigError
from moka_torch.base_weight import refuse_special
from moka_torch.choice import plan_choice
from moka_torch.combine import check_weights, combine_layers
from moka_torch.config import MokaConfig, MokaPeftType
from moka_torch.fingerprint import check_fingerprint, quantisation
from moka_torch.linear import BASE, MokaLinear
from moka_torch.loading import adapted_layers, check_file, check_state_dict
from moka_torch.merge import untie
from moka_torch.saving import mark_merged, merge_marks, own_tensors
from moka_torch.targets import check_adapter_name, refuse_module

PREFIX = "moka_"
_LOADERS = ("from_pretrained", "load_adapter")
_CHOICE_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")
# PEFT's choice for LoRA by type of model, and q_proj and v_proj for the LLaMA-like types that it does not list.
DEFAULT_TARGETS: dict[str, Any] = {
    "smollm3": ["q_proj", "v_proj"],
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}


class MokaModel(BaseTuner):
    """The tuner: puts a `MokaLinear` around every targeted linear layer, after everything has been checked.

    Holds for every adapter: `peft_config[name]` is the config that it was given, with `target_modules`, `shapes`,
    `layers` and `base_fingerprint` filled in, so that a saved folder states all of them. A config that was used for
    another model, where these differ, is left as it is, and copied.
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
        config = given.as_given()
        check_adapter_name(adapter_name, model)
        compiled = [path for path, module in model.named_modules() if hasattr(module, "_orig_mod")]
        if compiled:
            raise ConfigError(
                f"model: {compiled[0] or 'it'} was compiled by torch.compile, which would stand in the paths of a "
                "saved adapter; attach the adapter first and compile the PeftModel, or compile in place by "
                "module.compile()"
            )
        self._prepare_adapter_config(config, self.get_model_config(model))
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        allowed = config.allow_other_base  # another base is told before the layers that it has not
        fingerprint = check_fingerprint(config.base_fingerprint, model, allow_other_base=allowed)
        core = config.to_core()
        plans = plan_choice(config, model)
        if config.layers:
            config.spell_out()
        refuse_special(core.execution, {path: _base_layer(model.get_submodule(path)) for path in plans})
        held = quantisation(model)
        if None not in (config.base_quantisation, held) and config.base_quantisation != held:
            warnings.warn(
                f"adapter {adapter_name!r} was trained on a base held as {config.base_quantisation!r}; this one is "
                f"held as {held!r}, on which it computes something else",
                stacklevel=2,
            )
        if not _is_loaded_by_peft():
            config.checksum = config.sealed = None  # a fresh adapter with the settings of a saved one
        elif config.checksum is None and config.sealed is not None:
            raise AdapterError(
                f"adapter {adapter_name!r}: checksum: expected one in adapter_config.json; got none. Take the folder "
                "as it was saved"
            )
        stated = config.stated(plans, fingerprint, held)
        config = self.peft_config[adapter_name] = given.take_over(stated)
        # PEFT matches names by rules of its own (it would take every module that a regular expression matches, and
        # writes "all-linear" out); it is handed exactly the planned paths, and the config keeps what the user wrote.
        chosen = {name: getattr(config, name) for name in ("target_modules", *_CHOICE_FIELDS)}
        config.target_modules = "|".join(map(re.escape, plans))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage
            )
        finally:
            for name, value in chosen.items():
                setattr(config, name, value)

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
        kwargs = get_quantization_kwargs(self.model)
        dims = refuse_module(current_key, target, **kwargs)
        core = peft_config.to_core().for_layer(current_key, *dims)
        plan = moka_core.plan_layer(core, *dims)
        init_weights = peft_config.init_weights
        if isinstance(target, MokaLinear):
            inference_mode = peft_config.inference_mode
            target.update_layer(
                adapter_name, plan=plan, config=core, init_weights=init_weights, inference_mode=inference_mode
            )
            return
        layer = MokaLinear(target, adapter_name, plan=plan, config=core, init_weights=init_weights, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around every forward and generate: hands `adapter_names`, one a sample, to the adapted layers.

        Raises:
            ConfigError: a name is unknown, or the model is in training mode.
        """
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams") or 1  # generate repeats every sample that often, but not before the encoder
        get_encoder: Any = getattr(self.model, "get_encoder", None)
        is_pair = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder = set(get_encoder().modules()) if get_encoder is not None and is_pair else set()
        handles = []
        for module in self.modules():
            if isinstance(module, (MokaLinear, AuxiliaryTrainingWrapper)):
                repeats = 1 if module in encoder else beams
                own = [name for name in names for _ in range(repeats)]
                hook = functools.partial(_hand_over, adapter_names=own)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Any) -> None:
        if self.training:
            raise ConfigError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first; to train, "
                "choose the adapter with set_adapter."
            )
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"adapter_names: expected a list of names, one a sample; got {names!r}")
        unknown = sorted(set(names) - {BASE} - set(self.peft_config))
        if unknown:
            raise ConfigError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are "
                f"{', '.join(self.peft_config)}, and {BASE!r} for none."
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """W + ΔW in place of W in every layer, for the named adapters or the active ones; see `MokaLinear.merge`.

        Raises:
            ConfigError: there is no adapter of a name.
        """
        self._check_known(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        self._check_known(adapter_names)
        names = [] if not merge else self.active_adapters if adapter_names is None else adapter_names
        layers = [layer for layer in self.model.modules() if isinstance(layer, MokaLinear)]
        marks = merge_marks(self.model, names)
        if merge and safe_merge:
            for layer in layers:
                with onload_layer(layer):
                    layer.check_finite(names)  # all of them, before the first is merged
        begun = True
        try:
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        except BaseException:
            left = [layer for layer in self.model.modules() if isinstance(layer, MokaLinear)]
            begun = len(left) < len(layers) or any(layer.merged for layer in left)
            raise
        finally:
            if begun:
                mark_merged(self.model, marks)
        return model

    def _check_known(self, adapter_names: list[str] | None) -> None:
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown:
            raise ConfigError(
                f"adapter_names: expected some of {', '.join(self.peft_config)}; got {', '.join(unknown)}"
            )

    def _check_merge_allowed(self) -> None:
        """PEFT's hook before merging."""
        untie(self.model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer does, for that adapter; see `MokaLinear`. A warning says why not.

        PeftModel does not hand the name on: where there is no adapter "default", the active ones are meant.
        """
        names = [adapter_name] if adapter_name in self.peft_config else self.active_adapters
        layers = [module for module in self.modules() if isinstance(module, MokaLinear)]
        supported = all(layer.supports_lora_conversion(name) for layer in layers for name in names)
        if not supported:
            warnings.warn(
                "MoKA_s cannot be converted to LoRA: every singular value of I ⊗ S stands there as often as the "
                "identity is large, so that no small rank comes near it. MoKA with identity='none' can be converted.",
                stacklevel=2,
            )
        return supported

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply an adapter's ΔW by `scale` in every layer; 1 is what its config says. Not saved with it.

        Raises:
            ConfigError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ConfigError(f"adapter_name: expected one of {', '.join(self.peft_config)}; got {adapter_name!r}")
        for module in self.modules():
            if isinstance(module, MokaLinear):
                module.set_scale(adapter_name, scale)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        dropout: float | None = None,
        **of_other_types: Any,
    ) -> None:
        """Add an adapter with ΔW = Σ_n weights[n] · ΔW_n: the exact sum, since a sum of mixtures is a mixture.

        It has all terms of the adapters that it is made of (see `moka_torch.combine.combine`), is not active, and can
        be trained on, saved and exported like any other.

        Args:
            adapters: names of adapters on this model.
            weights: of each, of either sign.
            adapter_name: of the new adapter.
            combination_type: "cat", the exact sum; PEFT's other types are approximations that this does not need.
            dropout: of the new adapter in training; needed if the adapters differ in it.

        Raises:
            ConfigError: see `check_weights`; the type is another, the adapters differ in dropout, train more than
                mixtures, or the name is unusable.
        """
        if combination_type != "cat":
            raise ConfigError(
                f"combination_type: expected 'cat', the exact weighted sum; got {combination_type!r}, which would only "
                "approximate it"
            )
        if of_other_types:
            raise ConfigError(
                f"{', '.join(of_other_types)}: belong to approximate combinations; 'cat' takes none of them"
            )
        chosen = check_weights(adapters, weights, self.peft_config)
        check_adapter_name(adapter_name, self.model)
        configs: list[Any] = [self.peft_config[name] for name in chosen]
        beyond = [field for config in configs for field in config.beyond_mixture]
        if beyond:
            raise ConfigError(f"adapters: {' and '.join(beyond)} train more than mixtures, of which there is no sum")
        rates = sorted({config.dropout for config in configs} if dropout is None else {dropout})
        if len(rates) > 1:
            raise ConfigError(f"dropout: the adapters have {' and '.join(map(str, rates))}; say which it should be")
        ways = {config.base_quantisation for config in configs}
        fingerprints = [config.base_fingerprint for config in configs if config.base_fingerprint is not None]
        kinds = {config.to_core().identity for config in configs}
        identity: Identity = kinds.pop() if len(kinds) == 1 else "none"
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, MokaLinear)}
        combined = combine_layers(layers, chosen, identity=identity, dropout=rates[0])
        targets = tuple(sorted(combined))
        settings = {
            path: (dataclasses.replace(own, target_modules=targets, num_shapes=1), plan)
            for path, (own, plan, _) in combined.items()
        }
        self.peft_config[adapter_name] = MokaConfig.from_core(
            moka_core.MokaConfig.of_layers(settings),
            task_type=configs[0].task_type,
            base_model_name_or_path=configs[0].base_model_name_or_path,
            base_fingerprint=fingerprints[0] if fingerprints else None,
            base_quantisation=ways.pop() if len(ways) == 1 else None,
            layers={path: plan.key for path, (_, plan, _) in combined.items()},
            inference_mode=True,
        )
        try:
            self.inject_adapter(self.model, adapter_name)
            self._cast_adapter_dtype(adapter_name)  # to float32, as PeftModel.add_adapter does
            with torch.no_grad():
                for path, (_, _, tensors) in combined.items():
                    for name, parameter in layers[path].tensors(adapter_name).items():
                        parameter.copy_(tensors[name])
        except BaseException:
            for layer in layers.values():
                layer.delete_adapter(adapter_name)
            del self.peft_config[adapter_name]
            raise

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """PEFT's hook on saving: says what a file cannot hold; see `own_tensors`."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        assert isinstance(config, MokaConfig)
        return own_tensors(found, model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's hook on loading: strict here, where PEFT takes extra keys, NaNs and missing keys."""
        merged = [path for path, layer in adapted_layers(model, adapter_name).items() if layer.merged]
        if merged:
            raise AdapterError(
                f"adapter {adapter_name!r}: {merged[0]} is merged, and could not be unmerged with other numbers than "
                "it was merged with; call unmerge_adapter first. Nothing was loaded."
            )
        assert isinstance(config, MokaConfig)
        try:
            check_state_dict(model, adapter_name, state_dict, config.bias)
            check_file(config, state_dict, adapter_name)
        except AdapterError:
            if config.checksum is not None and isinstance(model, PeftModel):  # it came with this file
                _take_back(model, adapter_name)
            raise
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def _is_loaded_by_peft() -> bool:
    """Whether PEFT is at loading a folder, whose tensors will come next, and not at attaching a fresh adapter.

    Nothing that PEFT hands over tells the two apart.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "peft.peft_model" and frame.f_code.co_name in _LOADERS:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _take_back(model: PeftModel, adapter_name: str) -> None:
    """Remove an adapter whose tensors were refused, so that its name is free and the base as it was."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        tuner: Any = model.base_model
        tuner.unload()


def _hand_over(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, MokaLinear) else module


def register() -> None:
    """Put MoKA into PEFT's tables, from outside; a second call changes nothing.

    (`peft.utils.register_peft_method` takes only names of PEFT's own enum.)
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[MokaPeftType.MOKA] = MokaConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[MokaPeftType.MOKA] = MokaModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[MokaPeftType.MOKA] = PREFIX  # type: ignore[index]
