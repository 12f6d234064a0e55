"""What several adapters make of one base: their logits on the same tokens, by plain PEFT."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import PeftConfig, PeftModel

from moka_torch.config import MokaConfig
from moka_torch.probe import load_base
from moka_torch.tuner import register


def adapter_logits(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    tokens: Sequence[np.ndarray],
    *,
    quantise: str = "nf4-double",
    allow_other_base: bool = False,
) -> Iterator[np.ndarray]:
    """The logits of a base alone, then with each of the adapters, (batches, batch, time, vocab), float32 on the CPU.

    The base is loaded once. Each adapter is loaded by `PeftModel.from_pretrained`, of whichever kind it is, and taken
    off again.

    Args:
        base: a Hugging Face model folder.
        adapters: folders that PEFT can load.
        tokens: batches, each (batch, time).
        quantise: see `load_base`.
        allow_other_base: take MoKA adapters that were trained on another base.

    Raises:
        AdapterError: a MoKA adapter belongs to another base.
        ConfigError: another word for `quantise`.
    """
    register()
    model = load_base(base, quantise=quantise)
    yield _logits(model, tokens)
    for folder in adapters:
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, MokaConfig):
            config.allow_other_base = allow_other_base
        adapted = PeftModel.from_pretrained(model, str(folder), config=config).eval()
        yield _logits(adapted, tokens)
        model = adapted.unload()


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([model(input_ids=torch.from_numpy(batch).long()).logits.numpy() for batch in tokens])
