"""The 4-bit NormalFloat codec in NumPy, bit for bit as bitsandbytes stores it.

Layout: the weight's row-major (out, in) entries in blocks of 64; each block is divided by its largest
absolute value and every entry replaced by the number of the nearest of 16 levels; two 4-bit codes a byte,
the first in the high nibble. Double quantisation stores the blocks' scales as 8-bit codes themselves:
their mean is taken off, and what is left goes to the nearest of 256 levels in blocks of 256.

Ref: arXiv 2305.14314 (NF4 and double quantisation), arXiv 1511.04561 (the 256 levels).
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from moka_core.errors import ModelError

BLOCK = 64
NESTED_BLOCK = 256
DTYPES = ("float32", "bfloat16", "float16")
_PIECE = 2**18  # entries that are encoded at once: whole blocks, small enough for a cache

NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
# Both levels of a byte as one word, by byte: one look-up for two codes.
_LEVEL_PAIRS = np.stack([np.repeat(NF4_LEVELS, 16), np.tile(NF4_LEVELS, 16)], axis=1).view(np.uint64).reshape(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class NestedScales:
    """The scales of a doubly quantised weight.

    Holds: codes is uint8, one for each block of 64; absmax is float32, one for 256 codes; the scale of
    block k is levels[codes[k]]·absmax[k // 256] + offset.
    """

    codes: np.ndarray
    absmax: np.ndarray
    levels: np.ndarray
    offset: np.float32

    def decoded(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The float32 scales of the blocks from `start` to before `stop`, all by default."""
        codes = self.codes[start:stop]
        spread = self.absmax[np.arange(start, start + codes.size) // NESTED_BLOCK]
        return self.levels[codes] * spread + self.offset


@dataclass(frozen=True, kw_only=True, eq=False)
class Nf4Weight:
    """One weight in NF4.

    Holds: codes is flat uint8, ⌈out·in/2⌉ entries; scales is flat float32, one for each block of 64, or
    the same doubly quantised. dtype is what the weight was before, and what a checkpoint says of it.

    Raises:
        ModelError: an array has another dtype, shape or size than the weight's shape asks for, or a scale
            is not finite.
    """

    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray | NestedScales
    dtype: str = "float32"

    def __post_init__(self) -> None:
        entries = math.prod(self.shape)
        blocks = -(-entries // BLOCK)
        expected = [("codes", self.codes, "uint8", -(-entries // 2))]
        if isinstance(self.scales, NestedScales):
            expected += [
                ("nested codes", self.scales.codes, "uint8", blocks),
                ("nested absmax", self.scales.absmax, "float32", -(-blocks // NESTED_BLOCK)),
                ("nested levels", self.scales.levels, "float32", 256),
            ]
        else:
            expected.append(("scales", self.scales, "float32", blocks))
        problems = [
            f"{name}: expected {dtype} of shape ({size},), got {array.dtype} of shape {array.shape}"
            for name, array, dtype, size in expected
            if array.dtype != dtype or array.shape != (size,)
        ]
        if not problems:
            problems = [f"{name}: has NaN or infinite entries" for name, array, *_ in expected if _not_finite(array)]
            if isinstance(self.scales, NestedScales) and not math.isfinite(self.scales.offset):
                problems.append(f"nested offset: expected a finite number, got {self.scales.offset}")
        if problems:
            raise ModelError(f"NF4 weight of shape {self.shape}: " + "; ".join(problems))

    def parts(self) -> dict[str, np.ndarray]:
        """Every stored array by name: what must be equal for two weights to be the same bit for bit."""
        if not isinstance(self.scales, NestedScales):
            return {"codes": self.codes, "absmax": self.scales}
        return {
            "codes": self.codes,
            "absmax": self.scales.codes,
            "nested absmax": self.scales.absmax,
            "nested levels": self.scales.levels,
            "nested offset": np.array(self.scales.offset, np.float32),
        }


def quantise_nf4(weight: np.ndarray, *, double: bool = True) -> Nf4Weight:
    """The weight in NF4.

    code = nearest level to w / max|w| over the entry's block of 64, computed in float32 as bitsandbytes
    does on a CPU (a multiplication by the reciprocal; a tie takes the lower level).

    Args:
        weight: (out, in), float; taken to float32 first.
        double: quantise the scales too. bitsandbytes' offset is torch's own mean, whose last bit depends on
            the order of summation; ours is that order for one thread, which torch keeps up to 32,768 blocks
            (2.1 million weights).

    Raises:
        ModelError: the weight is not a matrix, is empty, or has NaN or infinite entries.

    >>> w = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    >>> bool(abs(dequantise_nf4(quantise_nf4(w)) - w).max() < 0.16)
    True
    """
    if weight.ndim != 2 or not weight.size:
        raise ModelError(f"NF4: expected a matrix (out, in) with entries; got shape {weight.shape}")
    flat = np.ascontiguousarray(weight).reshape(-1)
    codes = np.empty(-(-flat.size // 2), np.uint8)
    absmax = np.empty(-(-flat.size // BLOCK), np.float32)

    def encode(start: int) -> bool:
        """Encode one piece into its place, unless an entry is not finite."""
        piece = flat[start : start + _PIECE].astype(np.float32, copy=False)
        if not np.isfinite(piece).all():
            return False
        levels, scales = nearest_levels(piece)
        codes[start // 2 : start // 2 + len(levels) // 2] = (levels[0::2] << 4) | levels[1::2]
        absmax[start // BLOCK : start // BLOCK + len(scales)] = scales
        return True

    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as threads:  # NumPy lets go of the lock
        finite = list(threads.map(encode, range(0, flat.size, _PIECE)))
    if not all(finite):
        raise ModelError(f"NF4: weight of shape {weight.shape} has NaN or infinite entries")
    shape = (weight.shape[0], weight.shape[1])
    scales = _quantise_scales(absmax) if double else absmax
    dtype = str(weight.dtype) if str(weight.dtype) in DTYPES else "float32"
    return Nf4Weight(shape=shape, codes=codes, scales=scales, dtype=dtype)


def nearest_levels(piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the nearest level for every entry, uint8, padded to an even count, and the scale of every block."""
    full = piece.size // BLOCK * BLOCK
    blocks = piece[:full].reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1, initial=0.0)
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]).reshape(-1)
    if full < piece.size:  # bitsandbytes divides the last, short block instead of multiplying
        last = np.maximum(np.abs(piece[full:]).max(), np.float32(1e-38))
        absmax = np.append(absmax, last)
        scaled = np.append(scaled, piece[full:] / last)
    levels = np.zeros(scaled.size, np.uint8)
    for border in (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2):
        levels += scaled > border
    if levels.size % 2:
        levels = np.append(levels, np.uint8(7))  # the level of 0, which pads an odd count
    return levels, absmax


def dequantise_nf4(weight: Nf4Weight, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The weight that the codes stand for: level[code]·scale of its block; (out, in), float32.

    Args:
        start: the first row to decode; what is decoded in parts is the same bit for bit.
        stop: the row after the last one; None for all.

    >>> packed = quantise_nf4(np.linspace(-1, 1, 192, dtype=np.float32).reshape(4, 48))
    >>> bool((dequantise_nf4(packed, 1, 3) == dequantise_nf4(packed)[1:3]).all())
    True
    """
    out, in_ = weight.shape
    first, last = start * in_, (out if stop is None else min(stop, out)) * in_
    values = _LEVEL_PAIRS[weight.codes[first // 2 : -(-last // 2)]].view(np.float32)[first % 2 :][: last - first]
    begin, end = first // BLOCK, -(-last // BLOCK)
    held = weight.scales
    decoded = held.decoded(begin, end) if isinstance(held, NestedScales) else held[begin:end]
    scales = np.repeat(decoded, BLOCK)[first % BLOCK :][: last - first]
    return (values * scales).reshape(-1, in_)


def _not_finite(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and not np.isfinite(array).all()


@cache
def dynamic_levels() -> np.ndarray:
    """The 256 signed levels of the dynamic 8-bit type, ascending: 0, 1, and for each power of ten from
    1e-6 to 1 the midpoints of an even division of [0.1, 1], of both signs. Ref: arXiv 1511.04561."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive = [float(np.float32(10.0 ** (exponent - 6)) * mean) for mean in means]
        levels += positive + [-level for level in positive]
    table = np.array(sorted(levels), dtype=np.float32)
    table.setflags(write=False)
    return table


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """An even division rounded as torch rounds it: from either end to the middle, one rounding an entry."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    fused = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return fused.astype(np.float32)


@cache
def _scale_table() -> np.ndarray:
    """The nearest of the 256 levels for 65,536 points of [-1, 1]: bitsandbytes' CPU encoder looks it up so."""
    levels = dynamic_levels()
    points = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    return np.searchsorted(np.float32(0.5) * (levels[:-1] + levels[1:]), points, side="left").astype(np.uint8)


def _quantise_scales(scales: np.ndarray) -> NestedScales:
    """The scales, less their mean, as the nearest of 256 levels in blocks of 256."""
    offset = np.float32(_sum_in_torch_order(scales) / np.float32(scales.size))
    blocks = -(-scales.size // NESTED_BLOCK)
    grid = np.zeros((blocks, NESTED_BLOCK), np.float32)
    grid.reshape(-1)[: scales.size] = scales - offset
    absmax = np.abs(grid).max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # subnormal absmax: the inverse is infinite, 0·inf counts as -1
        inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax != 0)
        scaled = np.clip(np.nan_to_num(grid * inverse[:, None], nan=-1.0), np.float32(-1), np.float32(1))
    index = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.uint16)
    codes = np.where(absmax[:, None] == 0, np.uint8(0), _scale_table()[index])
    return NestedScales(codes=codes.reshape(-1)[: scales.size], absmax=absmax, levels=dynamic_levels(), offset=offset)


def _sum_in_torch_order(values: np.ndarray) -> np.float32:
    """The float32 sum in the order in which torch adds on one thread: 8 lanes, 4 rows at once, in cascades."""
    lanes, rows = 8 if values.size >= 8 else 1, 4  # fewer than a vector's worth are added one by one, in 4 rows
    vectors = values[: values.size // lanes * lanes].reshape(-1, lanes)
    steps = len(vectors) // rows
    grid = vectors[: steps * rows].reshape(steps, rows, lanes)
    partial = _cascade(grid)
    for vector in vectors[steps * rows :]:
        partial[0] += vector
    for row in range(1, rows):
        partial[0] += partial[row]
    total = np.float32(0)
    for value in [*values[len(vectors) * lanes :], *partial[0]]:
        total = np.float32(total + value)
    return total


def _cascade(grid: np.ndarray) -> np.ndarray:
    """Sums over the first axis through four levels of accumulators, each fed by the one below."""
    levels = 4
    power = max(4, math.ceil(math.log2(len(grid))) // levels) if len(grid) > 1 else 4
    step = 1 << power
    sums = np.zeros((levels, *grid.shape[1:]), np.float32)
    done = 0
    while done + step <= len(grid):
        for row in grid[done : done + step]:
            sums[0] += row
        done += step
        for level in range(1, levels):
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
            if done & ((step - 1) << (level * power)):
                break
    for row in grid[done:]:
        sums[0] += row
    for level in range(1, levels):
        sums[0] += sums[level]
    return sums[0]
