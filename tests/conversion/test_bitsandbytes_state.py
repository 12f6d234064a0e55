"""The NF4 state of a checkpoint: bitsandbytes' own, through ours, and back into bitsandbytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from conversion.bitsandbytes_state import STATE_KEY, from_bitsandbytes, to_bitsandbytes
from moka_core import ModelError, Nf4Weight, dequantise_nf4, quantise_nf4

OUT, IN = 96, 128
NAME = "model.layers.0.self_attn.q_proj.weight"
State = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def linear(*, double: bool = True, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type=kind, compress_statistics=double)
    weight = torch.tensor(np.random.default_rng(0).standard_normal((OUT, IN)), dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=double)
    return layer.to("cpu")


def state_of(layer: bnb.nn.Linear4bit) -> State:
    return {f"{NAME.removesuffix('weight')}{key}": value.numpy() for key, value in layer.state_dict().items()}


def read_by_bitsandbytes(state: State) -> torch.Tensor:
    """The weight that bitsandbytes decodes from these tensors."""
    tensors = {key.removeprefix(NAME).lstrip("."): torch.tensor(value) for key, value in state.items()}
    data = tensors.pop("")
    parameter = bnb.nn.Params4bit.from_prequantized(data, tensors, device="cpu")
    return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_state_goes_to_ours_and_back_and_bitsandbytes_decodes_the_same_bits(double: bool, dtype: torch.dtype) -> None:
    layer = linear(double=double, dtype=dtype)
    theirs = state_of(layer)
    weight = from_bitsandbytes(NAME, theirs)
    assert weight.shape == (OUT, IN)
    assert weight.dtype == str(dtype).removeprefix("torch.")
    back = to_bitsandbytes(NAME, weight)
    assert set(back) == set(theirs)
    for key, value in theirs.items():
        if key.endswith(STATE_KEY):
            assert json.loads(back[key].tobytes()) == json.loads(value.tobytes())
        else:
            assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape), key
            assert back[key].tobytes() == value.tobytes(), key
    decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(read_by_bitsandbytes(back), decoded)
    ours = torch.tensor(dequantise_nf4(weight)).to(dtype)
    assert torch.equal(ours, decoded)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_what_our_encoder_packs_is_read_by_bitsandbytes_as_we_read_it(double: bool) -> None:
    weight = quantise_nf4(np.random.default_rng(1).standard_normal((OUT, IN)).astype(np.float32), double=double)
    assert np.array_equal(read_by_bitsandbytes(to_bitsandbytes(NAME, weight)).numpy(), dequantise_nf4(weight))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_state_survives_with_every_part(double: bool) -> None:
    weight = quantise_nf4(np.random.default_rng(2).standard_normal((OUT, IN)).astype(np.float32), double=double)
    back = from_bitsandbytes(NAME, to_bitsandbytes(NAME, weight))
    assert (back.shape, back.dtype) == (weight.shape, weight.dtype)
    assert {name: part.tobytes() for name, part in back.parts().items()} == {
        name: part.tobytes() for name, part in weight.parts().items()
    }


def test_the_neighbours_of_a_weight_do_not_matter() -> None:
    state = state_of(linear())
    other = {key.replace("q_proj", "q_proj.weight2"): np.zeros(1, np.uint8) for key in state}
    assert from_bitsandbytes(NAME, {**other, **state}).codes.tobytes() == state[NAME].tobytes()


def good(double: bool = True) -> State:
    weight = quantise_nf4(np.random.default_rng(3).standard_normal((OUT, IN)).astype(np.float32), double=double)
    return to_bitsandbytes(NAME, weight)


def fields(**changes: Any) -> Callable[[State], None]:
    """Other values in the JSON; None takes the field out."""

    def change(state: State) -> None:
        values = {**json.loads(state[f"{NAME}.{STATE_KEY}"].tobytes()), **changes}
        values = {key: value for key, value in values.items() if value is not None}
        state[f"{NAME}.{STATE_KEY}"] = np.frombuffer(json.dumps(values).encode(), np.uint8)

    return change


def raw(data: bytes) -> Callable[[State], None]:
    return lambda state: state.update({f"{NAME}.{STATE_KEY}": np.frombuffer(data, np.uint8)})


def without(*suffixes: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for suffix in suffixes:
            del state[NAME + suffix]

    return change


def part(suffix: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[State], None]:
    return lambda state: state.update({NAME + suffix: function(state[NAME + suffix])})


def poisoned(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[0] = np.nan
    return array


MALFORMED: tuple[tuple[Callable[[State], None], str], ...] = (
    (without(f".{STATE_KEY}"), f"expected {STATE_KEY} beside it (NF4); found {NAME}.absmax, "),
    (raw(b"{"), f"{NAME}.{STATE_KEY}: expected JSON; "),
    (raw(b"\xff\xfe\xfd"), f"{NAME}.{STATE_KEY}: expected JSON; "),
    (raw(b"[" * 200_000), "expected JSON; "),
    (raw(b"[1, 2]"), "expected a JSON object; got [1, 2]"),
    (raw(b'{"shape": ' + b"9" * 5000 + b"}"), "expected JSON; "),
    (without(""), f"{NAME}: missing {NAME}"),
    (without(".absmax", ".quant_map"), f"missing {NAME}.absmax; missing {NAME}.quant_map"),
    (without(".nested_quant_map"), f"missing {NAME}.nested_quant_map"),
    (without(".nested_absmax"), "scales: expected float32 of shape (192,), got uint8"),
    (fields(quant_type="fp4"), "quant_type: expected 'nf4', got 'fp4'"),
    (fields(blocksize=128), "blocksize: expected 64, got 128"),
    (fields(nested_blocksize=None), "nested_blocksize: expected 256, got None"),
    (fields(shape=None), "shape: expected [out, in], got None"),
    (fields(shape=[OUT * IN]), f"shape: expected [out, in], got [{OUT * IN}]"),
    (fields(shape=[OUT, -IN]), "shape: expected [out, in], got [96, -128]"),
    (fields(shape=[True, IN]), "shape: expected [out, in], got [True, 128]"),
    (fields(shape=[OUT, IN * 2]), f"{NAME}: NF4 weight of shape (96, 256): codes: expected uint8 of shape (12288,)"),
    (fields(nested_offset=None), "nested_offset: expected a finite number, got None"),
    (fields(nested_offset=float("nan")), "nested_offset: expected a finite number, got nan"),
    (fields(nested_offset=10**400), "nested_offset: expected a finite number, got 1000"),
    (fields(nested_offset=1e39), "nested_offset: expected a finite number, got 1e+39"),
    (fields(nested_offset="0"), "nested_offset: expected a finite number, got '0'"),
    (fields(dtype="int8"), "dtype: expected float32, bfloat16, float16, got 'int8'"),
    (fields(dtype=["float32"]), "dtype: expected float32, bfloat16, float16, got ['float32']"),
    (part(".quant_map", lambda levels: levels[::-1]), "quant_map: expected the 16 levels of NF4, got others"),
    (part(".quant_map", lambda levels: levels[:8]), "quant_map: expected the 16 levels of NF4, got others"),
    (part("", lambda codes: codes[:-1]), "codes: expected uint8 of shape (6144,), got uint8 of shape (6143,)"),
    (part("", lambda codes: codes.view(np.int8)), "codes: expected uint8 of shape (6144,), got int8"),
    (part(".absmax", lambda absmax: absmax[:-1]), "nested codes: expected uint8 of shape (192,)"),
    (part(".nested_absmax", poisoned), "nested absmax: has NaN or infinite entries"),
    (part(".nested_quant_map", poisoned), "nested levels: has NaN or infinite entries"),
    (part(".nested_quant_map", lambda levels: levels[:16]), "nested levels: expected float32 of shape (256,)"),
)


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=[message[-60:] for _, message in MALFORMED])
def test_a_malformed_state_is_refused_by_message(change: Callable[[State], None], message: str) -> None:
    state = good()
    change(state)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        from_bitsandbytes(NAME, state)
    assert NAME in str(caught.value)


def test_several_faults_of_a_state_are_listed_at_once() -> None:
    state = good()
    without(".quant_map")(state)
    fields(quant_type="fp4", blocksize=128, nested_offset=None)(state)
    with pytest.raises(ModelError) as caught:
        from_bitsandbytes(NAME, state)
    for text in ("missing", "quant_type", "blocksize: expected 64", "nested_offset"):
        assert text in str(caught.value)


def test_a_nan_scale_is_refused() -> None:
    state = good(double=False)
    part(".absmax", poisoned)(state)
    with pytest.raises(ModelError, match="scales: has NaN or infinite entries"):
        from_bitsandbytes(NAME, state)


def test_a_layer_that_bitsandbytes_packed_as_fp4_is_refused() -> None:
    state = state_of(linear(kind="fp4"))
    with pytest.raises(ModelError, match=r"beside it \(NF4\); found .*quant_state\.bitsandbytes__fp4"):
        from_bitsandbytes(NAME, state)


def test_writing_copies_so_that_a_state_cannot_be_changed_through_the_tables() -> None:
    first, second = good(), good()
    first[f"{NAME}.quant_map"][0] = 5
    first[f"{NAME}.nested_quant_map"][0] = 5
    assert isinstance(from_bitsandbytes(NAME, second), Nf4Weight)
    assert second[f"{NAME}.nested_quant_map"][0] != 5
