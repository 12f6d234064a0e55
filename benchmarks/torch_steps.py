"""A whole training step in PyTorch with PEFT, by variant, on weights that all variants share."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import cached_property
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import moka_torch
from benchmarks.harness import Call
from benchmarks.layer_torch import autocast, linear4bit
from benchmarks.models import FIVE, QV, RANK, Model
from moka_core import preset

VARIANTS: dict[str, Any] = {
    "frozen base": None,
    "QLoRA r=32 q,v": lambda _: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(QV)),
    "QLoRA r=32 q,k,v,up,down": lambda _: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(FIVE)),
    "DoRA r=32 q,v": lambda _: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(QV), use_dora=True),
    "LoKr q,v (dense base)": lambda _: LoKrConfig(r=RANK, alpha=RANK, target_modules=list(QV)),
    "MoKA auto": lambda _: moka_torch.MokaConfig.from_core(preset("paper", dropout=0.0)),
    "MoKA_s auto": lambda model: moka_torch.MokaConfig.from_core(preset("paper-s", model=model.sizes, dropout=0.0)),
}
NOTES = {"LoKr q,v (dense base)": "on the base's weights unquantised: PEFT's LoKr does not work on 4-bit layers"}


class Bases:
    """The base of all variants, in NF4 and dense; each is made when it is first asked for."""

    def __init__(self, model: Model, *, dtype: str, device: str) -> None:
        self.model, self.dtype = model, getattr(torch, dtype)
        self.device = torch.device("cuda" if device == "gpu" else "cpu")

    @cached_property
    def packed(self) -> nn.Module:
        if self.model.base is None:
            packed = pack(self._random(), self.dtype)
        else:
            settings = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
            packed = self._load(quantization_config=settings)
        if self.device.type == "cpu":
            moka_torch.exact_on_cpu(packed)
        return packed

    @cached_property
    def dense(self) -> nn.Module:
        return self._random() if self.model.base is None else self._load()

    def _load(self, **options: Any) -> nn.Module:
        disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(
            self.model.base,
            dtype=self.dtype,
            device_map={"": self.device.type if self.device.type == "cpu" else 0},
            attn_implementation="sdpa",
            **options,
        )

    def _random(self) -> nn.Module:
        config = LlamaConfig(**self.model.hf_config(), rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def pack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its layers' linear weights in NF4, doubly quantised; in place, one weight after the other."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith("lm_head"):
            weight = module.weight.data
            packed = linear4bit(*weight.shape, dtype, weight.device, weight)
            module.weight = None
            model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True
    return model


def shared(model: nn.Module) -> nn.Module:
    """Another model of the same tensors: what is attached to one is not on the other."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class TorchStep:
    """One variant's training step: forward, backward and AdamW on (batch, length) tokens.

    The embedding's output of the frozen base is made to need a gradient, so that the backward runs through every
    layer. In bfloat16 the forward runs under autocast, as in transformers' trainer.

    Args:
        variant: a name of `VARIANTS`.
    """

    def __init__(self, bases: Bases, variant: str, *, batch: int, length: int, remat: bool) -> None:
        self.device, self.dtype = bases.device, bases.dtype
        config = VARIANTS[variant]
        base: Any = shared(bases.dense if "dense" in variant else bases.packed)
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)  # a new name only
        if remat:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config is None:
            base.requires_grad_(False)
            base.enable_input_require_grads()
            self.model = base
        else:
            self.model = get_peft_model(base, config(bases.model))
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                if config is not None and "DoRA" not in variant:  # DoRA's magnitudes have a meaning
                    parameter.normal_(std=0.02)
        fused = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=fused) if trained else None
        tokens = torch.randint(0, bases.model.sizes.vocab_size, (batch, length + 1), device=self.device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def run(self) -> torch.Tensor:
        """One step."""
        with autocast(self.dtype, self.device):
            logits = self.model(input_ids=self.inputs, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), self.targets)
        loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(self, _: Any = None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def call(self) -> Call:
        return Call(self.run, self.wait)
