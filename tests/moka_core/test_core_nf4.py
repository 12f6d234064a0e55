"""The NF4 codec against bitsandbytes on a CPU, bit for bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit

from moka_core import ModelError, Nf4Weight, dequantise_nf4, quantise_nf4
from moka_core.nf4 import BLOCK, NF4_LEVELS, NestedScales, dynamic_levels

# The last block of the first three is short; 3x5, 1x63 and 5x67 have an odd count. 6 blocks (5x67) are fewer than
# torch adds in one vector; 257x64 and 1000x192 need a second nested block, the last one twelve.
SHAPES = [(1, 1), (3, 5), (1, 63), (1, 64), (5, 67), (33, 100), (64, 64), (257, 64), (300, 128), (1000, 192)]
SHAPES += [(1101, 251)]  # encoded in two pieces, of which the last has a short block and an odd count


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    """One thread, since torch's mean depends on their number, and no compilation of bitsandbytes' fallbacks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def theirs(weight: torch.Tensor, *, double: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """bitsandbytes' parts under our names, and what it decodes them to."""
    codes, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    parts = {"codes": codes.numpy().reshape(-1), "absmax": state.absmax.numpy().reshape(-1)}
    if double:
        parts["nested absmax"] = state.state2.absmax.numpy()
        parts["nested levels"] = state.state2.code.numpy()
        parts["nested offset"] = state.offset.numpy()
    return parts, dequantize_4bit(codes, state).float().numpy()


def assert_bit_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        different = np.count_nonzero(found[name].reshape(-1).view(np.uint8) != array.reshape(-1).view(np.uint8))
        assert different == 0, f"{name}: {different} bytes differ"


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-38, 1e-42, 1e30], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_every_part_of_a_packed_weight_is_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], scale: float, double: bool
) -> None:
    weight = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    ours = quantise_nf4(weight, double=double)
    parts, decoded = theirs(torch.tensor(weight), double=double)
    assert_bit_equal(ours.parts(), parts)
    if shape[1] % BLOCK == 0:  # elsewhere bitsandbytes' AVX512 decoder is wrong
        assert_bit_equal({"decoded": dequantise_nf4(ours)}, {"decoded": decoded})


@pytest.mark.parametrize("blocks", range(1, 40))
def test_the_scales_mean_is_added_up_in_torchs_order_for_every_small_count(blocks: int) -> None:
    weight = np.random.default_rng(blocks).standard_normal((blocks, BLOCK)).astype(np.float32)
    parts, _ = theirs(torch.tensor(weight), double=True)
    assert_bit_equal(quantise_nf4(weight).parts(), parts)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_weights_are_packed_as_bitsandbytes_packs_them(kind: str) -> None:
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[kind]
    weight = torch.tensor(np.random.default_rng(3).standard_normal((100, 128)), dtype=getattr(torch, kind))
    ours = quantise_nf4(weight.float().numpy().astype(dtype))
    parts, decoded = theirs(weight, double=True)
    assert_bit_equal(ours.parts(), parts)
    assert ours.dtype == kind
    assert_bit_equal({"decoded": dequantise_nf4(ours).astype(dtype).astype(np.float32)}, {"decoded": decoded})


def zeros_among(shape: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    yield "all zero", np.zeros(shape, np.float32)
    yield "all minus zero", np.full(shape, -0.0, np.float32)
    yield "all equal", np.full(shape, -2.5, np.float32)
    some = np.zeros(shape, np.float32)
    some[0] = rng.standard_normal(shape[1])
    some[-1, 0] = -0.0
    yield "one row", some
    levels = NF4_LEVELS[np.arange(np.prod(shape)) % 16].reshape(shape)
    yield "levels themselves", levels
    ties = ((NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2))[np.arange(np.prod(shape)) % 15].reshape(shape)
    ties[:, 0] = 1.0
    yield "ties", ties.astype(np.float32)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(6, 64), (3, 50), (257, 64)], ids=str)
def test_zero_blocks_and_ties_are_coded_as_bitsandbytes_codes_them(shape: tuple[int, int], double: bool) -> None:
    for name, weight in zeros_among(shape):
        ours = quantise_nf4(weight, double=double)
        parts, decoded = theirs(torch.tensor(weight), double=double)
        assert_bit_equal(
            {f"{name}: {part}": array for part, array in ours.parts().items()},
            {f"{name}: {part}": array for part, array in parts.items()},
        )
        assert np.isfinite(dequantise_nf4(ours)).all()
        if shape[1] % BLOCK == 0:
            assert_bit_equal({name: dequantise_nf4(ours)}, {name: decoded})


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 63), (500, 33)], ids=str)
def test_entries_at_a_threshold_fall_as_in_bitsandbytes(shape: tuple[int, int], double: bool) -> None:
    """Within 2 ulp of threshold·absmax a division gives other codes than a multiplication by 1/absmax."""
    rng = np.random.default_rng(9)
    thresholds = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2)
    weight = np.zeros(shape[0] * shape[1], np.float32)
    for start in range(0, weight.size, BLOCK):
        block = weight[start : start + BLOCK]
        largest = np.float32(rng.uniform(0.5, 2))
        near = (rng.choice(thresholds, block.size) * largest).view(np.int32) + rng.integers(-2, 3, block.size)
        block[:] = near.astype(np.int32).view(np.float32)
        block[0] = largest
    weight = weight.reshape(shape)
    parts, _ = theirs(torch.tensor(weight), double=double)
    assert_bit_equal(quantise_nf4(weight, double=double).parts(), parts)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_an_all_zero_weight_decodes_to_zero(double: bool) -> None:
    assert not dequantise_nf4(quantise_nf4(np.zeros((4, 96), np.float32), double=double)).any()


def test_the_256_levels_are_bitsandbytes_own() -> None:
    assert_bit_equal({"levels": dynamic_levels()}, {"levels": create_dynamic_map().numpy()})
    assert not dynamic_levels().flags.writeable


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_round_trip_moves_no_entry_further_than_half_the_widest_gap(double: bool) -> None:
    """The widest gap between levels is 0.30376, so an entry moves at most 0.15188·absmax. Rounding the scales to
    8 bits adds to that: measured over 20 seeds of this matrix, 0.1519 at most single and 0.1565 at most double."""
    weight = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    decoded = dequantise_nf4(quantise_nf4(weight, double=double))
    absmax = np.repeat(np.abs(weight.reshape(-1, BLOCK)).max(1), BLOCK).reshape(weight.shape)
    moved = float((np.abs(decoded - weight) / absmax).max())
    bound = float(np.diff(NF4_LEVELS).max() / 2) + (0.01 if double else 1e-6)
    assert 0.1 < moved <= bound


def test_quantising_what_was_decoded_changes_nothing() -> None:
    weight = np.random.default_rng(6).standard_normal((32, 128)).astype(np.float32)
    once = quantise_nf4(weight, double=False)
    assert_bit_equal(quantise_nf4(dequantise_nf4(once), double=False).parts(), once.parts())


def test_the_wrong_nibble_order_would_be_seen() -> None:
    weight = np.random.default_rng(7).standard_normal((8, 128)).astype(np.float32)
    ours = quantise_nf4(weight)
    swapped = dataclasses.replace(ours, codes=(ours.codes << 4) | (ours.codes >> 4))
    _, decoded = theirs(torch.tensor(weight), double=True)
    right, wrong = dequantise_nf4(ours), dequantise_nf4(swapped)
    assert np.array_equal(right, decoded)
    assert np.linalg.norm(wrong - decoded) > 0.5 * np.linalg.norm(decoded)


def test_the_weights_memory_order_does_not_matter() -> None:
    weight = np.random.default_rng(8).standard_normal((32, 64)).astype(np.float32)
    turned = np.asfortranarray(weight)
    assert_bit_equal(quantise_nf4(turned).parts(), quantise_nf4(weight).parts())
    assert not np.array_equal(quantise_nf4(weight.T).codes, quantise_nf4(weight).codes)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros(64, np.float32), "expected a matrix (out, in) with entries; got shape (64,)"),
        (np.zeros((2, 2, 2), np.float32), "got shape (2, 2, 2)"),
        (np.zeros((0, 64), np.float32), "got shape (0, 64)"),
        (np.array([[1.0, np.nan]]), "weight of shape (1, 2) has NaN or infinite entries"),
        (np.array([[1.0, -np.inf]]), "has NaN or infinite entries"),
        (np.array([[1.0, 1e39]]), "has NaN or infinite entries"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_cannot_be_packed_is_refused(weight: np.ndarray, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        quantise_nf4(weight)


def nested(**changes: Any) -> NestedScales:
    scales = quantise_nf4(np.ones((2, 128), np.float32)).scales
    assert isinstance(scales, NestedScales)
    return dataclasses.replace(scales, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros(127, np.uint8)}, "codes: expected uint8 of shape (128,), got uint8 of shape (127,)"),
        ({"codes": np.zeros(128, np.int8)}, "codes: expected uint8 of shape (128,), got int8"),
        ({"scales": np.zeros(4, np.float64)}, "scales: expected float32 of shape (4,), got float64"),
        (
            {"scales": np.zeros((4, 1), np.float32)},
            "scales: expected float32 of shape (4,), got float32 of shape (4, 1)",
        ),
        ({"scales": np.full(4, np.nan, np.float32)}, "scales: has NaN or infinite entries"),
        ({"scales": nested(codes=np.zeros(3, np.uint8))}, "nested codes: expected uint8 of shape (4,)"),
        ({"scales": nested(absmax=np.zeros(2, np.float32))}, "nested absmax: expected float32 of shape (1,)"),
        ({"scales": nested(levels=np.zeros(16, np.float32))}, "nested levels: expected float32 of shape (256,)"),
        ({"scales": nested(absmax=np.full(1, np.inf, np.float32))}, "nested absmax: has NaN or infinite entries"),
        ({"scales": nested(offset=np.float32("nan"))}, "nested offset: expected a finite number, got nan"),
        ({"shape": (2, 64)}, "codes: expected uint8 of shape (64,)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_packed_weight_whose_parts_do_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    good = Nf4Weight(shape=(2, 128), codes=np.zeros(128, np.uint8), scales=np.ones(4, np.float32))
    with pytest.raises(ModelError, match=re.escape(message)):
        dataclasses.replace(good, **changes)
