"""An adapted layer under what torch does to whole modules: functional_call and its transforms, FSDP, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moka_core import ConfigError
from tests.cases import CASES
from tests.moka_torch.test_torch_execution import batch, dense, oracle, run
from tests.moka_torch.test_torch_linear import layer_of
from tests.moka_torch.tolerances import FLOAT32, FLOAT64, relative


def test_functional_call():
    """Tensors in place of all parameters, and what transforms make of them: as with the product of nn.Linear itself."""
    case = next(case for case in CASES if case.name == "unequal copies")
    layer, _ = layer_of(case)
    given = {name: tensor.detach().double() * 1.1 for name, tensor in layer.named_parameters()}
    others = {name: tensor for name, tensor in given.items() if name != "base_layer.weight"}
    x = torch.randn(3, case.in_features, generator=torch.Generator().manual_seed(0)).double()

    def of_weight(execution):
        def loss(weight, x):
            tensors = {**others, "base_layer.weight": weight}
            y = torch.func.functional_call(layer, tensors, (x,), {"execution": execution})
            return (y**2).sum()

        return loss

    weight = given["base_layer.weight"]
    stack = torch.stack([weight, 2 * weight])
    for transform, arguments in (
        (lambda loss: loss, (weight, x)),
        (lambda loss: torch.func.grad(loss, argnums=(0, 1)), (weight, x)),
        (lambda loss: torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None)), (stack, x)),
        # the inner transform sees no requires_grad on W
        (lambda loss: torch.func.grad(lambda w, x: (torch.func.grad(loss, argnums=1)(w, x) ** 2).sum()), (weight, x)),
    ):
        found, expected = (transform(of_weight(execution))(*arguments) for execution in ("merged", "factored"))
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for one, other in pairs:
            assert relative(one, other) <= FLOAT64


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fully_sharded():
    """FSDP gathers W before a forward and again before its backward: the merged product takes it, not an empty one."""
    case = CASES[0]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer, _ = layer_of(case, base=dense(case))
        x, dy = batch(case)
        expected = oracle(case, 0, layer.base_layer.weight, layer.base_layer.bias, x, dy)
        layer.execution = "merged"
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        found = run(layer, x, dy)
        for name, array in expected.items():
            tensor = found[name]
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert relative(tensor, array) <= FLOAT32, name
        with pytest.raises(ConfigError, match="its weight is a DTensor, not a plain parameter"):
            layer.__class__.forward(layer, x)  # without the hooks that gather
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_compiled_as_one_graph(execution, recwarn):
    case = next(case for case in CASES if case.name == "trivial factors")
    layer, _ = layer_of(case)
    layer.execution = execution
    x, dy = batch(case)
    expected = run(layer, x, dy)
    torch._dynamo.reset()
    found = run(layer, x, dy, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for name, tensor in expected.items():
        assert relative(found[name], tensor) <= FLOAT32, name
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]
