"""The errors that this project raises for bad input: path, what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class MokaError(ValueError):
    """Bad input. The message is complete: the command line prints it alone, without a traceback."""


class ConfigError(MokaError):
    """A setting is unknown, out of range, or contradicts another."""


class AdapterError(MokaError):
    """An adapter's tensors do not fit its config, its plan or its base model."""


class TargetError(MokaError):
    """The layers that the config names are not in the model, or are no linear layers."""


class DataError(MokaError):
    """Training data cannot be used as it is."""


class ModelError(MokaError):
    """A model folder is missing something, or holds a model that is not supported."""


class PathError(MokaError):
    """A file or folder cannot be written, or stands where one is to be written."""


def first_lines(lines: Sequence[str], shown: int) -> list[str]:
    """The first lines of a message's list, and how many there are more.

    >>> first_lines(["a", "b", "c"], 2)
    ['a', 'b', 'and 1 more']
    """
    return [*lines[:shown], *([f"and {len(lines) - shown} more"] if len(lines) > shown else [])]
