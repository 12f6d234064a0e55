"""The adapted linear layer: one class for dense and quantised base layers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from moka_core import LayerPlan, MokaConfig
from moka_core.adapter import expected_tensors
from moka_core.config import check_finite
from moka_core.errors import AdapterError, ConfigError, ModelError
from moka_core.execution import Execution, check_execution
from moka_torch.base_weight import BaseWeight, base_weight, refuse_special
from moka_torch.containers import Gates, Stacks
from moka_torch.exactness import refuse_repacked
from moka_torch.mixture import backend_of, coefficients, delta_weight, moka_apply, schedule_for
from moka_torch.product import Job, moka_product, sum_dtype

BASE = "__base__"  # in `adapter_names`: a sample that no adapter is used on


class MokaLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer and any number of mixtures on it: y = base(x) + Σ_adapters ΔW dropout(x).

    Holds for every adapter name n, with the shape groups g of its plan:
    `moka_factor_a[n][str(g)]` is (copies, a_out, a_in), `moka_factor_b[n][str(g)]` is (copies, b_out, b_in),
    `moka_gate_logits[n]` is (terms,); `scaling[n]` is what multiplies ΔW, its config's scale at first. What is a fixed
    identity, or the gate of an ungated mixture, is absent.
    With PEFT's key handling this gives the names of the file format, `<path>.moka_factor_a.<group>`.

    How ΔW dropout(x) is computed is chosen in every forward: by the call's `execution`, or the layer's, or that of the
    adapter's config. "merged", or "auto" where that is cheaper, makes one product with W + ΔW in place of the base
    layer's own if one adapter is active, nothing is dropped, and the base is a frozen `nn.Linear` or 4-bit layer
    without hooks; otherwise ΔW has a product of its own beside base(x).

    The weights of a quantised base layer are reached through PEFT's quantization backend, so that merging
    works wherever PEFT can decode and encode them.

    Args:
        base_layer: an `nn.Linear`, or a quantised linear layer that PEFT knows.
        adapter_name: of the first adapter.
        plan: its shapes.
        config: its settings.
        init_weights: False draws every parameter at random; see `MokaConfig`.
        get_apply_tensor_subclass: what PEFT needs to encode a torchao layer again.
    """

    adapter_layer_names = ("moka_factor_a", "moka_factor_b", "moka_gate_logits")
    other_param_names = ("moka_dropout", "moka_plan", "moka_config", "scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        plan: LayerPlan,
        config: MokaConfig,
        init_weights: bool = True,
        get_apply_tensor_subclass: Any = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self.moka_factor_a = nn.ModuleDict()
        self.moka_factor_b = nn.ModuleDict()
        self.moka_gate_logits = Gates()
        self.moka_dropout = nn.ModuleDict()
        self.moka_plan: dict[str, LayerPlan] = {}
        self.moka_config: dict[str, MokaConfig] = {}
        self.scaling: dict[str, float] = {}
        self._execution: Execution | None = None
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}  # what was taken off again must be what was put on
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, plan=plan, config=config, init_weights=init_weights)

    @property
    def execution(self) -> Execution | None:
        """Of every forward of this layer that is given none; None takes that of the adapter's config."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution | None) -> None:
        self._execution = None if execution is None else check_execution(execution)

    def update_layer(
        self,
        adapter_name: str,
        *,
        plan: LayerPlan,
        config: MokaConfig,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace the one of that name, at its start: ΔW = 0, unless `init_weights` is False.

        Raises:
            ConfigError: the plan is for a layer of another shape.
        """
        if (plan.out_features, plan.in_features) != (self.out_features, self.in_features):
            raise ConfigError(
                f"adapter {adapter_name!r}: expected a plan for {self.out_features}x{self.in_features}; got {plan.key}"
            )
        groups = {str(index): group for index, group in enumerate(plan.groups)}
        for factor, container in (("a", self.moka_factor_a), ("b", self.moka_factor_b)):
            stored = groups if config.identity != factor else {}
            container[adapter_name] = Stacks(
                {name: nn.Parameter(torch.empty(group.factor_shape(factor))) for name, group in stored.items()}
            )
        if adapter_name in self.moka_gate_logits:
            del self.moka_gate_logits[adapter_name]
        if config.gate == "softmax":
            self.moka_gate_logits[adapter_name] = nn.Parameter(torch.empty(plan.terms))
        dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.moka_dropout[adapter_name] = dropout.train(self.training)  # a layer in eval mode stays in it
        self.moka_plan[adapter_name] = plan
        self.moka_config[adapter_name] = config
        self.scaling[adapter_name] = config.scale
        self.reset_parameters(adapter_name, init_weights=init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_parameters(
        self, adapter_name: str, generator: torch.Generator | None = None, *, init_weights: bool = True
    ) -> None:
        """Put an adapter back to its start: the zero factor 0, the other drawn anew, the logits 0.

        Every entry of the other factor is uniform in ±1/√columns, columns being a_in or b_in: Kaiming with
        a = √5 for each copy alone. (`kaiming_uniform_` on the stack would take rows·columns for the fan-in.)

        Args:
            generator: source of the draw, on the CPU; torch's own if None.
            init_weights: False draws the zero factor like the other, and logits of N(0, 1).
        """
        config = self.moka_config[adapter_name]
        for factor, container in (("a", self.moka_factor_a), ("b", self.moka_factor_b)):
            for parameter in container[adapter_name]():
                if factor == config.zero_factor and init_weights:
                    parameter.zero_()
                elif parameter.device.type == "meta":
                    continue
                else:
                    bound = parameter.shape[-1] ** -0.5
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)
        if adapter_name in self.moka_gate_logits:
            logits = self.moka_gate_logits[adapter_name]
            if init_weights or logits.device.type == "meta":
                logits.zero_()
            else:
                logits.copy_(torch.empty(logits.shape).normal_(generator=generator))

    def factors(self, adapter_name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """(factor_a by group, factor_b by group, gate_logits) of an adapter, as `moka_apply` takes them.

        Raises:
            ModelError: they are sharded, and this is not called from within the model that shards them; or they have
                no values, the base layer having some.
        """
        factor_a, factor_b, logits = self._stored(adapter_name)
        if any(tensor is not None and tensor.is_meta for tensor in (*factor_a, *factor_b, logits)):
            weight = getattr(self.get_base_layer(), "weight", None)
            if weight is not None and not weight.is_meta:
                raise ModelError(
                    f"adapter {adapter_name!r} has no values yet: its factors are on the meta device, as after "
                    "low_cpu_mem_usage=True. Load its weights first, or attach it without that."
                )
        if any(isinstance(tensor, DTensor) for tensor in (*factor_a, *factor_b, logits)):
            raise ModelError(
                f"adapter {adapter_name!r} is sharded, as by FSDP2's fully_shard, and a mixture needs its factors "
                "whole: call the model that is sharded and not a layer of it, unshard() it first, or gather the "
                "adapter with torch.distributed.checkpoint.state_dict.get_model_state_dict(full_state_dict=True)"
            )
        return factor_a, factor_b, logits

    def _stored(self, adapter_name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        return (
            self.moka_factor_a[adapter_name](),
            self.moka_factor_b[adapter_name](),
            self.moka_gate_logits(adapter_name),
        )

    def tensor_names(self, adapter_name: str) -> list[str]:
        """The names of `tensors`."""
        return list(expected_tensors(self.moka_plan[adapter_name], self.moka_config[adapter_name]))

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The stored parameters of an adapter by the names of `moka_core.LayerFactors.tensors`."""
        factor_a, factor_b, logits = self._stored(adapter_name)
        named = {f"factor_a.{group}": tensor for group, tensor in enumerate(factor_a)}
        named |= {f"factor_b.{group}": tensor for group, tensor in enumerate(factor_b)}
        return named if logits is None else {**named, "gate_logits": logits}

    def forward(
        self,
        x: Tensor,
        *args: Any,
        execution: Execution | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """base(x) + Σ ΔW dropout(x) over the active adapters, in the dtype that the base layer returns.

        ΔW with a product of its own is multiplied in the adapter's dtype, the input being cast to it, or in autocast's.
        W + ΔW is summed in float32 at least and rounded once, to the dtype that the base layer multiplies in.

        Args:
            execution: for this call, in place of the layer's own.
            adapter_names: one for each sample of x, the first axis: the adapter to use on it, or "__base__" for none,
                in place of the active ones. An adapter that this layer does not have counts as none here.
            args: what the base layer takes besides x.
            kwargs: likewise, by name.

        Raises:
            ConfigError: there are more or fewer `adapter_names` than samples, or an adapter is merged. Or the
                execution is unknown, or "merged" by name on a base layer that cannot take W + ΔW.
        """
        execution = self.execution if execution is None else execution
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_by_sample(x, adapter_names, args, kwargs, execution)
        names = [name for name in self._present(self.active_adapters) if name not in self.merged_adapters]
        for name in names:
            refuse_special(execution or self.moka_config[name].execution, {"this layer": self.base_layer})
        if len(names) == 1 and not args and not kwargs and not self._drops(names[0]):
            base = base_weight(self.base_layer, x)
            result = None if base is None else self._into_base(names[0], x, base, execution)
            if result is not None:
                return result
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in names:
            result = result + self._beside_base(name, x, execution)
        return result.to(dtype)

    def _beside_base(self, name: str, x: Tensor, execution: Execution | None) -> Tensor:
        """ΔW dropout(x) of one adapter, as a product of its own."""
        config, keep = self.moka_config[name], None
        if self._drops(name):
            dropout: Any = self.moka_dropout[name]
            if dropout.p != config.dropout:  # changed in place, as trainers do
                config = dataclasses.replace(config, dropout=dropout.p)
            keep = dropout(torch.ones_like(x)).bool()
        y = moka_apply(x, self.moka_plan[name], config, *self.factors(name), execution=execution, keep=keep)
        multiplier = self.multiplier(name)
        return y if multiplier == 1.0 else y * multiplier

    def _forward_by_sample(
        self, x: Tensor, adapter_names: Sequence[str], args: Any, kwargs: Any, execution: Execution | None
    ) -> Tensor:
        """base(x), and on the samples of each adapter its ΔW dropout(x)."""
        result = self.base_layer(x, *args, **kwargs)
        by_name: dict[str, list[int]] = {}
        for index, name in enumerate(adapter_names):
            by_name.setdefault(name, []).append(index)
        for name in self._present(list(by_name)):
            samples = torch.tensor(by_name[name], device=x.device)
            y = self._beside_base(name, x.index_select(0, samples), execution)
            result = result.index_add(0, samples, y.to(result.dtype))
        return result

    def _check_adapter_names(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ConfigError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ConfigError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are {', '.join(self.merged_adapters)}."
            )

    def multiplier(self, adapter_name: str) -> float:
        """What `set_scale` and its like have put on an adapter's ΔW, on top of its config's `scale`; 1 at first."""
        multiplier = self.scaling[adapter_name] / self.moka_config[adapter_name].scale
        return 1.0 if abs(multiplier - 1.0) < 1e-12 else multiplier

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply ΔW of an adapter by `scale`, from 1; a layer without that adapter is left alone."""
        if adapter_name in self.scaling:
            self._refuse_merged(adapter_name)
            self.scaling[adapter_name] = check_finite("scale", scale) * self.moka_config[adapter_name].scale

    def scale_layer(self, scale: float) -> None:
        """Multiply ΔW of the active adapters by `scale`, on top of what is on them."""
        for name in self._present(self.active_adapters):
            self.set_scale(name, self.multiplier(name) * check_finite("scale", scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide ΔW of the active adapters by `scale`, or undo all that was put on them if None."""
        if scale == 0:
            raise ConfigError("scale: expected a number other than 0 to divide by; give none to undo all scaling")
        for name in self._present(self.active_adapters):
            self.set_scale(name, 1.0 if scale is None else self.multiplier(name) / check_finite("scale", scale))

    def _refuse_merged(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ConfigError(f"adapter {adapter_name!r} is merged; unmerge it before its scale is changed")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can do anything useful: not for MoKA_s.

        Every singular value of I ⊗ S stands there as often as the identity is large, so that a LoRA of less than full
        rank would leave out whole directions at random.
        """
        config = self.moka_config.get(adapter_name)
        return config is None or config.identity == "none"

    def _into_base(self, name: str, x: Tensor, base: BaseWeight, execution: Execution | None) -> Tensor | None:
        """x (W + ΔW)ᵀ + bias as one product; None if that is not the execution to take."""
        plan, config = self.moka_plan[name], self.moka_config[name]
        schedule = schedule_for(
            plan,
            config,
            x.numel() // plan.in_features,
            execution=execution,
            own_product=False,
            backend=backend_of(x),
        )
        if schedule.forward != "merged":
            return None
        factor_a, factor_b, logits = self.factors(name)
        weights = coefficients(plan, config, logits, dtype=sum_dtype(x.device), device=x.device)
        if (multiplier := self.multiplier(name)) != 1.0:
            weights = weights * multiplier
        job = Job(plan, config.identity, schedule, base.compute, base.decode)
        return moka_product(job, x, weights, factor_a, factor_b, held=base.held, bias=base.bias).to(base.returns)

    def _drops(self, name: str) -> bool:
        dropout = self.moka_dropout[name]
        return dropout.training and getattr(dropout, "p", 0) > 0

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of an adapter, laid out as the base layer's weight: (out, in), or (in, out) for a Conv1D.

        In float32 for a factor dtype below that, in the factors' own otherwise.
        """
        factor_a, factor_b, logits = self.factors(adapter_name)
        precise = torch.promote_types((factor_b or factor_a)[0].dtype, torch.float32)
        delta = delta_weight(
            self.moka_plan[adapter_name],
            self.moka_config[adapter_name],
            [factor.to(precise) for factor in factor_a],
            [factor.to(precise) for factor in factor_b],
            None if logits is None else logits.to(precise),
        )
        multiplier = self.multiplier(adapter_name)
        delta = delta if multiplier == 1.0 else delta * multiplier
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add Σ ΔW to the base weight, rounded once; a quantised weight is decoded, added to, and encoded again.

        Args:
            safe_merge: leave the base weight as it is if the merged one would have NaN or infinite entries.
            adapter_names: which adapters; the active ones if None.

        Raises:
            AdapterError: `safe_merge`, and the merged weight is not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        merged = self._finite(names) if safe_merge else self._shifted(names, sign=1)
        if self.quantization_backend is not None:
            warnings.warn(
                f"merging into a {self.quantization_backend.backend_name} layer encodes it again, and what of ΔW "
                "is small against the gaps between its levels is lost. moka_torch.merge(model, dtype="
                "torch.bfloat16) gives a dense model that keeps it.",
                stacklevel=2,
            )
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)
        self._merged_scaling.update({name: self.scaling[name] for name in names})

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged ΔW off the base weight again; exact up to the rounding of its dtype.

        A quantised weight is encoded once more: what merging lost does not come back, and a warning says so.
        """
        if not self.merged:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)
            return
        if self.quantization_backend is not None:
            warnings.warn(
                f"unmerging from a {self.quantization_backend.backend_name} layer encodes it again and does not bring "
                "back the weight that it had before merging; load the base again for that",
                stacklevel=2,
            )
        current = dict(self.scaling)
        self.scaling.update({name: self._merged_scaling[name] for name in self.merged_adapters})
        try:
            self.set_base_weight(self._shifted(self.merged_adapters, sign=-1))
        finally:
            self.scaling.update(current)
        self.merged_adapters.clear()

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Return if W + ΔW of those of these adapters that are not merged yet is finite.

        Raises:
            AdapterError: it is not.
        """
        names = [name for name in self._present(list(adapter_names)) if name not in self.merged_adapters]
        if names:
            self._finite(names)

    def merged_scale(self, adapter_name: str) -> float:
        """The scale with which an adapter is merged, or would be now."""
        merged = adapter_name in self.merged_adapters
        return (self._merged_scaling if merged else self.scaling)[adapter_name]

    @torch.no_grad()
    def _finite(self, names: Sequence[str]) -> Tensor:
        """W + ΔW, if all of it is finite."""
        merged = self._shifted(names, sign=1)
        if not torch.isfinite(merged).all():
            raise AdapterError(
                f"NaNs detected in the merged weights. The adapter {' or '.join(names)} seems to be broken: W + ΔW has "
                "NaN or infinite entries. The base weight was left as it was; check the adapter, or the base's dtype."
            )
        return merged

    def _shifted(self, adapter_names: Sequence[str], *, sign: int) -> Tensor:
        """W ± Σ ΔW as a new tensor of W's dtype, summed in float32 at least and rounded once."""
        refuse_repacked(self.get_base_layer())
        weight = self.get_base_weight()
        dtype, total = weight.dtype, weight
        for name in adapter_names:
            delta = self.get_delta_weight(name)
            precise = torch.promote_types(total.dtype, delta.dtype)
            total = total.to(precise) + sign * delta.to(weight.device, precise)
        return total.to(dtype)

    def _present(self, adapter_names: list[str]) -> list[str]:
        """Those of the adapters that this layer has: adapters may target different layers."""
        return [name for name in adapter_names if name in self.moka_plan]

    def __repr__(self) -> str:
        return "moka." + super().__repr__()

    def extra_repr(self) -> str:
        """The adapters' shapes, for printing."""
        plans = ", ".join(f"{name}: {' + '.join(map(_brief, plan.groups))}" for name, plan in self.moka_plan.items())
        return "; ".join(filter(None, (plans, quantization_extra_repr(self))))


def _brief(group: Any) -> str:
    return f"{group.copies}·{group.shape}"
