"""What the scripts print."""

from __future__ import annotations


def held_out_losses(output: str) -> tuple[float, ...]:
    """The base's, the trained adapter's and the reloaded adapter's."""
    (line,) = [line for line in output.splitlines() if line.startswith("held-out loss: ")]
    return tuple(float(word) for word in line.split() if word[0].isdigit())


def message(output: str) -> str:
    """An error of the command line in one line, without its frame."""
    return " ".join(output.replace("│", " ").split())
