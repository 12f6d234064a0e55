"""How an adapted layer is computed: one product with W + ΔW where that is possible, refusals where it is not."""

from __future__ import annotations

import dataclasses
import json

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from moka_core import ConfigError
from moka_core.execution import EXECUTIONS, plan_execution
from moka_core.oracle import dense_delta, dense_gradients
from moka_torch import MokaConfig, MokaLinear, attach, exact_on_cpu, export_adapter, import_adapter
from tests.cases import CASES, LayerCase, random_layer
from tests.moka_torch.conftest import IDS, logits, random_adapter
from tests.moka_torch.test_torch_linear import fill, layer_of
from tests.moka_torch.tolerances import BFLOAT16, FLOAT32, relative

TOKENS = 37
# 4-bit blocks are of 64 along a row; 48x128 keeps the gradients small enough for FLOAT32
FOUR_BIT = tuple(
    LayerCase(name=f"4-bit, {settings}", out_features=48, in_features=128, settings=settings)
    for settings in (
        {"r": 5, "num_shapes": 2},
        {"r": 3, "gate": "uniform", "scaling": "stable"},
        {"r": 4, "identity": "a", "block_entries": 48},
        {"r": 4, "identity": "b", "zero_factor": "a", "block_entries": 48, "gate": "uniform"},
    )
)


def dense(case, dtype=torch.float32, bias=True) -> nn.Linear:
    return nn.Linear(case.in_features, case.out_features, bias=bias).to(dtype)


def four_bit(case, source=torch.float32, compute: torch.dtype | None = torch.float32, bias=True, nested=True):
    """A 4-bit layer on the CPU, quantised from a weight of dtype `source`."""
    base = bnb.nn.Linear4bit(
        case.in_features,
        case.out_features,
        bias=bias,
        compute_dtype=compute,
        quant_type="nf4",
        compress_statistics=nested,
    )
    base.weight.data = base.weight.data.to(source)
    base = base.to("cpu")
    exact_on_cpu(base)
    assert base.weight.quant_state.dtype == source
    return base


def batch(case, seed=0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, case.in_features, generator=generator).to(dtype).requires_grad_()
    return x, torch.randn(TOKENS, case.out_features, generator=generator).to(dtype)


def oracle(case, seed, weight, bias, x, dy) -> dict[str, np.ndarray]:
    layer, config = random_layer(case, seed), case.config
    x, dy, weight = (tensor.detach().double().numpy() for tensor in (x, dy, weight))
    grads = dense_gradients(layer, config, x, dy)
    if layer.plan.terms == 1:
        grads.pop("gate_logits", None)
    grads["x"] = grads["x"] + dy @ weight
    y = x @ (weight + dense_delta(layer, config)).T
    return {"y": y if bias is None else y + bias.detach().double().numpy(), **grads}


def run(layer, x, dy, call=None) -> dict[str, torch.Tensor]:
    """y and the gradients of a layer, by a function that stands for it if one is given."""
    x.grad = None
    layer.zero_grad()
    y = (layer if call is None else call)(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{name: tensor.grad for name, tensor in layer.tensors("one").items()}}


class Counted:
    """How often the base layer's own product was taken, and how often W was decoded."""

    def __init__(self, monkeypatch) -> None:
        self.products = self.decodes = 0
        for kind in (nn.Linear, bnb.nn.Linear4bit):
            monkeypatch.setattr(kind, "forward", self._counting(kind.forward, "products"))
        functional = bnb.functional
        monkeypatch.setattr(functional, "dequantize_4bit", self._counting(functional.dequantize_4bit, "decodes"))

    def _counting(self, own, counter):
        def counting(*args, **kwargs):
            setattr(self, counter, getattr(self, counter) + 1)
            return own(*args, **kwargs)

        return counting


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_product_with_a_dense_base(case, monkeypatch):
    counted = Counted(monkeypatch)
    for seed in range(3):
        layer, _ = layer_of(case, base=dense(case, bias=seed > 0), seed=seed)
        x, dy = batch(case, seed)
        expected = oracle(case, seed, layer.base_layer.weight, layer.base_layer.bias, x, dy)
        for execution, products in (("merged", 0), ("factored", 1), ("auto", None)):
            counted.products, layer.execution = 0, execution
            found = run(layer, x, dy)
            assert counted.products == products or products is None
            for name, array in expected.items():
                assert relative(found[name], array) <= FLOAT32, (execution, name)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FOUR_BIT, ids=lambda case: case.name)
def test_one_product_with_a_four_bit_base(case, source, monkeypatch):
    """W is decoded to the dtype that the layer multiplies in, twice, whatever it was quantised from."""
    counted = Counted(monkeypatch)
    for seed in range(3):
        base = four_bit(case, source, bias=seed > 0, nested=seed > 1)
        layer, _ = layer_of(case, base=base, seed=seed)
        x, dy = batch(case, seed)
        weight = base(torch.eye(case.in_features)).detach().T - (0 if base.bias is None else base.bias[:, None])
        base.weight.quant_state.dtype = torch.float32
        assert relative(weight, layer.get_base_weight()) <= FLOAT32
        expected = oracle(case, seed, layer.get_base_weight(), base.bias, x, dy)
        base.weight.quant_state.dtype = source
        for execution, products, decodes in (("merged", 0, 2), ("factored", 1, 1)):
            counted.products = counted.decodes = 0
            layer.execution = execution
            found = run(layer, x, dy)
            assert counted.products == products
            if source == torch.float32:
                assert counted.decodes >= decodes
                for name, array in expected.items():
                    assert relative(found[name], array) <= FLOAT32, (execution, name)
            elif execution == "merged":
                assert counted.decodes == decodes
                for name, array in expected.items():  # not the base's own dx, which bitsandbytes rounds to `source`
                    assert relative(found[name], array) <= FLOAT32, (execution, name)


def test_nothing_dense_is_kept():
    case = FOUR_BIT[0]
    layer, _ = layer_of(case, base=four_bit(case))
    x, _ = batch(case)
    stored = sum(tensor.numel() for tensor in layer.tensors("one").values())
    for execution in EXECUTIONS:
        layer.execution = execution
        kept: dict[int, torch.Tensor] = {}

        def pack(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        kept.pop(layer.base_layer.weight.data_ptr(), None)  # the 4-bit codes, which are there anyway
        large = [tensor for tensor in kept.values() if tensor.numel() > stored]
        assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()], execution
        assert sum(tensor.numel() for tensor in kept.values()) <= x.numel() + stored + 8 * case.plan.terms


@pytest.mark.parametrize("make", [dense, four_bit], ids=["dense", "4-bit"])
def test_bfloat16_base(make):
    """W + ΔW is summed in float32 and rounded once, factors have their gradients in float32."""
    for case in FOUR_BIT:
        base = dense(case, torch.bfloat16) if make is dense else four_bit(case, torch.bfloat16, torch.bfloat16)
        layer, _ = layer_of(case, base=base)
        for container in (layer.moka_factor_a, layer.moka_factor_b, layer.moka_gate_logits):
            container.float()
        fill(layer, "one", case, seed=0)
        x, dy = batch(case, dtype=torch.bfloat16)
        if make is four_bit:
            base.weight.quant_state.dtype = torch.float32
        expected = oracle(case, 0, layer.get_base_weight(), base.bias, x, dy)
        for execution in ("merged", "factored"):
            layer.execution = execution
            found = run(layer, x, dy)
            assert found["y"].dtype == found["x"].dtype == torch.bfloat16
            for name, array in expected.items():
                assert name in "xy" or found[name].dtype == torch.float32
                assert relative(found[name].float(), array) <= BFLOAT16[name.partition(".")[0]], (execution, name)


@pytest.mark.parametrize("make", [dense, four_bit], ids=["dense", "4-bit"])
def test_a_small_update_is_not_lost_in_a_bfloat16_weight(make):
    """ΔW of 1 % of W, about a step of bfloat16: what it moves y by is there in full, by the slope of a regression."""
    case = LayerCase(name="small", out_features=256, in_features=256, settings={"r": 4, "num_shapes": 2})
    base = (
        dense(case, torch.bfloat16, False) if make is dense else four_bit(case, torch.bfloat16, torch.bfloat16, False)
    )
    layer, _ = layer_of(case, base=base)
    for container in (layer.moka_factor_a, layer.moka_factor_b):
        container.float()
    with torch.no_grad():
        share = 0.01 * layer.get_base_weight().float().norm() / layer.get_delta_weight("one").norm()
        for factor in layer.factors("one")[1]:
            factor *= share
        x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        moved = x.double() @ layer.get_delta_weight("one").double().T
        for execution in ("merged", "factored"):
            layer.execution = execution
            found = layer(x).double() - base(x).double()
            # measured: 0.998 to 1.000
            assert abs(float((found * moved).sum() / (moved * moved).sum()) - 1) <= 0.01


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_autocast(execution, inside):
    for case in (CASES[0], CASES[13]):
        layer, _ = layer_of(case, base=dense(case))
        layer.execution = execution
        x, dy = batch(case)
        expected = oracle(case, 0, layer.base_layer.weight, layer.base_layer.bias, x, dy)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            if inside:
                y.backward(dy.to(y.dtype))
        if not inside:
            y.backward(dy.to(y.dtype))
        assert y.dtype == torch.bfloat16
        found = {"y": y.detach().float(), "x": x.grad, **{n: t.grad for n, t in layer.tensors("one").items()}}
        for name, array in expected.items():
            assert found[name].dtype == torch.float32
            assert relative(found[name], array) <= BFLOAT16[name.partition(".")[0]], name


def test_the_base_computes_in_the_dtype_that_bitsandbytes_would_take():
    case = FOUR_BIT[0]
    for dtype in (torch.float32, torch.bfloat16):
        called, merged = four_bit(case, compute=None), four_bit(case, compute=None)
        layer, _ = layer_of(case, base=merged)
        layer.execution = "merged"
        x, _ = batch(case, dtype=dtype)
        called(x)
        assert layer(x).dtype == dtype
        assert merged.compute_dtype == called.compute_dtype == dtype
        assert merged.compute_type_is_set


def test_what_keeps_the_base_layer_to_itself(monkeypatch):
    """Dropout, a second adapter, hooks, an absent weight: ΔW then has a product of its own."""
    case = LayerCase(name="plain", out_features=32, in_features=48, settings={"r": 4, "num_shapes": 2})
    counted = Counted(monkeypatch)

    def changed(change) -> tuple[MokaLinear, int]:
        layer, delta = layer_of(case, base=dense(case))
        layer.execution = "merged"
        change(layer)
        counted.products = 0
        x, _ = batch(case)
        with torch.no_grad():
            y = layer(x)
            scale = len(layer.active_adapters)
            expected = layer.base_layer(x).double().numpy() + scale * (x.detach().double().numpy() @ delta.T)
        assert relative(y, expected) <= FLOAT32
        return counted.products - 1

    seen = []

    def second(layer):
        layer.update_layer("two", plan=case.plan, config=case.config)
        fill(layer, "two", case, 0)
        layer.set_adapter(["one", "two"])

    assert changed(lambda layer: None) == 0
    assert changed(lambda layer: layer.base_layer.register_forward_hook(lambda *args: seen.append("after"))) == 1
    assert changed(lambda layer: layer.base_layer.register_forward_pre_hook(lambda *args: seen.append("before"))) == 1
    assert set(seen) == {"after", "before"}
    assert changed(second) == 1


def test_a_base_weight_that_is_trained_gets_its_gradient_through_the_one_product(monkeypatch):
    case = LayerCase(name="plain", out_features=32, in_features=48, settings={"r": 4, "num_shapes": 2})
    counted = Counted(monkeypatch)
    layer, delta = layer_of(case, base=dense(case))
    layer.base_layer.requires_grad_()
    layer.execution = "merged"
    counted.products = 0
    x, dy = batch(case)
    y = layer(x)
    assert counted.products == 0  # of the base layer's own
    y.backward(dy)
    weight = layer.base_layer.weight
    expected = x.detach().double().numpy() @ (weight.detach().double().numpy() + delta).T
    assert relative(y.detach(), expected + layer.base_layer.bias.detach().double().numpy()) <= FLOAT32
    assert relative(weight.grad, dy.double().numpy().T @ x.detach().double().numpy()) <= FLOAT32
    assert relative(layer.base_layer.bias.grad, dy.double().numpy().sum(0)) <= FLOAT32


def test_dropout_has_the_same_answer_in_every_execution():
    case = LayerCase(name="drop", out_features=64, in_features=64, settings={"r": 4, "num_shapes": 2, "dropout": 0.25})
    for base in (dense(case), four_bit(case)):
        layer, delta = layer_of(case, base=base)
        layer.train()
        x, dy = batch(case)
        torch.manual_seed(3)
        mask = nn.functional.dropout(torch.ones_like(x), 0.25).double().numpy()
        weight = layer.get_base_weight().double().numpy()
        bias = base.bias.detach().double().numpy()
        given = x.detach().double().numpy() * mask
        expected = dense_gradients(random_layer(case), case.config, given, dy.numpy())
        expected["x"] = expected["x"] * mask + dy.double().numpy() @ weight
        expected["y"] = given @ delta.T + x.detach().double().numpy() @ weight.T + bias
        for execution in EXECUTIONS:
            layer.execution = execution
            torch.manual_seed(3)
            found = run(layer, x, dy)
            for name, array in expected.items():
                assert relative(found[name], array) <= FLOAT32, (execution, name)


def test_dropout_that_a_trainer_changes_in_place():
    case = LayerCase(name="drop", out_features=16, in_features=16, settings={"r": 2, "num_shapes": 1, "dropout": 0.5})
    layer, delta = layer_of(case)
    layer.train()
    x, _ = batch(case)
    base = layer.base_layer(x).double()
    layer.moka_dropout["one"].p = 0.0
    assert relative((layer(x).double() - base).detach(), x.detach().double().numpy() @ delta.T) <= 2e-6
    layer.moka_dropout["one"].p = 0.9
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x.detach().double(), 0.9)
    torch.manual_seed(0)
    assert relative((layer(x).double() - base).detach(), dropped.numpy() @ delta.T) <= 2e-6
    layer.moka_dropout["one"].p = 1.0  # 1/(1 - p) would be infinite
    with pytest.raises(ConfigError, match=r"dropout: expected 0 <= dropout < 1; got 1\.0"):
        layer(x)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_merged_by_name_is_refused_where_it_cannot_be(load, settings):
    case = CASES[0]
    eight_bit = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
    replaced = dense(case)
    replaced.forward = replaced.forward  # as accelerate does
    subclass = type("OwnLinear", (nn.Linear,), {})(64, 64)
    x, _ = batch(case)
    for base, reason in (
        (eight_bit, "it is a Linear8bitLt, which multiplies in a way of its own"),
        (replaced, "its forward was replaced on this instance"),
        (subclass, "it is a OwnLinear, which"),
    ):
        layer, _ = layer_of(case, base=base)
        layer.execution = "merged"
        with pytest.raises(ConfigError, match=rf"(?s)use 'factored' or 'auto'\n  this layer: {reason}"):
            layer(x)
        layer.execution = None
        layer(x)
        with pytest.raises(ConfigError, match="'merged' puts W"):
            layer(x, execution="merged")
        layer.moka_config["one"] = dataclasses.replace(case.config, execution="merged")
        with pytest.raises(ConfigError, match="'merged' puts W"):
            layer(x)
        layer(x, execution="factored")

    model = load()
    for block in model.model.layers:
        block.self_attn.v_proj = type("OwnLinear", (nn.Linear,), {})(64, 32, bias=False)
    with pytest.raises(ConfigError) as caught:
        attach(model, settings, execution="merged")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert not any(isinstance(module, MokaLinear) for module in model.modules())
    attach(model, settings, execution="factored")


def test_unknown_executions_are_refused(load, settings):
    layer, _ = layer_of(CASES[0])
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'fast'"):
        layer.execution = "fast"  # type: ignore[assignment]
    assert layer.execution is None
    with pytest.raises(ConfigError, match="expected one of auto, factored, merged; got 'quick'"):
        layer(torch.randn(2, 64), execution="quick")  # type: ignore[arg-type]
    for name, message in (("fast", "expected one of auto, factored, merged; got 'fast'"), ("dense", "in float64")):
        with pytest.raises(ConfigError, match=message):
            MokaConfig(execution=name)
        with pytest.raises(ConfigError, match=message):
            attach(load(), settings, execution=name)  # type: ignore[arg-type]


def test_execution_is_the_calls_or_the_layers_or_the_configs(monkeypatch):
    case = CASES[0]
    counted = Counted(monkeypatch)
    assert plan_execution(case.plan, case.config, TOKENS, own_product=False).forward == "merged"
    for config, attribute, call, products in (
        ("auto", None, None, 0), ("merged", None, None, 0), ("factored", None, None, 1),
        ("merged", "factored", None, 1), ("factored", "merged", None, 0), ("factored", "auto", None, 0),
        ("merged", None, "factored", 1), ("factored", "factored", "merged", 0), ("merged", "merged", "factored", 1),
    ):  # fmt: skip
        layer, _ = layer_of(case)
        layer.moka_config["one"] = dataclasses.replace(case.config, execution=config)
        layer.execution = attribute
        counted.products = 0
        layer(batch(case)[0], execution=call)
        assert counted.products == products, (config, attribute, call)
        assert layer.execution == attribute


@pytest.mark.parametrize("bits", [None, 4])
def test_execution_of_a_whole_model(load, settings, bits, tmp_path):
    """The same logits and loss by every execution; what is exported and saved says what was trained, not how."""
    adapter = random_adapter(load(bits), settings)
    found, losses = {}, {}
    for execution in EXECUTIONS:
        model = import_adapter(load(bits), adapter, execution=execution).eval()
        config = model.peft_config["default"]
        assert config.execution == execution
        assert {layer.moka_config["default"].execution for layer in adapted(model)} == {execution}
        found[execution] = logits(model)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses[execution] = loss.item()
        assert export_adapter(model).config.execution == "auto"
        model.save_pretrained(tmp_path)
        assert "execution" not in json.loads((tmp_path / "adapter_config.json").read_text())
        assert PeftConfig.from_pretrained(tmp_path).execution == "auto"
    for execution in EXECUTIONS:
        assert relative(found[execution], found["auto"]) <= 5e-6  # measured 1.0e-6
        assert losses[execution] == pytest.approx(losses["auto"], rel=1e-6)
    model = attach(load(bits), settings, execution="merged")
    assert {layer.moka_config["default"].execution for layer in adapted(model)} == {"merged"}
    assert settings.execution == "auto"
    model = get_peft_model(load(bits), MokaConfig.from_core(dataclasses.replace(settings, execution="factored")))
    assert {layer.moka_config["default"].execution for layer in adapted(model)} == {"factored"}


def test_execution_in_a_file_is_an_unknown_key(tmp_path):
    MokaConfig(target_modules=["q_proj"], execution="merged").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "execution": "merged"}))
    with pytest.raises(ConfigError, match=r"adapter_config\.json: unknown 'execution'"):
        MokaConfig.from_pretrained(tmp_path)


def adapted(model) -> list[MokaLinear]:
    return [module for module in model.modules() if isinstance(module, MokaLinear)]


def test_a_base_weight_that_changes_before_the_backward_is_an_error_and_not_another_gradient():
    """W is decoded again for the backward: from a tensor that torch has saved, and so checks."""
    case = CASES[0]
    layer, _ = layer_of(case)
    layer.execution = "merged"
    x = torch.randn(5, case.in_features, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer(x).sum().backward()
    assert x.grad is not None
