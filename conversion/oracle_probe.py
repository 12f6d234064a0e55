"""A model folder and an adapter computed by definition, in float64: what one backend alone is held to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from conversion.base_weights import BaseFolder
from moka_core import Adapter, Nf4Weight, dequantise_nf4
from moka_core.oracle import dense_delta
from moka_core.oracle_llama import OracleConfig, trace_oracle
from moka_core.probe import FrozenTensor


class OracleProbe:
    """The numbers that a folder and an adapter stand for; see `moka_core.probe.ForwardProbe`.

    Weights are read from the folder, and packed if they are to be, whenever they are asked for: only those of the
    layer that is computed are in memory.

    Raises:
        ModelError: the model is no LLaMA.
    """

    label = "float64"

    def __init__(self, base: BaseFolder, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.config = OracleConfig.from_hf_config(base.config)
        self._names = set(base.specs())

    def frozen(self) -> list[str]:
        return sorted(self._names)

    def frozen_tensor(self, name: str) -> FrozenTensor:
        weight = self.base.weight(name)
        if isinstance(weight, Nf4Weight):
            return FrozenTensor(value=dequantise_nf4(weight), packed=weight)
        return FrozenTensor(value=weight.astype(np.float32))

    def adapted(self) -> list[str]:
        return list(self.adapter.layers)

    def delta(self, path: str) -> np.ndarray:
        return dense_delta(self.adapter.layers[path], self.adapter.layer_config(path))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        *_, (_, logits) = self.trace(tokens)
        return logits

    def trace(self, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        return trace_oracle(
            self.config,
            tokens,
            tensor=lambda name: self.base.dense(name) if name in self._names else None,
            delta=lambda path: self.delta(path) if path in self.adapter.layers else None,
        )
