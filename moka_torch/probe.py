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
from moka_core.probe import AdamW, Batch
from moka_torch.exactness import exact_on_cpu
from moka_torch.linear import MokaLinear
from moka_torch.loading import CHECKPOINT_PREFIX, adapted_layers
from moka_torch.tuner import register


def load_base(folder: str | os.PathLike[str], *, quantise: str = "nf4-double") -> torch.nn.Module:
    """The transformers model of a folder on the CPU in float32, its linear layers in bitsandbytes NF4 if asked.

    A folder that holds NF4 weights already is taken as it is.

    Args:
        quantise: "nf4-double", "nf4" or "none", for a folder of dense weights.

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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **options)
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
    """A transformers model with an adapter that plain `PeftModel.from_pretrained` loaded, in float32 on the CPU."""

    def __init__(
        self, base: str | os.PathLike[str], adapter: str | os.PathLike[str], *, quantise: str = "nf4-double"
    ) -> None:
        register()
        self._model = PeftModel.from_pretrained(load_base(base, quantise=quantise), str(adapter), is_trainable=True)
        self._model.eval()

    def packed(self) -> Iterator[tuple[str, Nf4Weight, np.ndarray]]:
        import bitsandbytes as bnb

        for path, module in self._model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight: Any = module.weight
                name = path.removeprefix(CHECKPOINT_PREFIX).removesuffix(".base_layer")
                decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                yield name, nf4_weight(weight), decoded.float().numpy()

    def deltas(self) -> Iterator[tuple[str, np.ndarray]]:
        for path, layer in self._layers().items():
            yield path, layer.get_delta_weight("default").detach().numpy()

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        self._model.zero_grad()
        loss = self._loss(batch)
        loss.backward()
        grads = {}
        for path, layer in self._layers().items():
            for name, parameter in layer.tensors("default").items():
                assert parameter.grad is not None
                grads[f"{path}.{name}"] = parameter.grad.numpy().copy()
        return loss.item(), grads

    def train(self, batches: Sequence[Batch], optimiser: AdamW) -> list[float]:
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
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

    def _layers(self) -> dict[str, MokaLinear]:
        return adapted_layers(self._model, "default")

    def _loss(self, batch: Batch) -> Tensor:
        tokens = torch.from_numpy(batch.tokens).long()
        # float64 for the loss alone: torch's float32 log-softmax over 49,152 classes is off by 8e-6 on a CPU (1e-4
        # over a strided axis), which would hide differences of the models under those of the loss
        logits = self._model(input_ids=tokens).logits[:, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        weights = torch.from_numpy(batch.learned)[:, 1:].flatten().to(losses.dtype)
        return (losses * weights).sum() / weights.sum()


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
