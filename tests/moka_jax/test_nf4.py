"""NF4 in JAX: decoded bit for bit as NumPy and bitsandbytes decode it, wherever the compiler puts it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moka_core import ModelError, Nf4Weight, dequantise_nf4, quantise_nf4
from moka_core.nf4 import NESTED_BLOCK, NestedScales
from moka_jax import Nf4Linear
from moka_jax.nf4 import FrozenWeight
from moka_jax.stack import Stack

SHAPES = [(96, 192), (320, 128)]  # 288 and 640 blocks: more than one block of 256 scales
RAGGED = [(10, 96), (7, 33), (3, 5)]  # a block of 64 crosses rows; an odd count; less than one block

# what a compiler that optimises makes of the code is the point: it fuses roundings (see `decode_scales`)
pytestmark = pytest.mark.usefixtures("optimised")


def random_weight(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, so that the scales of the blocks differ."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)


def assert_same_bits(found, expected) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    different = int((found.view(np.uint32) != expected.view(np.uint32)).sum())
    assert different == 0, f"{different} of {found.size} entries differ"


def decoded_under_jit(layer: Nf4Linear) -> jax.Array:
    graphdef, state = nnx.split(layer)
    return jax.jit(lambda state: nnx.merge(graphdef, state).decoded())(state)


def to_bitsandbytes(weight: Nf4Weight, functional, torch):
    """The packed weight and its state as bitsandbytes holds them."""
    code = functional.get_4bit_type("nf4", device="cpu")
    scales = weight.scales
    settings = {"shape": torch.Size(weight.shape), "code": code, "blocksize": 64, "quant_type": "nf4"}
    if isinstance(scales, NestedScales):
        nested = functional.QuantState(
            absmax=torch.tensor(scales.absmax),
            code=torch.tensor(scales.levels),
            blocksize=256,
            dtype=torch.float32,
        )
        state = functional.QuantState(
            absmax=torch.tensor(scales.codes),
            offset=torch.tensor(scales.offset),
            state2=nested,
            dtype=torch.float32,
            **settings,
        )
    else:
        state = functional.QuantState(absmax=torch.tensor(scales), dtype=torch.float32, **settings)
    return torch.tensor(weight.codes)[:, None], state


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_under_jit_is_bit_equal_to_numpy_and_to_bitsandbytes(shape, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    weight = quantise_nf4(random_weight(shape), double=double)
    found = decoded_under_jit(Nf4Linear.from_nf4(weight))
    assert_same_bits(found, dequantise_nf4(weight))
    packed, state = to_bitsandbytes(weight, functional, torch)
    assert_same_bits(found, functional.dequantize_4bit(packed, state).numpy())


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_blocks_that_cross_rows_are_bit_equal_to_numpy(shape, double):
    """Our codec only: bitsandbytes decodes these wrongly on a CPU with AVX512."""
    weight = quantise_nf4(random_weight(shape), double=double)
    layer = Nf4Linear.from_nf4(weight)
    assert_same_bits(decoded_under_jit(layer), dequantise_nf4(weight))
    assert_same_bits(layer.decoded(), dequantise_nf4(weight))


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("shape", [(192, 192), (10, 10)], ids=str)
def test_decoding_inside_a_scan_is_bit_equal_forward_and_backward(shape, remat):
    """y_l = W_l is handed out of the scan; the backward pass of Σ x W_l decodes again if recomputed."""

    class Block(nnx.Module):
        def __init__(self, weights):
            self.linear = Nf4Linear.from_nf4(weights)

        def __call__(self, x, own):
            return self.linear(x), self.linear.decoded()

    weights = [quantise_nf4(random_weight(shape, seed)) for seed in range(3)]
    graphdef, state = nnx.split(Stack(Block(weights), 3, remat=remat))
    x = jnp.eye(shape[1])

    @jax.jit
    def both(state, x):
        (y, decoded), pull = jax.vjp(lambda x: nnx.merge(graphdef, state)(x), x)
        return y, decoded, pull((jnp.ones_like(y), jnp.zeros_like(decoded)))[0]

    y, decoded, dx = both(state, x)
    for layer, weight in enumerate(weights):
        assert_same_bits(decoded[layer], dequantise_nf4(weight))
    chain = np.linalg.multi_dot([dequantise_nf4(weight).astype(np.float64).T for weight in weights])
    np.testing.assert_allclose(y, chain, rtol=0, atol=1e-5 * np.abs(chain).max())
    expected = np.ones((shape[1], 1)) * chain.sum(axis=1)[None]
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_these_weights_tell_one_rounding_from_two():
    """A compiler that fuses product and sum of the nested scales into one rounding gives other bits here.

    So the tests above fail if `decode_scales` loses its guard (they do: without it XLA fuses on a CPU).
    """
    for shape in (*SHAPES, (192, 192), (10, 96)):
        scales = quantise_nf4(random_weight(shape)).scales
        assert isinstance(scales, NestedScales)
        spread = np.repeat(scales.absmax, NESTED_BLOCK)[: scales.codes.size]
        exact = scales.levels[scales.codes].astype(np.float64) * spread + np.float64(scales.offset)
        assert (exact.astype(np.float32) != scales.decoded()).any(), shape


def test_nested_scales_come_back_from_jax_as_they_went_in():
    weights = [quantise_nf4(random_weight((96, 192), seed), double=True) for seed in range(2)]
    ragged = quantise_nf4(random_weight((7, 33)), double=False)
    stacked = Nf4Linear.from_nf4(weights)
    pairs = [(Nf4Linear.from_nf4(weights[0]).to_nf4(), weights[0]), (Nf4Linear.from_nf4(ragged).to_nf4(), ragged)]
    pairs += [(stacked.to_nf4(layer), weights[layer]) for layer in range(2)]
    for found, expected in pairs:
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert found.parts().keys() == expected.parts().keys()
        for name, array in expected.parts().items():
            assert (found.parts()[name].dtype, found.parts()[name].shape) == (array.dtype, array.shape), name
            assert found.parts()[name].tobytes() == array.tobytes(), name


def test_the_dtype_that_a_checkpoint_says_survives():
    weight = dataclasses.replace(quantise_nf4(random_weight((8, 64))), dtype="bfloat16")
    assert Nf4Linear.from_nf4(weight).to_nf4().dtype == "bfloat16"
    assert Nf4Linear.from_nf4([weight, weight]).to_nf4(1).dtype == "bfloat16"


@pytest.mark.parametrize("shape", [(48, 128), (7, 33)], ids=str)
def test_output_with_bias_matches_float64(shape):
    weight, rng = quantise_nf4(random_weight(shape)), np.random.default_rng(5)
    bias, x = rng.standard_normal(shape[0]).astype(np.float32), rng.standard_normal((2, 3, shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ dequantise_nf4(weight).astype(np.float64).T
    y = Nf4Linear.from_nf4(weight, bias=bias)(jnp.asarray(x))
    assert y.shape == (2, 3, shape[0])
    np.testing.assert_allclose(y, expected + bias, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(
        Nf4Linear.from_nf4(weight)(jnp.asarray(x)), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
    )


def test_in_bfloat16_the_decoded_weight_is_rounded_once_and_the_output_is_bfloat16():
    weight, rng = quantise_nf4(random_weight((48, 128))), np.random.default_rng(6)
    bias = rng.standard_normal(48).astype(np.float32)
    layer = Nf4Linear.from_nf4(weight, bias=bias, dtype=jnp.bfloat16)
    assert layer.decoded().dtype == jnp.float32
    for dtype in (jnp.float32, jnp.bfloat16):
        assert layer(jnp.ones((2, 128), dtype)).dtype == jnp.bfloat16
    y = layer(jnp.eye(128, dtype=jnp.bfloat16))  # one product a sum: only the weight's rounding and the bias' show
    rounded = jnp.asarray(dequantise_nf4(weight)).astype(jnp.bfloat16).T + jnp.asarray(bias).astype(jnp.bfloat16)
    assert (np.asarray(y, np.float32) == np.asarray(rounded, np.float32)).all()


def test_nothing_of_a_packed_layer_is_a_trainable_parameter():
    layer = Nf4Linear.from_nf4(quantise_nf4(random_weight((8, 64))), bias=np.ones(8, np.float32))
    assert jax.tree.leaves(nnx.state(layer, nnx.Param)) == []
    kinds = {type(variable) for _, variable in nnx.iter_graph(layer) if isinstance(variable, nnx.Variable)}
    assert kinds == {FrozenWeight}


def test_weights_that_cannot_be_stacked_are_refused():
    one = quantise_nf4(random_weight((8, 64)))
    others = [quantise_nf4(random_weight((16, 64))), quantise_nf4(random_weight((8, 64)), double=False)]
    for other in (*others, dataclasses.replace(one, dtype="float16")):
        with pytest.raises(ModelError, match="expected stacked weights of one shape and dtype, all singly or all"):
            Nf4Linear.from_nf4([one, other])
