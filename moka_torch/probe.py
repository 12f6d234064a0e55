"""The PyTorch side of a parity check: transformers, PEFT and bitsandbytes; see `moka_core.probe.Probe`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from moka_core import ConfigError, Nf4Weight
from moka_core.nf4 import NestedScales
from moka_core.probe import ATTENTION, LAYER_STEPS, AdamW, Batch, FrozenTensor
from moka_torch.exactness import exact_on_cpu
from moka_torch.linear import MokaLinear
from moka_torch.loading import adapted_layers, plain_path
from moka_torch.tuner import register


def load_base(folder: str | os.PathLike[str], *, quantise: str = "nf4-double", device: str = "cpu") -> torch.nn.Module:
    """The transformers model of a folder in float32, its linear layers in bitsandbytes NF4 if asked.

    A folder that holds NF4 weights already is taken as it is.

    Args:
        quantise: "nf4-double", "nf4" or "none", for a folder of dense weights.
        device: where it stands; on a CPU its 4-bit layers are exact, see `exact_on_cpu`.

    Raises:
        ConfigError: another word for `quantise`.
    """
    import bitsandbytes as bnb
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    if quantise not in ("nf4-double", "nf4", "none"):
        raise ConfigError(f"quantise: expected nf4-double, nf4 or none; got {quantise!r}")
    packed = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) is not None
    options = {}
    if quantise != "none" and not packed:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantise == "nf4-double",
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device}, **options)
    if device == "cpu":
        exact_on_cpu(model)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # a packed folder brings the dtype that it was packed from; here everything is float32
            module.compute_dtype = torch.float32
            weight: Any = module.weight
            weight.quant_state.dtype = torch.float32
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model.eval()


class TorchProbe:
    """A transformers model with an adapter that plain `PeftModel.from_pretrained` loaded, in float32 on the CPU.

    Args:
        quantise: see `load_base`.
        allow_other_base: take an adapter that was trained on another base.

    Holds: `model` has the adapter as it is now; what is changed there, every method sees.
    """

    label = "PyTorch"

    def __init__(
        self,
        base: str | os.PathLike[str],
        adapter: str | os.PathLike[str],
        *,
        quantise: str = "nf4-double",
        allow_other_base: bool = False,
    ) -> None:
        register()
        options: dict[str, Any] = {"allow_other_base": True} if allow_other_base else {}
        self.model = PeftModel.from_pretrained(
            load_base(base, quantise=quantise), str(adapter), is_trainable=True, **options
        )
        self.model.eval()

    def frozen(self) -> list[str]:
        return list(self._places())

    def frozen_tensor(self, name: str) -> FrozenTensor:
        import bitsandbytes as bnb

        parameter = self._places()[name]
        if not isinstance(parameter, bnb.nn.Params4bit):
            return FrozenTensor(value=parameter.detach().float().numpy())
        weight: Any = parameter
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return FrozenTensor(value=decoded.float().numpy(), packed=nf4_weight(weight))

    def adapted(self) -> list[str]:
        return list(self._layers())

    def delta(self, path: str) -> np.ndarray:
        return self._layers()[path].get_delta_weight("default").detach().float().numpy()

    @torch.no_grad()
    def trace(self, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        causal: Any = self.model.get_base_model()
        hidden, options = self._first_call(causal.model.layers[0], torch.from_numpy(tokens).long())
        yield "model.embed_tokens", hidden.numpy()
        for index, layer in enumerate(causal.model.layers):
            hidden, seen = _run_layer(layer, hidden, options)
            for step in LAYER_STEPS:
                yield f"model.layers.{index}.{step}", seen[step].numpy()
            yield f"model.layers.{index}", hidden.numpy()
        hidden = causal.model.norm(hidden)
        yield "model.norm", hidden.numpy()
        yield "lm_head", causal.lm_head(hidden).float().numpy()

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        self.model.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        grads = {}
        for path, layer in self._layers().items():
            for name, parameter in layer.tensors("default").items():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                grads[f"{path}.{name}"] = gradient.numpy().copy()
        return loss.item(), grads

    def train(self, batches: Sequence[Batch], optimiser: AdamW) -> list[float]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        update = torch.optim.AdamW(
            trained,
            lr=optimiser.learning_rate,
            betas=(optimiser.b1, optimiser.b2),
            eps=optimiser.eps,
            weight_decay=optimiser.weight_decay,
        )
        losses = []
        for batch in batches:
            update.zero_grad()
            loss = self._loss(batch)
            loss.backward()
            update.step()
            losses.append(loss.item())
        return losses

    def _places(self) -> dict[str, torch.nn.Parameter]:
        """Every frozen parameter by its name in a checkpoint, a shared one once."""
        return {
            plain_path(name).replace(".base_layer.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if ".moka_" not in name
        }

    def _first_call(self, layer: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the model calls its first layer with: masks and rotary angles are transformers' own."""
        caught: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            caught.append((inputs[0], options))
            raise _Caught

        handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(input_ids=tokens, use_cache=False)
        except _Caught:
            pass
        finally:
            handle.remove()
        return caught[0]

    def _layers(self) -> dict[str, MokaLinear]:
        return adapted_layers(self.model, "default")

    def _loss(self, batch: Batch) -> Tensor:
        tokens = torch.from_numpy(batch.tokens).long()
        # float64 for the loss alone: torch's float32 log-softmax over 49,152 classes is off by 8e-6 on a CPU (1e-4
        # over a strided axis), which would hide differences of the models under those of the loss
        logits = self.model(input_ids=tokens).logits[:, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        weights = torch.from_numpy(batch.learned)[:, 1:].flatten().to(losses.dtype)
        return (losses * weights).sum() / weights.sum()


class _Caught(Exception):
    """The first layer was reached: no error, it ends a forward pass early."""


def _run_layer(layer: torch.nn.Module, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """A decoder layer's output, and the outputs of its `LAYER_STEPS`."""
    seen: dict[str, Tensor] = {}

    def note(step: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[step] = output
            if step == "self_attn.o_proj":
                seen[ATTENTION] = inputs[0]

        return hook

    steps = [step for step in LAYER_STEPS if step != ATTENTION]
    handles = [layer.get_submodule(step).register_forward_hook(note(step)) for step in steps]
    try:
        output = layer(hidden, **options)
    finally:
        for handle in handles:
            handle.remove()
    return (output[0] if isinstance(output, tuple) else output), seen


def nf4_weight(parameter: Any) -> Nf4Weight:
    """The packed weight of a `bnb.nn.Linear4bit`, as NumPy arrays."""
    state = parameter.quant_state
    absmax = state.absmax.cpu().numpy().reshape(-1)
    scales: np.ndarray | NestedScales = absmax
    if state.nested:
        scales = NestedScales(
            codes=absmax,
            absmax=state.state2.absmax.cpu().numpy(),
            levels=state.state2.code.cpu().numpy(),
            offset=np.float32(state.offset.item()),
        )
    return Nf4Weight(shape=tuple(state.shape), codes=parameter.data.cpu().numpy().reshape(-1), scales=scales)
