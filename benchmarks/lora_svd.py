"""The two ways to the k largest singular values of ΔW: Lanczos on the factors, or LAPACK on ΔW.

    python -m benchmarks.lora_svd

Mixtures of the preset `paper` with random factors. `conversion.low_rank.lanczos_pays` chooses between the two; the
table says how long either takes and whether the choice is the faster one. Results: results/lora_svd_DEVICE.*
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg

from benchmarks.harness import (
    RESULTS,
    Call,
    describe,
    environment,
    file_name,
    interleave,
    note,
    numbers,
    seconds_cell,
    table,
    words,
    write_results,
)
from conversion.low_rank import FactoredDelta, lanczos, lanczos_pays
from moka_core import LayerFactors, MokaConfig, plan_layer
from moka_core.adapter import expected_tensors

SHAPES = ("192x576", "576x576", "1024x1024", "1024x4096", "2048x2048")
RANKS = (8, 32, 128, 256)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=words, default=list(SHAPES), help="OUTxIN, …")
    parser.add_argument("--ranks", type=numbers, default=list(RANKS))
    parser.add_argument("--terms", type=int, default=10, help="r of the mixtures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=type(RESULTS), default=RESULTS)
    parser.add_argument("--label", default="", help="appended to the names of the result files")
    arguments = parser.parse_args(argv)
    arguments.device, arguments.dtype, arguments.quick = "cpu", "float64", False
    described = environment(arguments)
    result = {
        "environment": described,
        "cases": [case for shape in arguments.shapes for case in _cases(arguments, shape)],
    }
    arguments.dtype = "float32"  # the files' usual name: there is no other dtype here
    write_results(arguments.output, file_name("lora_svd", arguments), result, _markdown(result))
    return result


def _cases(arguments: argparse.Namespace, shape: str) -> list[dict[str, Any]]:
    out, in_ = (int(part) for part in shape.split("x"))
    delta = random_delta(out, in_, arguments.terms)
    start = time.perf_counter()
    dense = delta.dense()
    formed = time.perf_counter() - start
    note(f"{shape}: ΔW formed in {formed:.3g} s")
    ranks = [rank for rank in arguments.ranks if rank < min(out, in_)]
    calls = {"LAPACK": Call(lambda: scipy.linalg.svd(dense, full_matrices=False), lambda _: None)}
    calls |= {str(rank): Call(lambda rank=rank: lanczos(delta, rank), lambda _: None) for rank in ranks}
    summary = interleave(calls, arguments.repeats, warm=False).summary()
    values = scipy.linalg.svdvals(dense)
    cases = []
    for rank in ranks:
        found = lanczos(delta, rank)
        cases.append(
            {
                "shape": shape,
                "rank": rank,
                "lanczos": summary[str(rank)],
                "lapack": summary["LAPACK"],
                "converged": found is not None,
                "largest_error": None if found is None else float(abs(found.values / values[:rank] - 1).max()),
                "chosen": "Lanczos" if lanczos_pays(delta, rank) else "LAPACK",
            }
        )
    return cases


def random_delta(out: int, in_: int, terms: int) -> FactoredDelta:
    """ΔW of a mixture of the preset's shapes, its factors normal."""
    rng = np.random.default_rng(0)
    config = MokaConfig(r=terms)
    plan = plan_layer(config, out, in_)
    tensors = {name: rng.standard_normal(shape) for name, shape in expected_tensors(plan, config).items()}
    return FactoredDelta.of(LayerFactors.from_tensors(plan, config, tensors), config)


def _markdown(result: dict[str, Any]) -> str:
    rows = []
    for case in result["cases"]:
        faster = "Lanczos" if case["lanczos"]["median"] < case["lapack"]["median"] else "LAPACK"
        cells = [seconds_cell(case["lanczos"]), seconds_cell(case["lapack"])]
        ratio = case["lanczos"]["median"] / case["lapack"]["median"]
        chosen = case["chosen"] + ("" if case["chosen"] == faster else ", the slower one")
        rows.append([case["shape"], case["rank"], *cells, ratio, case["largest_error"], chosen])
    head = ["out x in", "rank", "Lanczos", "LAPACK", "ratio", "values, largest relative difference", "chosen"]
    text = "Median (least–greatest). LAPACK gives all singular values; forming ΔW for it is left out."
    return "\n".join(
        ["# Two ways to singular values", "", describe(result["environment"]), "", text, "", table(head, rows)]
    )


if __name__ == "__main__":
    main()
