"""The PEFT layer on its own: start, forward, merging, several adapters."""

from __future__ import annotations

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn

from moka_core import AdapterError, ConfigError, KronShape, LayerPlan, MokaConfig, ShapeGroup, plan_layer
from moka_core.oracle import dense_delta
from moka_torch import MokaLinear
from tests.cases import CASES, LayerCase, random_layer
from tests.moka_torch.tolerances import relative


def layer_of(case: LayerCase, base: nn.Module | None = None, seed=0) -> tuple[MokaLinear, np.ndarray]:
    """An adapted layer with random factors, and its ΔW by the oracle."""
    base = nn.Linear(case.in_features, case.out_features) if base is None else base
    layer = MokaLinear(base, "one", plan=case.plan, config=case.config)
    layer.base_layer.requires_grad_(False)
    fill(layer, "one", case, seed)
    return layer.eval(), dense_delta(random_layer(case, seed), case.config)


def fill(layer: MokaLinear, name: str, case: LayerCase, seed: int) -> None:
    with torch.no_grad():
        for key, array in random_layer(case, seed).tensors():
            layer.tensors(name)[key].copy_(torch.tensor(array))


@pytest.mark.parametrize("execution", ["factored", "merged", "auto"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_merge_and_disable(case, execution):
    layer, delta = layer_of(case)
    layer.execution = execution
    x = torch.randn(4, case.in_features)
    with torch.no_grad():
        base = layer.base_layer(x)
        adapted = layer(x)
        assert relative(adapted - base, x.numpy() @ delta.T) <= 2e-6  # measured over 20 seeds: 2.8e-7
        assert relative(layer.get_delta_weight("one"), delta) <= 1e-6

        layer.enable_adapters(False)
        assert torch.equal(layer(x), base)
        layer.enable_adapters(True)

        layer.merge(safe_merge=True)
        assert layer.merged
        assert relative(layer(x), adapted) <= 2e-6  # measured over 20 seeds: 3.9e-7
        layer.enable_adapters(False)
        assert relative(layer(x), base) <= 1e-5  # unmerged by the call; exact up to rounding
        assert not layer.merged


@pytest.mark.parametrize("zero_factor", ["a", "b"])
def test_start(zero_factor):
    groups = (ShapeGroup(KronShape(40, 25, 25, 40), 30),)
    config = MokaConfig(
        r=30, shapes=(LayerPlan(out_features=1000, in_features=1000, groups=groups),), zero_factor=zero_factor
    )
    layer = MokaLinear(nn.Linear(1000, 1000), "one", plan=config.shapes[0], config=config)
    factor_a, factor_b, logits = layer.factors("one")
    zero, other = (factor_a, factor_b) if zero_factor == "a" else (factor_b, factor_a)
    assert not zero[0].any()
    assert not logits.any()
    assert not layer.get_delta_weight("one").any()
    bound = 1 / np.sqrt(other[0].shape[-1])  # Kaiming-uniform, a = sqrt(5), fan-in = the factor's own columns
    assert bound * 0.999 < other[0].abs().max() <= bound
    assert torch.unique(other[0][:, 0, 0]).numel() == 30, "copies must be drawn independently"
    generator = torch.Generator().manual_seed(7)
    layer.reset_parameters("one", generator)
    first = other[0].clone()
    layer.reset_parameters("one", generator.manual_seed(7))
    assert torch.equal(other[0], first)


def test_several_adapters_are_summed_and_may_differ_in_everything():
    one = next(case for case in CASES if case.name == "identity a")
    two = next(case for case in CASES if case.name == "identity b")
    layer, delta_one = layer_of(one)
    layer.update_layer("two", plan=two.plan, config=two.config)
    fill(layer, "two", two, seed=5)
    delta_two = dense_delta(random_layer(two, 5), two.config)
    x = torch.randn(4, one.in_features)
    with torch.no_grad():
        base = layer.base_layer(x)
        for active, delta in ((["one"], delta_one), (["two"], delta_two), (["one", "two"], delta_one + delta_two)):
            layer.set_adapter(active)
            assert relative(layer(x) - base, x.numpy() @ delta.T) <= 2e-5
        adapted = layer(x)
        layer.merge()
        assert layer.merged_adapters == ["one", "two"]
        assert relative(layer(x), adapted) <= 1e-6
        layer.unmerge()
        layer.delete_adapter("one")
        assert relative(layer(x) - base, x.numpy() @ delta_two.T) <= 2e-5
    assert set(layer.moka_plan) == set(layer.moka_factor_a) == {"two"}


def test_dropout_is_on_the_input_of_delta_only():
    case = LayerCase(name="drop", out_features=16, in_features=16, settings={"r": 2, "num_shapes": 1, "dropout": 0.5})
    layer, _ = layer_of(case)
    x = torch.randn(64, 16)
    base = layer.base_layer(x)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert relative(layer(x).detach() - base.detach(), (dropped @ layer.get_delta_weight("one").T).numpy()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    """A half-precision base with a float32 adapter: ΔW x in float32, the sum rounded once to the base's dtype."""
    case = CASES[0]
    layer, delta = layer_of(case, base=nn.Linear(64, 64).to(dtype))
    for container in (layer.moka_factor_a, layer.moka_factor_b, layer.moka_gate_logits):
        container.float()
    fill(layer, "one", case, seed=0)
    x = torch.randn(4, 64, dtype=dtype)
    with torch.no_grad():
        y = layer(x)
        expected = layer.base_layer(x).float() + x.float() @ torch.tensor(delta, dtype=torch.float32).T
    assert y.dtype == dtype
    assert relative(y.float(), expected.numpy()) <= torch.finfo(dtype).eps
    layer.merge()
    assert layer.base_layer.weight.dtype == dtype


def test_safe_merge_leaves_the_base_alone():
    layer, _ = layer_of(CASES[0])
    with torch.no_grad():
        layer.moka_factor_a["one"]["0"][0, 0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(
        AdapterError, match=r"NaNs detected in the merged weights\. The adapter one seems to be broken: .* has NaN or"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_eight_bit_base():
    case = CASES[0]
    base = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    base.load_state_dict({"weight": torch.randn(64, 64)})
    layer, delta = layer_of(case, base=base.to("cpu"))
    x = torch.randn(4, 64)
    with torch.no_grad():
        base_y = layer.base_layer(x)
        assert relative(layer(x) - base_y, x.numpy() @ delta.T) <= 1e-5
        before = layer.get_base_weight().clone()
        with pytest.warns(UserWarning, match="merging into a bnb 8bit layer encodes it again"):
            layer.merge()
        # rows rounded to 8 bits: measured 0.6 %
        assert relative(layer.get_base_weight(), before.numpy() + delta) <= 0.02


def test_refusals():
    case = CASES[0]
    layer, _ = layer_of(case)
    with pytest.raises(ConfigError, match=r"Length of `adapter_names` should be the same .*, but got 2 and 3"):
        layer(torch.randn(3, 64), adapter_names=["one", "two"])
    with pytest.raises(ConfigError, match=r"x: expected \(\.\.\., 64\); got \(4, 32\)"):
        layer(torch.randn(4, 32), execution="merged")
    config = MokaConfig(r=1)
    with pytest.raises(ConfigError, match="adapter 'two': expected a plan for 64x64; got 8x8"):
        layer.update_layer("two", plan=plan_layer(config, 8, 8), config=config)
