"""MoKA against PEFT's LoKr at equal numbers of parameters, on one unquantised linear layer: time and memory.

    python -m benchmarks.lokr [--shapes smollm2-q,llama3-8b-v] [--tokens 128,512] [--pairs one,paper]

Time is of the forward and of the gradients by the input and by the adapter's parameters. Memory is what autograd keeps
between the two, counted by storage: what an adapter costs for every layer of a model, without recomputation.
A pair is a MoKA and a LoKr of as many parameters, within a few percent; see `PAIRS`.
Results: results/lokr_DEVICE_torch.*
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoKrConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

from benchmarks.harness import (
    add_options,
    chosen,
    describe,
    environment,
    file_name,
    interleave,
    known_shapes,
    note,
    numbers,
    reason,
    seconds_cell,
    settled,
    table,
    words,
    write_results,
)
from benchmarks.layer_torch import autocast, forward_and_backward
from moka_core import KronShape, LayerPlan, MokaConfig, ShapeGroup, plan_layer, preset
from moka_torch import MokaLinear

SHAPES = {"smollm2-q": (576, 576), "llama3-8b-v": (1024, 4096), "llama2-7b-q": (4096, 4096)}
QUICK = {"quick": (96, 128)}
TOKENS = {"cpu": (128, 512, 2048), "gpu": (128, 512, 2048, 8192)}
PAIRS = {
    "one": "LoKr with both factors whole and as square as they can be, and MoKA with that one term",
    "paper": "MoKA's preset `paper` (ten terms of five shapes), and LoKr with its second factor in two of low rank",
}
FROZEN, LOKR, OURS = "frozen base", "LoKr", "MoKA auto"
MEGA = 1e6
_SLACK = 0.02  # how far the numbers of parameters of a pair may differ


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written."""
    arguments = _arguments(argv)
    with settled(arguments):
        return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    name = file_name("lokr", arguments)
    arguments.tokens = arguments.tokens or ([16] if arguments.quick else list(TOKENS[arguments.device]))
    result: dict[str, Any] = {"environment": environment(arguments), "cases": []}
    known = QUICK if arguments.quick else SHAPES
    for shape in known_shapes(arguments.shapes, known):
        for pair in arguments.pairs:
            layers = Pair(*known[shape], pair, arguments.dtype, arguments.device)
            for tokens in arguments.tokens:
                result["cases"].append(_case(arguments, layers, shape, tokens))
                write_results(arguments.output, name, result, _markdown(result), show=False)
    write_results(arguments.output, name, result, _markdown(result))
    return result


def _case(arguments: argparse.Namespace, layers: Pair, shape: str, tokens: int) -> dict[str, Any]:
    note(f"{shape}, {layers.pair}, {tokens} tokens")
    names = chosen(layers.variants, arguments.variants)
    built = {name: layers.variants[name]() for name in names}
    x, dy = layers.batch(tokens)
    kept: dict[str, dict[str, int]] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
            kept[name] = layers.kept(built[name], x)
        except Exception as error:  # out of memory has a type of its own
            if not arguments.keep_going:
                raise
            failures[name] = reason(error)
    calls = {name: forward_and_backward(layer, x, dy) for name, layer in built.items() if name not in failures}
    repeats = arguments.repeats or _repeats(arguments, tokens)
    timings = interleave(calls, repeats, keep_going=arguments.keep_going)
    del calls, built
    gc.collect()
    return {
        "shape": shape,
        "dims": [layers.out, layers.in_],
        "pair": layers.pair,
        "tokens": tokens,
        "parameters": layers.parameters,
        "lokr": layers.lokr_settings,
        "variants": timings.summary(),
        "failures": failures | timings.failures,
        "ratio_to_frozen": {name: timings.ratio(name, FROZEN) for name in timings.seconds},
        "ratio_to_lokr": {name: timings.ratio(name, LOKR) for name in timings.seconds},
        "kept_bytes": kept,
        "x_bytes": x.untyped_storage().nbytes(),
    }


def _repeats(arguments: argparse.Namespace, tokens: int) -> int:
    if arguments.quick:
        return 2
    if arguments.device == "gpu":
        return 20
    return 15 if tokens <= 128 else 9 if tokens <= 512 else 5


def matched_lokr(out: int, in_: int, parameters: int) -> LoKrConfig:
    """The LoKr of about that many parameters with its first factor whole: the most square one that comes near enough.

    LoKr has one term, (out_l x in_m) ⊗ (out_k x in_n), its first factor the smaller one. The larger `decompose_factor`
    is, the more alike the two are, and the fewer parameters it can have at most; the rank of the second factor then
    makes up the number.

    Raises:
        ValueError: none has a number of parameters within a few percent of the one asked for.
    """
    for factor in sorted({divisor for divisor in range(2, min(out, in_) + 1) if in_ % divisor == 0}, reverse=True):
        (in_m, in_n), (out_l, out_k) = factorization(in_, factor), factorization(out, factor)
        widest, of_rank = max(out_k, in_n), out_k + in_n
        rank = max(1, round((parameters - out_l * in_m) / of_rank))
        whole = not rank < widest / 2  # PEFT's rule
        count = out_l * in_m + (out_k * in_n if whole else rank * of_rank)
        if abs(count / parameters - 1) <= _SLACK:
            return LoKrConfig(r=rank, alpha=rank, decompose_factor=factor, target_modules=["q_proj"])
    raise ValueError(f"{out}x{in_}: no LoKr has {parameters} parameters, within {_SLACK:.0%}")


class _Holder(nn.Module):
    """A model of one layer, for PEFT to put an adapter in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj = layer


class Pair:
    """The variants of one layer shape: the frozen base, and a MoKA and a LoKr on it with as many parameters.

    Args:
        pair: one of `PAIRS`.
        dtype: of the base, the inputs and the products; the adapters' parameters are float32.
    """

    def __init__(self, out: int, in_: int, pair: str, dtype: str, device: str) -> None:
        self.out, self.in_, self.pair, self.dtype = out, in_, pair, getattr(torch, dtype)
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        self.base = nn.Linear(in_, out, bias=False, dtype=self.dtype, device=self.device).requires_grad_(False)
        self.config, self.lokr_config = self._configs()
        self.variants: dict[str, Callable[[], nn.Module]] = {
            FROZEN: lambda: self.base,
            LOKR: self._lokr,
            OURS: self._moka,
            "MoKA factored": lambda: self._moka("factored"),
            "MoKA merged": lambda: self._moka("merged"),
        }
        self.parameters = {name: _trained(self.variants[name]()) for name in (LOKR, OURS)}
        one, other = self.parameters.values()
        if abs(one / other - 1) > _SLACK:
            raise ValueError(f"{out}x{in_}, {pair}: a pair of {self.parameters} parameters is none")
        settings = self.lokr_config
        self.lokr_settings = {"r": settings.r, "decompose_factor": settings.decompose_factor}

    def _configs(self) -> tuple[MokaConfig, LoKrConfig]:
        out, in_ = self.out, self.in_
        if self.pair == "paper":
            config = preset("paper", dropout=0.0)
            count = plan_layer(config, out, in_).trainable(config)
            return config, matched_lokr(out, in_, count)
        (in_m, in_n), (out_l, out_k) = factorization(in_, -1), factorization(out, -1)
        groups = (ShapeGroup(KronShape(out_l, in_m, out_k, in_n), 1),)
        plan = LayerPlan(out_features=out, in_features=in_, groups=groups)
        rank = max(out_k, in_n)  # so high that PEFT stores the factor whole
        lokr = LoKrConfig(r=rank, alpha=rank, decompose_factor=-1, target_modules=["q_proj"])
        return MokaConfig(r=1, num_shapes=1, shapes=(plan,), dropout=0.0), lokr

    def _moka(self, execution: Any = "auto") -> nn.Module:
        plan = plan_layer(self.config, self.out, self.in_)
        layer = MokaLinear(self.base, "default", plan=plan, config=self.config)
        layer.execution = execution
        return _started(layer)

    def _lokr(self) -> nn.Module:
        return _started(inject_adapter_in_model(self.lokr_config, _Holder(self.base)).get_submodule("q_proj"))

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """A random input, which needs a gradient, and a random gradient of the output."""
        x = torch.randn(tokens, self.in_, device=self.device, dtype=self.dtype, requires_grad=True)
        return x, torch.randn(tokens, self.out, device=self.device, dtype=self.dtype)

    def kept(self, layer: nn.Module, x: Tensor) -> dict[str, int]:
        """Bytes that autograd keeps for the backward, without the parameters: {"without_x": …, "with_x": …}.

        Storages are counted whole, and once.
        """
        saved: list[Tensor] = []  # held on to, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(self.dtype, self.device):
            y = layer(x)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        del y
        for parameter in layer.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        with_x = sum(storages.values())
        storages.pop(x.untyped_storage().data_ptr(), None)
        return {"without_x": sum(storages.values()), "with_x": with_x}


def _trained(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)


@torch.no_grad()
def _started(layer: nn.Module) -> nn.Module:
    """`layer` with random parameters in float32, as `get_peft_model` has them."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().normal_(std=0.02)
    return layer


def _markdown(result: dict[str, Any]) -> str:
    lines = ["# MoKA and PEFT's LoKr, one layer, equal numbers of parameters", "", describe(result["environment"]), ""]
    lines += [f"- {name}: {what}." for name, what in PAIRS.items()]
    lines += [
        "",
        "Ratios are of medians in one run. Kept is what autograd keeps from the forward to the backward, without the "
        "parameters and the input x, which layers may share; with x: that too.",
        "",
    ]
    cases = result["cases"]
    for shape, pair in dict.fromkeys((case["shape"], case["pair"]) for case in cases):
        own = [case for case in cases if (case["shape"], case["pair"]) == (shape, pair)]
        out, in_ = own[0]["dims"]
        lines += [f"## {shape} ({out}x{in_}), {pair}", "", _counts(own[0]), "", *_tables(own), ""]
    failures = {name: why for case in cases for name, why in case["failures"].items()}
    return "\n".join([*lines, *(f"- {name}: {why}" for name, why in failures.items())])


def _counts(case: dict[str, Any]) -> str:
    lokr, ours = case["parameters"][LOKR], case["parameters"][OURS]
    settings = ", ".join(f"{name}={value}" for name, value in case["lokr"].items())
    return f"Parameters: MoKA {ours}, LoKr {lokr} ({lokr / ours - 1:+.1%}; {settings})."


def _tables(cases: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for case in cases for name in (*case["kept_bytes"], *case["variants"])))
    head = ["tokens", *names]

    def rows(cell: Callable[[dict[str, Any], str], Any]) -> list[list[Any]]:
        return [[case["tokens"], *(cell(case, name) for name in names)] for case in cases]

    def kept(case: dict[str, Any], name: str) -> str | None:
        found = case["kept_bytes"].get(name)
        return None if found is None else f"{found['without_x'] / MEGA:.3g} ({found['with_x'] / MEGA:.3g})"

    return [
        "Forward and backward, median (least–greatest):",
        "",
        table(head, rows(lambda case, name: seconds_cell(case["variants"].get(name)))),
        "",
        "Ratio to LoKr (below 1: faster than it):",
        "",
        table(head, rows(lambda case, name: case["ratio_to_lokr"].get(name))),
        "",
        "Kept for the backward, MB (with x):",
        "",
        table(head, rows(kept)),
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=words, help=", ".join(SHAPES))
    parser.add_argument("--tokens", type=numbers)
    parser.add_argument("--pairs", type=words, default=list(PAIRS), help=", ".join(PAIRS))
    parser.add_argument("--repeats", type=int, help="samples of each variant; by default more for small sizes")
    add_options(parser, frameworks=False)
    parser.set_defaults(frameworks=["torch"])
    arguments = parser.parse_args(argv)
    if unknown := [pair for pair in arguments.pairs if pair not in PAIRS]:
        parser.error(f"--pairs: expected some of {', '.join(PAIRS)}; got {', '.join(unknown)}")
    return arguments


if __name__ == "__main__":
    main()
