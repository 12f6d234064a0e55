"""One linear layer in PyTorch, by variant: forward, and gradients by the input and by the adapter."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.harness import Call
from benchmarks.models import RANK, layer_configs
from moka_core import plan_layer
from moka_torch import MokaLinear, exact_on_cpu


def linear4bit(out: int, in_: int, dtype: torch.dtype, device: torch.device, weight: Tensor | None = None) -> nn.Module:
    """A bias-free bitsandbytes layer in NF4, doubly quantised, with this weight or a random one."""
    layer = bnb.nn.Linear4bit(in_, out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    if weight is None:
        weight = 0.02 * torch.randn(out, in_, device=device, dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What transformers' trainer does with bf16=True; nothing in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class _Holder(nn.Module):
    """A model of one layer, for PEFT to put an adapter in."""

    is_loaded_in_4bit = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj = layer


class _Terms(nn.Module):
    """A mixture on a base layer, computed by `apply(x, [(α_i, A_i, B_i)])`."""

    def __init__(self, moka: MokaLinear, apply: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.moka = moka
        self.apply_terms = apply

    def forward(self, x: Tensor) -> Tensor:
        factor_a, factor_b, logits = self.moka.factors("default")
        pairs = [pair for a, b in zip(factor_a, factor_b, strict=True) for pair in zip(a, b, strict=True)]
        terms = [(weight, a, b) for weight, (a, b) in zip(torch.softmax(logits, 0), pairs, strict=True)]
        return self.moka.get_base_layer()(x) + self.apply_terms(x, terms)


def materialise(x: Tensor, terms: Any) -> Tensor:
    """x ΔWᵀ with ΔW summed from `torch.kron`s: what PEFT's LoKr does, for a mixture."""
    delta = sum(weight * torch.kron(a, b) for weight, a, b in terms)
    return nn.functional.linear(x, delta.to(x.dtype))


def fastkron(x: Tensor, terms: Any) -> Tensor:
    """x ΔWᵀ by FastKron's kernel (arXiv 2401.10187), one call a term: x (A ⊗ B)ᵀ = x (Aᵀ ⊗ Bᵀ)."""
    from pyfastkron import fastkrontorch

    return sum(weight * fastkrontorch.gemkm(x, (a.T.contiguous(), b.T.contiguous())) for weight, a, b in terms)


class TorchLayer:
    """The variants of one layer shape, on one bitsandbytes base; `notes` says which have been left out, and why.

    Args:
        dtype: of inputs and products; the adapters' parameters are float32.
    """

    def __init__(self, out: int, in_: int, dtype: str, device: str) -> None:
        self.out, self.in_, self.dtype = out, in_, getattr(torch, dtype)
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        base = linear4bit(out, in_, self.dtype, self.device)
        if device == "cpu":
            exact_on_cpu(base)
        paper, blocks = layer_configs(out, in_)

        def moka(config: Any = paper, execution: Any = "auto") -> MokaLinear:
            layer = MokaLinear(base, "default", plan=plan_layer(config, out, in_), config=config)
            layer.execution = execution
            return layer

        def lora() -> nn.Module:
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj"])
            return inject_adapter_in_model(config, _Holder(base)).q_proj

        self.variants: dict[str, Callable[[], nn.Module]] = {
            "frozen base": lambda: base,
            "LoRA r=32": lora,
            "MoKA auto": moka,
            "MoKA factored": lambda: moka(execution="factored"),
            "MoKA merged": lambda: moka(execution="merged"),
            "MoKA_s auto": lambda: moka(blocks),
            "materialise": lambda: _Terms(moka(), materialise),
        }
        self.notes: dict[str, str] = {}
        if importlib.util.find_spec("pyfastkron") is None:
            self.notes["pyfastkron"] = "not installed; `pip install --no-deps pyfastkron` (x86-64 with AVX, or CUDA)"
        elif self.dtype != torch.float32:
            self.notes["pyfastkron"] = f"has kernels for float32 and float64 only, not for {dtype}"
        else:
            self.variants["pyfastkron"] = lambda: _Terms(moka(), fastkron)

    def calls(self, tokens: int, names: Sequence[str]) -> dict[str, Call]:
        """The variants on one random input."""
        x = torch.randn(tokens, self.in_, device=self.device, dtype=self.dtype, requires_grad=True)
        dy = torch.randn(tokens, self.out, device=self.device, dtype=self.dtype)
        return {name: self._call(self.variants[name](), x, dy) for name in names}

    def _call(self, layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        return forward_and_backward(layer, x, dy)


def forward_and_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    """A layer's forward, and the gradients by x and by its trained parameters; in bfloat16 under autocast."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run() -> Any:
        with autocast(x.dtype, x.device):
            y = layer(x)
        return torch.autograd.grad(y, [x, *trained], dy)

    def wait(_: Any) -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    return Call(run, wait)
