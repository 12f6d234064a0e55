"""The methods that are compared, each as a config of PEFT's and the learning rates that are tried for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoKrConfig, LoraConfig, PeftConfig

from moka_core import Architecture, preset
from moka_torch import MokaConfig

WIDE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # of the paper's baseline
NARROW = ["q_proj", "v_proj"]  # of the preset `paper`
DROPOUT = 0.1  # of the inputs, for LoRA, DoRA and every MoKA, as in the preset `paper`; PEFT's LoKr has none
# The first three tries; `rows.next_rates` goes on from there. The outputs' first steps, from shapes and initialisation,
# are 2 to 3 times larger for LoRA with alpha = 2r than for a mixture whose gates sum to 1. With `scale` s the zero
# factor moves s times as far a step as the other one, for its size: as LoRA+ (arXiv 2402.12354) has it.
LOW_RATES, MIDDLE_RATES, HIGH_RATES = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the comparison.

    Args:
        about: what it is, for the table.
        config: PEFT's config of it on a model of that architecture.
        rates: the learning rates to try first, three for each method.
        gate_rate: the learning rate of the gates' logits, in learning rates.
        tested: whether it goes on to the test; False for a variant of another method that is tried on validation alone.
    """

    about: str
    config: Callable[[Architecture], PeftConfig]
    rates: tuple[float, ...]
    gate_rate: float = 1.0
    tested: bool = True


def _lora(rank: int, targets: list[str], scale: int = 2, **options: Any) -> Callable[[Architecture], PeftConfig]:
    return lambda model: LoraConfig(
        r=rank, lora_alpha=scale * rank, lora_dropout=DROPOUT, target_modules=targets, **options
    )


def _lokr(rank: int, factor: int) -> Callable[[Architecture], PeftConfig]:
    return lambda model: LoKrConfig(r=rank, alpha=rank, decompose_factor=factor, target_modules=NARROW)


def _moka(name: str = "paper", **changes: Any) -> Callable[[Architecture], PeftConfig]:
    return lambda model: MokaConfig.from_core(dataclasses.replace(preset(name, model), **changes))


# In the order in which the study runs them.
METHODS = {
    "qlora-32": Method(about="LoRA r=32 on q, k, v, up, down", config=_lora(32, WIDE), rates=LOW_RATES),
    "moka-paper": Method(about="MoKA, preset `paper`: r=10 on q, v", config=_moka(), rates=HIGH_RATES),
    "moka-recommended": Method(
        about="MoKA, preset `recommended`: r=3, one term a LoRA, on q, k, v, up, down, stable scaling, scale 30",
        config=_moka("recommended"),
        rates=LOW_RATES,
    ),
    "moka-wide-3-stable": Method(
        about="MoKA r=3 on q, k, v, up, down, stable scaling, scale 30",
        config=_moka("recommended", lora_terms=0),
        rates=LOW_RATES,
        tested=False,
    ),
    "moka-wide-3": Method(
        about="MoKA r=3 on q, k, v, up, down, no scaling",
        config=_moka(r=3, target_modules=tuple(WIDE)),
        rates=HIGH_RATES,
        tested=False,
    ),
    "moka-wide-3-scale": Method(
        about="MoKA r=3 on q, k, v, up, down, scale 10, no scaling by shape",
        config=_moka(r=3, target_modules=tuple(WIDE), scale=10.0),
        rates=MIDDLE_RATES,
        tested=False,
    ),
    "moka-wide-10-stable": Method(
        about="MoKA r=10 on q, k, v, up, down, stable scaling, scale 30",
        config=_moka("recommended", r=10, lora_terms=0),
        rates=LOW_RATES,
    ),
    "moka-uniform": Method(about="MoKA `paper` with a uniform gate", config=_moka(gate="uniform"), rates=HIGH_RATES),
    "qlora-wide-3": Method(
        about="LoRA r=3 on q, k, v, up, down: about as many parameters as `recommended`",
        config=_lora(3, WIDE),
        rates=LOW_RATES,
    ),
    "moka-s-small": Method(
        about="MoKA_s with blocks of about 512 entries, r=8: 27 times fewer parameters than LoRA r=32",
        config=_moka("paper-s", block_entries=512),
        rates=MIDDLE_RATES,
    ),
    "qlora-matched": Method(
        about="LoRA r=9 on q, v: about as many parameters as `paper`", config=_lora(9, NARROW), rates=LOW_RATES
    ),
    "lokr": Method(
        about="LoKr on q, v: 4 x 4 times low rank 36, about as many parameters as `paper`",
        config=_lokr(36, 4),
        rates=MIDDLE_RATES,
    ),
    "qdora-32": Method(about="DoRA r=32 on q, k, v, up, down", config=_lora(32, WIDE, use_dora=True), rates=LOW_RATES),
    "moka-s": Method(about="MoKA_s, preset `paper-s`", config=_moka("paper-s"), rates=MIDDLE_RATES),
    "moka-stable": Method(about="MoKA `paper`, stable scaling", config=_moka(scaling="stable"), rates=HIGH_RATES),
    "moka-paper-scale": Method(
        about="MoKA `paper`, scale 10", config=_moka(scale=10.0), rates=MIDDLE_RATES, tested=False
    ),
    "qlora-wide-3-scale": Method(
        about="LoRA r=3 on q, k, v, up, down, alpha = 20r",
        config=_lora(3, WIDE, scale=20),
        rates=LOW_RATES,
        tested=False,
    ),
    "moka-one-shape": Method(
        about="MoKA r=10, one shape, on q, v", config=_moka(num_shapes=1), rates=HIGH_RATES, tested=False
    ),
    "moka-r5": Method(about="MoKA r=5, five shapes, on q, v", config=_moka(r=5), rates=HIGH_RATES, tested=False),
    "moka-gates": Method(
        about="MoKA `paper`, its gates learning ten times as fast",
        config=_moka(),
        rates=HIGH_RATES,
        gate_rate=10.0,
        tested=False,
    ),
}
