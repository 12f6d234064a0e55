"""How many digits of a base fingerprint differ after rounding, and after training.

    python -m benchmarks.base_fingerprint --base report/base --adapter report/adapter --text report/data/train.jsonl

Takes the linear weights of a model folder, rounds and packs them, and changes them in the ways that fine-tuning does;
prints for each the digits that differ, by kind of layer. "smooth" is the model with each entry moved within the step
of an 8-bit lattice in blocks of 32, since a model that was kept so (as the demo's) has few entries near the borders.
The bounds in `moka_core/fingerprint.py` come from these figures; they stand in docs/fingerprint.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion import load_adapter, open_base
from moka_core import Nf4Weight, quantise_nf4, sketch
from moka_core.nf4 import BLOCK
from moka_core.oracle import dense_delta

SIZES = (3e-4, 1e-3, 3e-3, 1e-2)  # of ||ΔW|| / ||W||
RATES, STEPS = (1e-5, 1e-4), (1, 5, 10, 20)  # of AdamW
Weights = dict[str, np.ndarray]


def main(argv: Sequence[str] | None = None) -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="model folder with dense weights")
    parser.add_argument("--adapter", type=Path, help="adapter folder to merge")
    parser.add_argument("--text", type=Path, help="JSON lines with prompt and completion, for AdamW on all weights")
    parser.add_argument("--seeds", type=int, default=3, help="of the random changes; 0 leaves them out")
    arguments = parser.parse_args(argv)
    base = open_base(arguments.base, quantise="none")
    stored = {
        name.removesuffix(".weight"): np.asarray(value, np.float32)
        for name, value in base.weights()
        if sketch.sampled_kind(name.removesuffix(".weight")) and isinstance(value, np.ndarray) and value.ndim == 2
    }
    for name, weights in (("stored", stored), ("smooth", smooth(stored))):
        for blocks in (4, 16, 32, 64):
            sketch.BLOCKS = blocks
            whole = digits(weights)
            for case, changed in rounded(weights):
                report(f"{name}, {blocks} blocks, {case}", whole, digits(changed))
        for seed in range(arguments.seeds):
            for case, changed in trained(weights, seed):
                for blocks in (4, 16, 32, 64):
                    sketch.BLOCKS = blocks
                    report(f"{name}, {blocks} blocks, {case}, seed {seed}", digits(weights), digits(changed))
    sketch.BLOCKS = 16
    if arguments.adapter is not None:
        adapter = load_adapter(arguments.adapter)
        delta = {path: dense_delta(layer, adapter.layer_config(path)) for path, layer in adapter.layers.items()}
        sizes = [np.linalg.norm(delta[path]) / np.linalg.norm(stored[path]) for path in delta]
        merged = {**stored, **{path: (stored[path] + delta[path]).astype(np.float32) for path in delta}}
        report(f"merged adapter, sizes {min(sizes):.1e} to {max(sizes):.1e}", digits(stored), digits(merged))
    if arguments.text is not None:
        for rate in RATES:
            for step, after in fine_tuned(arguments.base, arguments.text, stored, rate):
                sizes = [np.linalg.norm(after[path] - stored[path]) / np.linalg.norm(stored[path]) for path in stored]
                case = f"AdamW {rate:g}, step {step}, sizes {min(sizes):.1e} to {max(sizes):.1e}"
                report(f"{case}, median {np.median(sizes):.1e}", digits(stored), digits(after))


def smooth(weights: Weights) -> Weights:
    """The weights with each entry somewhere within its step of an 8-bit lattice, in blocks of 32."""
    rng, result = np.random.default_rng(0), {}
    for path, weight in weights.items():
        rows = weight.reshape(-1, 32)
        step = np.abs(rows).max(axis=1, keepdims=True) / 127
        moved = rows + step * rng.uniform(-0.5, 0.5, rows.shape)
        result[path] = moved.astype(np.float32).reshape(weight.shape)
    return result


def rounded(weights: Weights) -> Iterator[tuple[str, dict[str, np.ndarray | Nf4Weight]]]:
    """The same model in other precisions."""
    bfloat16 = {path: weight.astype(ml_dtypes.bfloat16) for path, weight in weights.items()}
    float16 = {path: weight.astype(np.float16) for path, weight in weights.items()}
    yield "bfloat16", dict(bfloat16)
    yield "float16", dict(float16)
    yield "bfloat16 of float16", {path: weight.astype(ml_dtypes.bfloat16) for path, weight in float16.items()}
    if sketch.BLOCKS == 16:
        yield "NF4 of float32", {path: quantise_nf4(weight) for path, weight in weights.items()}
        yield "NF4 of bfloat16", {path: quantise_nf4(weight) for path, weight in bfloat16.items()}


def trained(weights: Weights, seed: int) -> Iterator[tuple[str, Weights]]:
    """The model after changes of several sizes and kinds, in float32."""
    rng = np.random.default_rng(seed)
    low = {path: low_rank(weight.shape, rng) for path, weight in weights.items()}
    full = {path: rng.standard_normal(weight.shape, np.float32) for path, weight in weights.items()}
    some = {path: delta for path, delta in low.items() if path.endswith(("q_proj", "v_proj"))}
    for size in SIZES:
        for name, deltas in (("rank 16 on q, v", some), ("rank 16 on all", low), ("Gaussian on all", full)):
            changed = dict(weights)
            for path, delta in deltas.items():
                share = size * np.linalg.norm(weights[path]) / np.linalg.norm(delta)
                changed[path] = weights[path] + np.float32(share) * delta
            yield f"{name}, {size:g}", changed


def low_rank(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((shape[0], 16), np.float32) @ rng.standard_normal((16, shape[1]), np.float32)


def fine_tuned(folder: Path, text: Path, paths: Weights, rate: float) -> Iterator[tuple[int, Weights]]:
    """The model's linear weights after steps of AdamW on all of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()[: 4 * STEPS[-1]]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(1, STEPS[-1] + 1):
        batch = [f"{row['prompt']} {row['completion']}" for row in rows[4 * step - 4 : 4 * step]]
        tokens = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=64)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        model(**tokens, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step in STEPS:
            yield step, {path: model.get_submodule(path).weight.detach().numpy().copy() for path in paths}


def digits(weights: dict[str, np.ndarray | Nf4Weight] | Weights) -> dict[str, str]:
    """The digits of every kind."""
    told = sketch.sketch_weights({path: readable(weight) for path, weight in weights.items()})
    return dict(entry.split(":") for entry in told.split("/"))


def readable(weight: np.ndarray | Nf4Weight) -> sketch.LinearWeight:
    """A weight in memory, to be read block by block."""
    if isinstance(weight, Nf4Weight):
        entries, flat, size = weight.shape[0] * weight.shape[1], weight.codes, BLOCK // 2
    else:
        entries, flat, size = weight.size, weight.reshape(-1), BLOCK
    read: Callable[[Sequence[int]], list[np.ndarray]]
    read = lambda numbers: [flat[number * size : (number + 1) * size] for number in numbers]  # noqa: E731
    return sketch.LinearWeight(entries=entries, read=read)


def report(case: str, one: dict[str, str], other: dict[str, str]) -> None:
    """Print how many digits differ, by kind."""
    counts = {kind: sum(a != b for a, b in zip(one[kind], other[kind], strict=True)) for kind in one}
    total = len(next(iter(one.values())))
    print(f"{case}: {' '.join(f'{kind} {count}' for kind, count in counts.items())} of {total}", flush=True)


if __name__ == "__main__":
    main()
