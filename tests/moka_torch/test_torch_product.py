"""The autograd Function: every schedule against the float64 oracle, what it keeps, and what it leaves out."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import moka_torch.product
from moka_core.execution import Schedule
from moka_core.oracle import dense_delta, dense_gradients
from moka_torch.mixture import coefficients, delta_weight, moka_apply
from moka_torch.product import Job, moka_product
from tests.cases import CASES, LayerCase, random_layer
from tests.moka_torch.tolerances import BFLOAT16, BFLOAT16_ONCE, FLOAT32, FLOAT32_LARGE, FLOAT64, relative

TOKENS = 37
DROPOUT = 0.3
# (forward, gradient, the factor that meets x first)
SCHEDULES = tuple(itertools.product(("factored", "merged"), ("factored", "merged"), ("b", "a")))
CROSSED = tuple(
    LayerCase(
        name=f"identity {identity}, {gate}, {scaling}",
        out_features=32,
        in_features=64,
        settings={
            "r": 5,
            "num_shapes": 2,
            "block_entries": 32,
            "identity": identity,
            "gate": gate,
            "scaling": scaling,
            "zero_factor": "a" if identity == "b" else "b",
            "scale": 0.7,
        },
    )
    for identity, gate, scaling in itertools.product(("none", "a", "b"), ("softmax", "uniform"), ("none", "stable"))
)


class Problem:
    """A layer with random factors, x, dy, a dropout mask and a base weight, and what float64 says of them."""

    def __init__(self, case: LayerCase, seed: int, *, drop: bool = False, base: bool = False) -> None:
        self.layer, self.plan, self.config = random_layer(case, seed), case.plan, case.config
        rng = np.random.default_rng(seed + 1000)
        self.x = rng.standard_normal((TOKENS, case.in_features)).astype(np.float32)
        self.dy = rng.standard_normal((TOKENS, case.out_features)).astype(np.float32)
        self.keep = rng.random(self.x.shape) >= DROPOUT if drop else None
        self.weight = rng.standard_normal((case.out_features, case.in_features)).astype(np.float32) if base else None
        self.bias = rng.standard_normal(case.out_features).astype(np.float32) if base else None

    def expected(self) -> dict[str, np.ndarray]:
        mask = 1.0 if self.keep is None else self.keep / (1 - DROPOUT)
        x = self.x.astype(np.float64) * mask
        grads = dense_gradients(self.layer, self.config, x, self.dy)
        grads["x"] = grads["x"] * mask
        y = x @ dense_delta(self.layer, self.config).T
        if self.weight is not None:
            weight = self.weight.astype(np.float64)
            y, grads["x"] = y + x @ weight.T + self.bias, grads["x"] + self.dy @ weight
            grads["bias"] = self.dy.sum(0, dtype=np.float64)
        if "gate_logits" in grads and self.plan.terms == 1:
            del grads["gate_logits"]  # one term has weight 1 whatever its logit is
        return {"y": y, **grads}

    def found(self, way, dtype=torch.float32, frozen=()) -> dict[str, torch.Tensor | None]:
        """The same by the Function; `frozen` names what requires no gradient."""
        named = {name: torch.tensor(array, dtype=dtype) for name, array in self.layer.tensors()}
        named["x"] = torch.tensor(self.x, dtype=dtype)
        if self.bias is not None:
            named["bias"] = torch.tensor(self.bias, dtype=dtype)
        for name, tensor in named.items():
            tensor.requires_grad_(not name.startswith(tuple(frozen) or ("\0",)))
        k = coefficients(self.plan, self.config, named.get("gate_logits"), dtype=torch.float64)
        job = self.job(way, dtype)
        y = moka_product(
            job,
            named["x"],
            k if self.keep is None else k / (1 - DROPOUT),
            [tensor for name, tensor in named.items() if name.startswith("factor_a")],
            [tensor for name, tensor in named.items() if name.startswith("factor_b")],
            keep=None if self.keep is None else torch.tensor(self.keep),
            held=None if self.weight is None else torch.tensor(self.weight),
            bias=named.get("bias"),
        )
        assert y.dtype == dtype
        y.backward(torch.tensor(self.dy, dtype=dtype))
        return {"y": y.detach(), **{name: tensor.grad for name, tensor in named.items()}}

    def job(self, way, dtype=torch.float32) -> Job:
        forward, gradient, first = way
        schedule = Schedule(forward=forward, gradient=gradient, first=(first,) * len(self.plan.groups))
        weight = None if self.weight is None else lambda held, dtype: held.to(dtype, copy=True)
        return Job(self.plan, self.config.identity, schedule, dtype, weight)


@functools.cache
def solved(name: str, seed: int, *, drop: bool = False, base: bool = False) -> tuple[Problem, dict[str, np.ndarray]]:
    """A problem and its solution, which is the same for every schedule."""
    case = next(case for case in CASES + CROSSED if case.name == name)
    problem = Problem(case, seed, drop=drop, base=base)
    return problem, problem.expected()


@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("case", CASES + CROSSED, ids=lambda case: case.name)
def test_every_schedule_matches_the_oracle(case, way):
    kinds = [{"drop": False}, {"drop": True}] + ([{"base": True}] if way[0] == "merged" else [])
    for kind, seed in itertools.product(kinds, range(2)):
        problem, expected = solved(case.name, seed, **kind)
        for dtype, limit in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
            found = problem.found(way, dtype)
            for name, array in expected.items():
                assert relative(found[name], array) <= limit, (name, kind, seed, dtype)


@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
def test_a_larger_layer_is_summed_in_float32_and_as_close(way):
    case = LayerCase(name="large", out_features=192, in_features=96)
    assert TOKENS * case.out_features * case.in_features > moka_torch.product.SMALL
    for seed in range(2):
        problem = Problem(case, seed)
        found = problem.found(way)
        for name, array in problem.expected().items():
            assert relative(found[name], array) <= FLOAT32_LARGE[name.partition(".")[0]], name


def test_another_mask_or_another_layer_would_be_noticed():
    case = next(case for case in CASES if case.name == "unequal copies")
    plain, dropped, other = (Problem(case, 0), Problem(case, 0, drop=True), Problem(case, 1))
    for name, array in plain.expected().items():
        assert relative(dropped.expected()[name], array) > 0.05, name
        assert relative(other.expected()[name], array) > 0.05, name


@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("name", ["unequal copies", "identity a, two blocks", "identity b"])
def test_what_is_frozen_has_no_gradient_and_the_rest_has_its_own(name, way):
    case = next(case for case in CASES if case.name == name)
    problem = Problem(case, 3)
    full = problem.found(way)
    stored = {name.partition(".")[0] for name, _ in problem.layer.tensors()} | {"x"}
    for size in (1, 2, 3):
        for frozen in itertools.combinations(sorted(stored), size):
            if size == len(stored):
                continue
            for key, tensor in problem.found(way, frozen=frozen).items():
                if key.startswith(frozen):
                    assert tensor is None
                else:
                    assert relative(tensor, full[key]) <= FLOAT32, (frozen, key)


@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
def test_what_is_frozen_costs_nothing(way, monkeypatch):
    calls = []
    for function in ("form", "through_second", "pull_from_weight", "pull_from_halves", "product"):
        own = getattr(moka_torch.product, function)
        monkeypatch.setattr(
            moka_torch.product,
            function,
            lambda *args, own=own, name=function, **kw: calls.append(name) or own(*args, **kw),
        )
    problem = Problem(CASES[0], 0)
    problem.found(way, frozen=["factor", "gate"])
    assert not {"pull_from_weight", "pull_from_halves", "product"} & set(calls)
    calls.clear()
    problem.found(way, frozen=["x"])
    assert calls.count("form") == (way[0] == "merged")  # the forward's alone
    assert "through_second" not in calls
    assert calls.count("product") == (way[1] == "merged")  # G, once for all groups
    assert (calls.count("pull_from_weight"), calls.count("pull_from_halves"))[way[1] == "factored"] == 5


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
def test_only_the_inputs_are_kept(way, drop):
    for case in CASES:
        problem = Problem(case, 0, drop=drop)
        inputs = {"x": tuple(problem.x.shape), "weights": (problem.plan.terms,)}
        inputs |= {name: array.shape for name, array in problem.layer.tensors() if name != "gate_logits"}
        kept = kept_by(problem, way)
        expected = [(shape, torch.float32) for shape in inputs.values()]
        expected += [(tuple(problem.x.shape), torch.bool)] if drop else []
        assert sorted(kept, key=str) == sorted(expected, key=str), case.name
    problem = Problem(CASES[0], 0)
    assert (problem.x.shape, torch.float32) not in kept_by(problem, way, frozen=True), "nothing needs x"


def kept_by(problem: Problem, way, frozen: bool = False) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of every tensor that the Function saves for its backward."""
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []
    named = {name: torch.tensor(array, requires_grad=not frozen) for name, array in problem.layer.tensors()}
    k = coefficients(problem.plan, problem.config, named.get("gate_logits")).detach().requires_grad_(not frozen)
    x = torch.tensor(problem.x, requires_grad=True)
    keep = None if problem.keep is None else torch.tensor(problem.keep)

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moka_product(problem.job(way), x, k, *factors_of(named), keep=keep)
    return kept


def factors_of(named) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return (
        [tensor for name, tensor in named.items() if name.startswith("factor_a")],
        [tensor for name, tensor in named.items() if name.startswith("factor_b")],
    )


def function_of(case: LayerCase, way):
    """(f, arguments): y of x, the factors and the logits, in float64."""
    problem = Problem(case, 0)
    named = {name: torch.tensor(array, dtype=torch.float64) for name, array in problem.layer.tensors()}
    arguments = [torch.tensor(problem.x[:2], dtype=torch.float64), *named.values()]

    def f(x, *tensors):
        given = dict(zip(named, tensors, strict=True))
        k = coefficients(case.plan, case.config, given.get("gate_logits"), dtype=torch.float64)
        return moka_product(problem.job(way, torch.float64), x, k, *factors_of(given))

    return f, [tensor.requires_grad_() for tensor in arguments]


@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
@pytest.mark.parametrize("name", ["unequal copies", "identity a, two blocks"])
def test_first_and_second_derivatives(name, way):
    f, arguments = function_of(next(case for case in CASES if case.name == name), way)
    assert torch.autograd.gradcheck(f, arguments, fast_mode=True)
    if name == "unequal copies":
        assert torch.autograd.gradgradcheck(f, arguments, atol=1e-5, fast_mode=True)


def test_function_transforms():
    """torch.func.grad, and gradients for every sample by vmap."""
    for case in (CASES[0], next(case for case in CASES if case.name == "identity b")):
        for way in (("merged", "merged", "b"), ("factored", "factored", "a")):
            f, arguments = function_of(case, way)
            positions = tuple(range(len(arguments)))
            expected = torch.autograd.grad((f(*arguments) ** 2).sum(), arguments)
            detached = [tensor.detach() for tensor in arguments]
            found = torch.func.grad(lambda *args, f=f: (f(*args) ** 2).sum(), argnums=positions)(*detached)
            for one, other in zip(found, expected, strict=True):
                assert relative(one, other) <= FLOAT64
            each = torch.func.grad(lambda x, *args, f=f: (f(x[None], *args) ** 2).sum(), argnums=positions[1:])
            samples = torch.func.vmap(each, in_dims=(0, *[None] * len(positions[1:])))(*detached)
            for one, other in zip(samples, expected[1:], strict=True):
                assert relative(one.sum(0), other) <= FLOAT64


@pytest.mark.parametrize("name", ["unequal copies", "identity b, two blocks, uniform"])
def test_vmap_over_one_tensor_alone(name):
    """Any tensor may have the axis, W too: y and all gradients as from one call after the other."""
    case = next(case for case in CASES if case.name == name)
    problem = Problem(case, 0, base=True)
    for way in (("factored", "factored", "a"), ("merged", "merged", "b")):
        job = problem.job(way, torch.float64)
        job = job if way[0] == "merged" else job._replace(weight=None)
        k = torch.arange(1.0, 1 + case.plan.terms).double()
        named = {"x": torch.tensor(problem.x[:2]).double(), "k": k}
        named |= {name: torch.tensor(array).double() for name, array in problem.layer.tensors() if name[0] == "f"}
        named |= {"W": torch.tensor(problem.weight).double()} if way[0] == "merged" else {}

        def loss(*tensors, names=tuple(named), job=job):
            given = dict(zip(names, tensors, strict=True))
            return (moka_product(job, given["x"], given["k"], *factors_of(given), held=given.get("W")) ** 2).sum()

        both = torch.func.grad_and_value(loss, argnums=tuple(range(len(named))))
        alone = both(*named.values())
        for changed, tensor in named.items():
            dims = tuple(0 if name == changed else None for name in named)
            given = {**named, changed: torch.stack([tensor, 0.5 * tensor + 0.1])}
            found = torch.func.vmap(both, in_dims=dims)(*given.values())
            given[changed] = given[changed][1]
            for sample, (grads, value) in enumerate((alone, both(*given.values()))):
                assert relative(found[1][sample], value) <= FLOAT64, changed
                for one, other in zip(found[0], grads, strict=True):
                    assert relative(one[sample], other) <= FLOAT64, changed


def test_forward_mode_is_there_without_reverse_mode_and_through_delta_weight_with_it():
    case = next(case for case in CASES if case.name == "unequal copies")
    named = {name: torch.tensor(array).double() for name, array in random_layer(case).tensors()}
    x = torch.randn(2, case.in_features, generator=torch.Generator().manual_seed(0)).double()
    logits = named.pop("gate_logits")
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()

    def ours(logits):
        return moka_apply(x, case.plan, case.config, *factors_of(named), logits)

    def by_delta_weight(logits):
        return x @ delta_weight(case.plan, case.config, *factors_of(named), logits).T

    step = 1e-6
    expected = (ours(logits + step * direction) - ours(logits - step * direction)) / (2 * step)
    for way in (ours, by_delta_weight):
        y, along = torch.func.jvp(way, (logits,), (direction,))
        assert relative(y, ours(logits)) <= FLOAT64
        assert relative(along, expected) <= 1e-8
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(torch.func.grad(lambda logits: ours(logits).sum()), (logits,), (direction,))
    torch.func.jvp(torch.func.grad(lambda logits: by_delta_weight(logits).sum()), (logits,), (direction,))


@pytest.mark.parametrize("way", SCHEDULES, ids="-".join)
def test_bfloat16_input_with_a_float32_adapter(way):
    """x and dy in bfloat16, the adapter in float32: as close as in float32, but for dx, which is rounded once."""
    for case in (CASES[0], CASES[13], LayerCase(name="large", out_features=192, in_features=96)):
        problem = Problem(case, 0)
        problem.x, problem.dy = (torch.tensor(array).bfloat16().float().numpy() for array in (problem.x, problem.dy))
        named = {name: torch.tensor(array, requires_grad=True) for name, array in problem.layer.tensors()}
        x = torch.tensor(problem.x, dtype=torch.bfloat16, requires_grad=True)
        k = coefficients(case.plan, case.config, named["gate_logits"], dtype=torch.float64)
        y = moka_product(problem.job(way), x, k, *factors_of(named))
        y.backward(torch.tensor(problem.dy))
        assert (y.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)
        found = {"y": y.detach(), "x": x.grad.float(), **{name: tensor.grad for name, tensor in named.items()}}
        for name, array in problem.expected().items():
            assert found[name].dtype == torch.float32
            limit = BFLOAT16_ONCE if name == "x" else FLOAT32_LARGE[name.partition(".")[0]]
            assert relative(found[name], array) <= limit, (case.name, name)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_autocast(execution, inside):
    """x and dy are rounded to bfloat16, as by `nn.functional.linear`; gradients have the dtypes of the inputs."""
    for case in (CASES[0], CASES[13]):
        for seed in range(3):
            problem = Problem(case, seed)
            named = {name: torch.tensor(array, requires_grad=True) for name, array in problem.layer.tensors()}
            x = torch.tensor(problem.x, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                y = moka_apply(x, case.plan, case.config, *factors_of(named), named["gate_logits"], execution=execution)
                linear = torch.nn.functional.linear(x, torch.zeros(case.out_features, case.in_features))
                if inside:
                    y.backward(torch.tensor(problem.dy).bfloat16())
            if not inside:
                y.backward(torch.tensor(problem.dy).bfloat16())
            assert y.dtype == linear.dtype == torch.bfloat16
            found = {"y": y.detach().float(), "x": x.grad, **{name: tensor.grad for name, tensor in named.items()}}
            for name, array in problem.expected().items():
                assert found[name].dtype == torch.float32
                assert relative(found[name], array) <= BFLOAT16[name.partition(".")[0]], (case.name, name)


def test_no_tokens():
    for case, way in itertools.product(CASES, SCHEDULES):
        f, arguments = function_of(case, way)
        y = f(arguments[0][:0], *arguments[1:])
        assert y.shape == (0, case.out_features)
        for tensor in torch.autograd.grad(y.sum(), arguments):
            assert not tensor.any()


def test_a_base_weight_needs_one_product():
    problem = Problem(CASES[0], 0, base=True)
    with pytest.raises(ValueError, match="only if ΔW is formed"):
        problem.found(("factored", "factored", "b"))
    problem.keep = problem.x > 0
    with pytest.raises(ValueError, match="nothing is dropped"):
        problem.found(("merged", "factored", "b"))
    job = problem.job(("merged", "factored", "b"))
    with pytest.raises(ValueError, match="given together"):
        moka_product(job, torch.tensor(problem.x), torch.ones(problem.plan.terms), [], [])
