"""Containers of adapter parameters, called for what they hold so that hooks on modules reach it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Stacks(nn.ParameterDict):
    """The factors of one adapter by the number of their group; called, it gives them in the order of the groups.

    They are had by a call so that what hooks calls of modules reaches them, as accelerate's offloading does. (The order
    of a ParameterDict itself is that of the names as text, in which 10 comes before 2.)
    """

    __call__ = nn.Module.__call__  # ParameterDict's own refuses

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self[str(group)] for group in range(len(self)))


class Gates(nn.ParameterDict):
    """The gate logits by adapter; called with an adapter's name, it gives its own, or None.

    What replaces logits is as trainable as they were: PEFT casts and moves them by assigning plain tensors, of which a
    ParameterDict makes trainable parameters.
    """

    __call__ = nn.Module.__call__

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=self[key].requires_grad)
        super().__setitem__(key, value)

    def forward(self, adapter_name: str) -> Tensor | None:
        return self.get(adapter_name, None)
