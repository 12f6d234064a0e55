"""Which model a script measures: a folder's, or one of random numbers in a named shape."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from moka_cli.params import LORA_RANK, LORA_TARGETS
from moka_core import Architecture, MokaConfig, architecture, preset
from moka_core.architecture import ARCHITECTURES

TINY = Architecture(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=256,
    tie_word_embeddings=False,
)
QV = ("q_proj", "v_proj")
FIVE, RANK = LORA_TARGETS, LORA_RANK


@dataclass(frozen=True, kw_only=True)
class Model:
    """The numbers of a model, its name in result files, and its folder if it has one."""

    name: str
    sizes: Architecture
    base: str | None = None

    @classmethod
    def from_options(cls, arguments: argparse.Namespace) -> Model:
        """The model that --base or --random names; with --quick the tiny random one."""
        if arguments.base is None or arguments.quick:
            name = "tiny" if arguments.quick else arguments.random
            return cls(name=name, sizes=TINY if name == "tiny" else architecture(name))
        from conversion import open_base

        sizes = Architecture.from_hf_config(open_base(arguments.base).config)
        known = [name for name, other in ARCHITECTURES.items() if other == sizes]
        return cls(name=known[0] if known else "model", sizes=sizes, base=arguments.base)

    def hf_config(self) -> dict[str, Any]:
        """The fields of config.json for a random model of this shape."""
        sizes = self.sizes
        return {
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            "head_dim": sizes.head_dim,
            "vocab_size": sizes.vocab_size,
            "tie_word_embeddings": sizes.tie_word_embeddings,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        }


def layer_configs(out: int, in_: int) -> tuple[MokaConfig, MokaConfig]:
    """What is measured on a layer alone: the preset `paper`, and one block repeated along the diagonal (MoKA_s)."""
    blocks = preset("paper", dropout=0.0, identity="a", num_shapes=1, r=16 if out == in_ else 8)
    return preset("paper", dropout=0.0), blocks


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--base or --random, --batch, --length."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", help="a Hugging Face model folder; its dense weights are packed in NF4")
    which.add_argument("--random", metavar="NAME", help=f"random NF4 weights: tiny, {', '.join(ARCHITECTURES)}")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of one sequence")


def check_model_options(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exactly one of --base, --random and --quick must be there."""
    if arguments.quick:
        if arguments.base is not None or arguments.random is not None:
            parser.error("--quick has a tiny model of its own: expected no --base and no --random beside it")
        arguments.batch, arguments.length = 2, 16
    elif arguments.base is None and arguments.random is None:
        parser.error("expected --base FOLDER, --random NAME or --quick")
