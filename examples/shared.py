"""What both training scripts share beside their data: the 4-bit base, settings of Trainer, and the adapter's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

import moka_torch

CHECKPOINTING = {"use_reentrant": False}
# Bit-equal on a CPU; on a GPU the order of sums is not fixed.
SAME_LOSS = 1e-3


class Losses(NamedTuple):
    """Held-out losses: of the base, after training, and of the saved adapter on a fresh base."""

    before: float
    after: float
    reloaded: float


def load_4bit(folder: Path) -> PreTrainedModel:
    """The base in NF4 with double quantisation."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=dtype)
    if not torch.cuda.is_available():
        moka_torch.exact_on_cpu(base)  # before the first forward; see its docstring
    return base


def trainer_settings() -> dict[str, Any]:
    """Settings of Trainer, which TRL's SFTTrainer takes as well."""
    cuda = torch.cuda.is_available()
    return {
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "bf16": cuda,  # SFTConfig's default is True on a CPU, too
        "use_cpu": not cuda,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": CHECKPOINTING,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "dataloader_pin_memory": cuda,
    }


def check_saved(losses: Losses, adapter: Path) -> None:
    """Print the losses, and see that the saved adapter has that of the trained one."""
    print(f"held-out loss: {losses.before:.4f} before, {losses.after:.4f} after, {losses.reloaded:.4f} from {adapter}")
    if abs(losses.reloaded - losses.after) > SAME_LOSS * losses.after:
        raise RuntimeError(f"{adapter}: expected the loss that was saved, {losses.after}; got {losses.reloaded}")


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base with the adapter merged in, dense, in bfloat16."""
    dense: Any = moka_torch.merge(model, dtype=torch.bfloat16)  # the same class as the base
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"merged, dense, in bfloat16: {folder}")
