"""Ready-made configs by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moka_core.architecture import Architecture
from moka_core.config import MokaConfig, check_keys
from moka_core.errors import ConfigError

PAPER = MokaConfig()


def _blocks(model: Architecture) -> MokaConfig:
    grouped = model.num_key_value_heads < model.num_attention_heads
    return dataclasses.replace(PAPER, r=8 if grouped else 16, identity="a", num_shapes=1)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A config and what is known of it.

    Args:
        about: what it is.
        config: the config itself, or what makes it for a model of some architecture.
        learning_rate: the peak of AdamW's learning rate that was best on validation over both tasks of
            docs/accuracy.md, on SmolLM2-135M; None if it was not tuned.
    """

    about: str
    config: MokaConfig | Callable[[Architecture], MokaConfig]
    learning_rate: float | None = None

    @property
    def needs_model(self) -> bool:
        """Whether its config depends on the model's architecture."""
        return callable(self.config)


PRESETS: dict[str, Preset] = {
    "recommended": Preset(
        about="r = 3: two balanced shapes and a LoRA of rank 1, softmax gate, stable scaling times 30, dropout 0.1, "
        "on q_proj, k_proj, v_proj, up_proj and down_proj: about as many parameters as `paper` (docs/choosing.md)",
        config=MokaConfig(
            r=3,
            lora_terms=1,
            scaling="stable",
            scale=30.0,
            target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        ),
        learning_rate=3e-3,
    ),
    "paper": Preset(
        about="r = 10: five balanced shapes x 2 copies, softmax gate, dropout 0.1, on q_proj and v_proj "
        "(arXiv 2508.03527)",
        config=PAPER,
        learning_rate=3e-2,
    ),
    "paper-s": Preset(
        about="MoKA_s: blocks of about 4096 entries on the diagonal, r = 16 (8 with grouped-query attention); "
        "a reconstruction from the paper's parameter totals, since its shape lists are not public",
        config=_blocks,
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
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown preset {name!r}{hint or ';'} known: {', '.join(PRESETS)}")
    config = PRESETS[name].config
    if not isinstance(config, MokaConfig):
        if model is None:
            raise ConfigError(f"preset {name!r} depends on the model's attention; pass its architecture")
        config = config(model)
    return dataclasses.replace(config, **overrides) if overrides else config
