"""The base model of a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moka_core import Adapter, ConfigError

if TYPE_CHECKING:
    from conversion import BaseFolder


def open_held(base: Path, quantise: str | None, adapter: Adapter | None = None) -> BaseFolder:
    """The base, held as --quantise says; without that as in the adapter's training, else in nf4-double.

    Raises:
        ConfigError: the folder is packed already, in another way than --quantise says.
        ModelError: see `conversion.open_base`.
    """
    from conversion import open_base

    held = (quantise or "nf4-double") if adapter is None else adapter.quantisation(quantise)
    opened = open_base(base, quantise=held)  # type: ignore[arg-type]
    if quantise not in (None, opened.quantisation):
        raise ConfigError(
            f"--quantise {quantise}: {base} is packed already, as {opened.quantisation}, and is held so; leave "
            "--quantise out, or give the dense folder that it was packed from"
        )
    return opened
