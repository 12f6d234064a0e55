"""A sketch of a model's linear weights that survives rounding and 4-bit packing, and does not survive training.

Of every kind of linear layer (q_proj, …) at least 64 groups are looked at, each of 16 blocks of 64 entries (NF4's own;
fewer where a weight is small). All that counts of an entry is whether its NF4 code is below, at, or above the level
of zero, so that a packed weight tells the same as the dense one that it was packed from. Those two borders lie at 4 %
of a block's largest entry, where rounding, whose error is a share of the entry, moves little across; training moves
entries by a share of the weight's spread, however small they are. A group's symbols are hashed to one digit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moka_core.nf4 import BLOCK, nearest_levels

GROUPS = 64  # of a kind, at least
BLOCKS = 16  # of a group, at most
UNKNOWN = "."
_ZERO = 7  # the level of 0
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 times the golden ratio's fractional part


@dataclass(frozen=True, kw_only=True)
class LinearWeight:
    """One linear weight (out, in), of which single blocks can be read.

    Args:
        entries: out·in.
        read: the blocks of these numbers, one array each. Block k is the entries 64·k to 64·k+63 in row-major
            (out, in) order, floating; or, of a weight in NF4, their codes as they are packed, uint8, the first in the
            high nibble. The last block of a weight may be short.
    """

    entries: int
    read: Callable[[Sequence[int]], Sequence[np.ndarray]]


def sketch_weights(layers: Mapping[str, LinearWeight | None]) -> str:
    """The sketch of a model's linear weights: "down_proj:0f.3…/gate_proj:…", a digit a group, by kind.

    A layer counts if it stands in a numbered list of layers, as those of every block of a language model do and
    heads do not. Its kind is the last part of its path.

    Args:
        layers: every linear weight by its layer's path in a Hugging Face checkpoint; None if it cannot be looked at,
            and then its groups have a "." for a digit, as have those with entries that are not finite.
    """
    kinds: dict[str, list[str]] = {}
    for path in sorted(layers, key=_natural):
        kind = sampled_kind(path)
        if kind is not None:
            kinds.setdefault(kind, []).append(path)
    return "/".join(f"{kind}:{_digits([layers[path] for path in kinds[kind]])}" for kind in sorted(kinds))


def sampled_kind(path: str) -> str | None:
    """The kind of a linear layer by its path, or None if it is not looked at.

    >>> sampled_kind("model.layers.0.self_attn.q_proj"), sampled_kind("lm_head")
    ('q_proj', None)
    """
    *before, kind = path.split(".")
    numbered = any(_is_number(part) for part in before)
    return kind if numbered and re.fullmatch(r"[A-Za-z0-9_]+", kind) else None


def sampled_blocks(group: int, entries: int, each: int) -> list[int]:
    """The numbers of the blocks that a group of its kind looks at, in a weight that gives `each` groups.

    Number i of group q is ⌊((n·q + i + 1)·φ mod 1)·blocks⌋ for i = 0..n-1, with φ the golden ratio in 64 bits: any run
    of them is spread evenly over the weight. n is 16, or less, at least 1, where the groups would share blocks: then
    an entry that is rounded across a border would change many of them.

    >>> sampled_blocks(0, entries=64 * 1000, each=2)[:4]
    [618, 236, 854, 472]
    >>> sampled_blocks(0, entries=64 * 32, each=32), sampled_blocks(1, entries=64 * 32, each=32)
    ([19], [7])
    """
    blocks = -(-entries // BLOCK)
    count = max(1, min(BLOCKS, blocks // each))
    first = group * count + 1
    return [((number * _GOLDEN) % 2**64 * blocks) >> 64 for number in range(first, first + count)]


def _digits(layers: Sequence[LinearWeight | None]) -> str:
    """The digits of one kind."""
    each = -(-GROUPS // len(layers))
    return "".join(_layer_digits(layer, index * each, each) for index, layer in enumerate(layers))


def _layer_digits(layer: LinearWeight | None, first: int, count: int) -> str:
    if layer is None or not layer.entries:
        return UNKNOWN * count
    chosen = [sampled_blocks(group, layer.entries, count) for group in range(first, first + count)]
    numbers = [number for blocks in chosen for number in blocks]
    sizes = [min(BLOCK, layer.entries - number * BLOCK) for number in numbers]
    symbols = _symbols(layer.read(numbers), sizes)
    size = len(chosen[0])
    groups = [symbols[start : start + size] for start in range(0, len(symbols), size)]
    return "".join(UNKNOWN if None in group else _digit(b"".join(filter(None, group))) for group in groups)


def _digit(symbols: bytes) -> str:
    return hashlib.sha256(symbols).hexdigest()[0]


def _symbols(blocks: Sequence[np.ndarray], sizes: Sequence[int]) -> list[bytes | None]:
    """Of each block 0, 1 or 2 for each entry: its NF4 code is below, at, or above that of zero; None if not finite."""
    if min(sizes) < BLOCK and len(blocks) > 1:  # a short block among them, which is encoded in another way
        return [_symbols([block], [size])[0] for block, size in zip(blocks, sizes, strict=True)]
    stacked = np.stack(blocks)
    finite: np.ndarray = np.full(len(blocks), True)
    if stacked.dtype == np.uint8:
        codes = np.stack([stacked >> 4, stacked & 0xF], axis=-1)
    else:
        values = stacked.astype(np.float32)
        finite = np.asarray(np.isfinite(values).all(axis=1))
        codes, _ = nearest_levels(np.where(finite[:, None], values, 0).reshape(-1))
    rows = (1 + (codes > _ZERO).astype(np.uint8) - (codes < _ZERO)).astype(np.uint8).reshape(len(blocks), -1)
    return [row[: sizes[0]].tobytes() if sound else None for row, sound in zip(rows, finite, strict=True)]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _natural(path: str) -> list[tuple[int, int, str]]:
    """A path to sort by, part by part: numbers by their value, and before other parts."""
    return [(0, int(part), part) if _is_number(part) else (1, 0, part) for part in path.split(".")]
