"""A transformers model with an adapter as a model of lm-evaluation-harness: its own HFLM around what PEFT loaded."""

from __future__ import annotations

import os
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel

from moka_core import ModelError
from moka_torch.probe import load_base
from moka_torch.tuner import register


def load_lm(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any,
    quantise: str = "nf4-double",
    allow_other_base: bool = False,
    batch_size: int = 8,
) -> HFLM:
    """The base in float32, its linear layers in bitsandbytes NF4 if asked, and the adapter on it, by plain PEFT.

    It stands on the GPU if there is one; on a CPU 4-bit layers are exact, see `exact_on_cpu`.

    Args:
        base: a Hugging Face model folder.
        adapter: a folder that PEFT can load; None: the base alone.
        tokenizer: of transformers.
        quantise: see `load_base`.
        allow_other_base: take an adapter that was trained on another base.
        batch_size: texts that are read at once.

    Raises:
        AdapterError: the adapter belongs to another base.
        ConfigError: another word for `quantise`.
        ModelError: the model's logits are not finite.
    """
    register()
    model: Any = load_base(base, quantise=quantise, device="cuda" if torch.cuda.is_available() else "cpu")
    if adapter is not None:
        options: dict[str, Any] = {"allow_other_base": True} if allow_other_base else {}
        model = PeftModel.from_pretrained(model, str(adapter), **options).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokenizer.eos_token_id]], device=model.device)).logits
    if not logits.isfinite().all():
        raise ModelError(
            f"{base}: the model's logits are not finite; its weights or its adapter may hold NaN or infinite entries"
        )
    return HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
