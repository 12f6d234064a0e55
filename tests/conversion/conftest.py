"""One small model and adapter in both backends and by definition, compiled once for all tests of parity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from conversion import open_base, save_adapter
from conversion.parity import ParityReport, compare, compare_with_oracle, token_batches
from moka_core import Adapter, MokaConfig
from moka_core.probe import AdamW, Batch
from tests.tiny import random_adapter, save_tiny_llama

PARITY_ADAPTER = MokaConfig(r=6, num_shapes=3, scale=0.5, target_modules=("q_proj", "v_proj", "down_proj"))
ROPE = {"rope_type": "default", "rope_theta": 500000.0}


@dataclass(frozen=True, kw_only=True)
class Sides:
    """A base and an adapter, their folders, and what computes with them; whoever changes these puts them back."""

    base: Path
    folder: Path
    adapter: Adapter
    jax: object
    torch: object
    truth: object
    batches: list[Batch]

    def both(self, *, train: int = 0, **options) -> ParityReport:
        """JAX against PyTorch; `options` may replace either side."""
        ours, theirs = options.pop("jax", self.jax), options.pop("torch", self.torch)
        return compare(ours, theirs, self.truth, self.batches, optimiser=AdamW(), train=train, **options)

    def alone(self, side: str) -> ParityReport:
        """One side against float64."""
        return compare_with_oracle(getattr(self, side), self.truth, self.batches[0].tokens)


@pytest.fixture(scope="session")
def sides(tmp_path_factory) -> Sides:
    from conversion.oracle_probe import OracleProbe
    from moka_jax.probe import JaxProbe
    from moka_torch.probe import TorchProbe

    root = tmp_path_factory.mktemp("parity")
    base = save_tiny_llama(root / "base", num_hidden_layers=3, tie_word_embeddings=False, rope_parameters=ROPE)
    opened = open_base(base)
    adapter = random_adapter(opened, PARITY_ADAPTER)
    folder = save_adapter(adapter, root / "adapter")
    return Sides(
        base=base,
        folder=folder,
        adapter=adapter,
        jax=JaxProbe(opened, adapter),
        torch=TorchProbe(base, folder),
        truth=OracleProbe(opened, adapter),
        batches=token_batches(base, 256, count=10, batch_size=2, length=32, seed=0),
    )
