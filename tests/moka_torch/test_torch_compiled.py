"""torch.compile: one graph, the same numbers as without it, and compiled again when what is computed has changed.

Dense layers whose execution is named stand in `test_torch_transforms`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from moka_torch import MokaConfig, MokaLinear
from tests.cases import CASES, LayerCase
from tests.moka_torch.conftest import IDS
from tests.moka_torch.test_torch_execution import FOUR_BIT, TOKENS, batch, dense, four_bit, run
from tests.moka_torch.test_torch_linear import fill, layer_of
from tests.moka_torch.tolerances import relative

# The same operations in the same order: measured 0 in every test here with the backend aot_eager.
SAME = 1e-7
# Fused and reordered by inductor: measured 4.0e-8 factored, 1.3e-7 merged. In a whole model 6.4e-7 for the factors and
# 2.2e-6 for the logits, sums that nearly cancel; against float64 theirs are off by 2.3e-6 compiled, by 1.2e-6 not.
FUSED = 1e-6
FUSED_MODEL = 1e-5
SMALL = LayerCase(name="small", out_features=24, in_features=36, settings={"r": 3, "num_shapes": 2})
EXECUTIONS = ("auto", "factored", "merged")

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="inductor writes C++ and compiles it: there is neither g++ nor clang++, and CXX names no other",
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Nothing compiled before counts here, nor afterwards."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        yield
    torch._dynamo.reset()


class Counting:
    """The backend aot_eager, and how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0
        self._inner = torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self._inner(module, inputs)


def compiled(module: nn.Module) -> tuple[Callable[..., Any], Counting]:
    """`module` compiled as one graph: a break in it is an error."""
    backend = Counting()
    return torch.compile(module, fullgraph=True, backend=backend), backend


def check(
    layer: MokaLinear,
    call: Callable[..., Any],
    case: LayerCase,
    *,
    tokens: int = TOKENS,
    within: float = SAME,
    context: Any = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """Compare y and every gradient of two batches with those of the layer itself, and return the last."""
    found: dict[str, Tensor] = {}
    for seed in range(2):
        x, dy = (tensor.detach()[:tokens].clone() for tensor in batch(case, seed))
        x.requires_grad_()
        results = []
        for function in (layer, call):
            torch.manual_seed(3)
            with context():
                results.append(run(layer, x, dy, function))
        expected, found = ({n: t.float() for n, t in result.items() if t is not None} for result in results)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert relative(found[name], tensor) <= within, name
    return found


@pytest.mark.parametrize("case", [SMALL, *FOUR_BIT[2:]], ids=lambda case: case.name)
def test_auto_on_a_dense_base(case):
    layer, _ = layer_of(case, base=dense(case))
    call, backend = compiled(layer)
    check(layer, call, case)
    assert backend.graphs == 1


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_four_bit_base(execution):
    """bitsandbytes' own operators stand in the graph."""
    case = FOUR_BIT[0]
    layer, _ = layer_of(case, base=four_bit(case))
    layer.execution = execution
    call, backend = compiled(layer)
    check(layer, call, case)
    assert backend.graphs == 1


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dropout(execution):
    """The same entries are dropped as without it; not the same ones in the next call; none in eval mode."""
    case = LayerCase(**{**vars(SMALL), "settings": {**SMALL.settings, "dropout": 0.5}})
    layer, _ = layer_of(case)
    layer.train()
    layer.execution = execution
    call, backend = compiled(layer)
    dropped = check(layer, call, case)["y"]
    x, _ = batch(case, 1)
    assert not torch.equal(call(x), call(x))
    assert backend.graphs == 1
    layer.eval()
    assert relative(check(layer, call, case)["y"], dropped) > 0.1
    assert torch.equal(call(x), call(x))
    if execution == "auto":
        dropout: Any = layer.train().moka_dropout["one"]
        dropout.p = 0.25
        assert relative(check(layer, call, case)["y"], dropped) > 0.1


def test_a_change_of_what_is_computed_is_noticed():
    """Other adapters, scales, executions, adapters off or merged: compiled anew where needed, and never stale."""
    one, two = (next(case for case in CASES if case.name == name) for name in ("identity a", "identity b"))
    layer, _ = layer_of(one)
    layer.update_layer("two", plan=two.plan, config=two.config)
    fill(layer, "two", two, seed=5)
    call, backend = compiled(layer)
    x, _ = batch(one, 1)
    known: list[Tensor] = []

    def changed() -> None:
        y = check(layer, call, one)["y"]
        assert all(relative(y, other) > 1e-2 for other in known)
        known.append(y)

    changed()
    for active in (["one", "two"], ["two"]):
        layer.set_adapter(active)
        changed()
    assert backend.graphs == 3
    layer.set_adapter(["one"])
    assert torch.equal(check(layer, call, one)["y"], known[0])
    assert backend.graphs == 3, "what was compiled before is used again"
    for scale in (2.0, 3.0, -1.5):
        layer.set_scale("one", scale)
        changed()
    assert backend.graphs == 4, "a scale is an input of the graph"
    layer.set_scale("one", 1.0)
    layer.enable_adapters(False)
    base = layer.base_layer(x)
    assert torch.equal(call(x), base)
    layer.enable_adapters(True)
    with torch.no_grad():
        layer.merge()
        assert torch.equal(call(x), layer.base_layer(x))
        assert relative(call(x), known[0]) <= 1e-5
        layer.unmerge()
    for execution in ("factored", "merged", None):
        layer.execution = execution
        check(layer, call, one)


def test_numbers_of_tokens():
    """A second number makes them symbolic: further ones are compiled for at most where the cost model decides anew."""
    layer, _ = layer_of(SMALL)
    call, backend = compiled(layer)
    for tokens in (37, 5, 7, 20, 1):
        check(layer, call, SMALL, tokens=tokens)
    assert backend.graphs <= 4  # one for 37, one for few tokens, one for more, one for a single token


def test_what_a_call_is_given():
    one, two = (next(case for case in CASES if case.name == name) for name in ("identity a", "identity b"))
    layer, _ = layer_of(one)
    layer.update_layer("two", plan=two.plan, config=two.config)
    fill(layer, "two", two, seed=5)
    call, _ = compiled(layer)
    x = batch(one)[0].detach()[:4]
    names = ["one", "__base__", "two", "one"]
    y = layer(x, adapter_names=names)
    assert relative(call(x, adapter_names=names).detach(), y.detach()) <= SAME
    assert torch.equal(y[1], layer.base_layer(x)[1])
    assert relative(y.detach(), layer(x).detach()) > 1e-2
    for execution in ("factored", "merged"):
        expected = layer(x, execution=execution)
        assert relative(call(x, execution=execution).detach(), expected.detach()) <= SAME


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_autocast(execution):
    layer, _ = layer_of(SMALL)
    layer.execution = execution
    call, _ = compiled(layer)
    plain = check(layer, call, SMALL)["y"]
    rounded = check(layer, call, SMALL, context=lambda: torch.autocast("cpu", torch.bfloat16))["y"]
    assert 1e-4 < relative(rounded, plain) < 2e-2  # in bfloat16, which is 2e-3 a rounding


def training(model: nn.Module, call: Callable[..., Any]) -> dict[str, Tensor]:
    """The logits and every gradient of one batch."""
    model.zero_grad()
    torch.manual_seed(0)
    out = call(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **grads}


def check_model(model: nn.Module, call: Callable[..., Any], within: float) -> None:
    expected, found = training(model, model), training(model, call)
    assert len(expected) > 4
    for name, tensor in expected.items():
        assert relative(found[name], tensor) <= within, name


def adapted(base: nn.Module, **changes: Any):
    torch.manual_seed(1)
    settings = {"r": 3, "num_shapes": 2, "dropout": 0.0, "init_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(base, MokaConfig(**{**settings, **changes})).train()


@pytest.mark.parametrize(
    ("bits", "changes"),
    [(None, {"execution": "merged"}), pytest.param(4, {"dropout": 0.1}, marks=pytest.mark.slow)],
)
def test_a_whole_model(load, bits, changes):
    """LLaMA under PEFT, one graph for all of it; again with another adapter."""
    model = adapted(load(bits=bits), **changes)
    call, backend = compiled(model)
    check_model(model, call, SAME)
    assert backend.graphs == 1
    if bits is None:
        before = training(model, call)["logits"]
        model.add_adapter("two", MokaConfig(r=2, dropout=0.0, init_weights=False, identity="a"))
        model.set_adapter("two")
        check_model(model, call, SAME)
        assert relative(training(model, call)["logits"], before) > 1e-2
        assert backend.graphs == 2


@needs_compiler
@pytest.mark.slow  # 10 to 20 s each where nothing is cached
@pytest.mark.parametrize("execution", ["factored", "merged"])
@pytest.mark.parametrize("bits", [None, 4])
def test_inductor(bits, execution):
    """The default backend: kernels of its own."""
    case = SMALL if bits is None else FOUR_BIT[0]
    layer, _ = layer_of(case, base=None if bits is None else four_bit(case))
    layer.execution = execution
    check(layer, torch.compile(layer, fullgraph=True), case, within=FUSED)


@needs_compiler
@pytest.mark.slow
def test_inductor_on_a_whole_model(load):
    model = adapted(load())
    check_model(model, torch.compile(model, fullgraph=True), FUSED_MODEL)
