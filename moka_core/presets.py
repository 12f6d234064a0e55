"""Ready-made configs by name."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from moka_core.architecture import Architecture
from moka_core.config import MokaConfig, check_keys
from moka_core.errors import ConfigError

PAPER = MokaConfig()
RECOMMENDED = MokaConfig(
    r=3,
    lora_terms=1,
    scaling="stable",
    scale=30.0,
    target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is known of a preset beside its config.

    Args:
        about: what it is.
        learning_rate: the peak of AdamW's learning rate that was best in docs/accuracy.md, on SmolLM2-135M; None if
            it was not tuned.
        needs_model: whether its config depends on the model's architecture.
    """

    about: str
    learning_rate: float | None = None
    needs_model: bool = False


PRESETS: dict[str, Preset] = {
    "recommended": Preset(
        about="r = 3: two balanced shapes and a LoRA of rank 1, softmax gate, stable scaling times 30, dropout 0.1, "
        "on q_proj, k_proj, v_proj, up_proj and down_proj: about as many parameters as `paper` (docs/choosing.md)",
        learning_rate=3e-3,
    ),
    "paper": Preset(
        about="r = 10: five balanced shapes x 2 copies, softmax gate, dropout 0.1, on q_proj and v_proj "
        "(arXiv 2508.03527)",
        learning_rate=3e-2,
    ),
    "paper-s": Preset(
        about="MoKA_s: blocks of about 4096 entries on the diagonal, r = 16 (8 with grouped-query attention); "
        "a reconstruction from the paper's parameter totals, since its shape lists are not public",
        needs_model=True,
    ),
}


def preset(name: str, model: Architecture | None = None, **overrides: Any) -> MokaConfig:
    """The config of a preset, fitted to a model.

    Args:
        name: "recommended", "paper" or "paper-s".
        model: the architecture; "paper-s" needs it, since its r differs between LLaMA2 and LLaMA3.
        overrides: fields of `MokaConfig` to set otherwise.

    Raises:
        ConfigError: the name is unknown, "paper-s" came without a model, or an override is no field.

    >>> preset("paper").r
    10
    """
    check_keys(overrides, [field.name for field in dataclasses.fields(MokaConfig)], where="preset overrides")
    if name == "recommended":
        config = RECOMMENDED
    elif name == "paper":
        config = PAPER
    elif name == "paper-s":
        if model is None:
            raise ConfigError("preset 'paper-s' depends on the model's attention; pass its architecture")
        grouped = model.num_key_value_heads < model.num_attention_heads
        config = dataclasses.replace(PAPER, r=8 if grouped else 16, identity="a", num_shapes=1)
    else:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown preset {name!r}{hint or ';'} known: {', '.join(PRESETS)}")
    return dataclasses.replace(config, **overrides) if overrides else config
