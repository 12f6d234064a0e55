"""Memory and time of loading a checkpoint into NF4, and of a first forward pass.

    python -m benchmarks.loading --folder /path/with/14GB --arch llama2-7b

Writes a checkpoint of that architecture with random fp16 weights, in shards, if the folder has none; then
loads it in a process of its own, and runs a forward pass over 16 tokens. Reported: the model's bytes as it is held, the
peak of resident memory (mapped pages of the files included), what share of the time is reading and packing, and the
time of the forward pass. Results: results/loading_ARCH_DEVICE.*
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.harness import describe, environment, note, table, write_results
from moka_core import Architecture, architecture
from moka_core.architecture import ARCHITECTURES

GIGA = 1e9
TOKENS = 16


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written. A child process prints its own figures instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.frameworks, arguments.device, arguments.label = ["jax"], "cpu", None
    if arguments.child:
        result = _load(arguments)
        print(json.dumps(result))
        return result
    have_checkpoint(arguments)
    command = [sys.executable, "-m", "benchmarks.loading", *(sys.argv[1:] if argv is None else argv), "--child"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    result = {"script": "loading", "arch": arguments.arch, "quantise": arguments.quantise, **found}
    result["environment"] = environment(arguments)
    over = (found["peak_bytes"] - found["model_bytes"]) / GIGA
    rows = [
        ["the model as it is held", f"{found['model_bytes'] / GIGA:.2f} GB"],
        ["peak of resident memory while loading", f"{found['peak_bytes'] / GIGA:.2f} GB ({over:.2f} GB more)"],
        ["of which before the first tensor", f"{found['start_bytes'] / GIGA:.2f} GB"],
        ["time", f"{found['seconds']:.0f} s"],
        ["of which reading the files and packing", f"{found['reading_seconds']:.0f} s"],
        ["reading the files alone", f"{found['disk_seconds']:.0f} s for {found['file_bytes'] / GIGA:.1f} GB"],
        [f"forward pass over {TOKENS} tokens, compiled", f"{found['forward_seconds']:.1f} s"],
        ["peak after it", f"{found['forward_peak_bytes'] / GIGA:.2f} GB"],
    ]
    markdown = f"# Loading {arguments.arch}, {arguments.quantise}\n\n{describe(result['environment'])}\n\n"
    write_results(arguments.output, f"loading_{arguments.arch}_cpu", result, markdown + table(["", ""], rows))
    return result


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """--folder, --arch, --shard-gigabytes, and how the base is held."""
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint; kept for the next run")
    parser.add_argument("--arch", default="llama2-7b", choices=sorted(ARCHITECTURES))
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="of the checkpoint to write")
    parser.add_argument("--quantise", default="nf4-double", choices=["nf4-double", "nf4", "none"])


def have_checkpoint(arguments: argparse.Namespace) -> None:
    """Write the checkpoint that the options ask for, if it is not there."""
    if not (arguments.folder / "config.json").is_file():
        note(f"writing {arguments.arch} with random weights to {arguments.folder}")
        write_checkpoint(arguments.folder, architecture(arguments.arch), shard_bytes=arguments.shard_gigabytes * GIGA)


def write_checkpoint(folder: Path, sizes: Architecture, *, shard_bytes: float, seed: int = 0) -> None:
    """A model folder with random fp16 weights, N(0, 0.02²) and norms near 1, in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size)}
    shapes |= {
        f"{name}.weight": shape
        for name, shape in sizes.linear_layers().items()
        if name != "lm_head" or not sizes.tie_word_embeddings
    }
    for layer in range(sizes.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (sizes.hidden_size,)
    shapes["model.norm.weight"] = (sizes.hidden_size,)
    shards: list[list[str]] = [[]]
    held = 0.0
    for name, shape in shapes.items():
        size = 2 * np.prod(shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0.0
        shards[-1].append(name)
        held += size
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(rng, shapes[name]) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(sizes, name) for name in Architecture.__dataclass_fields__},
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float16)
    rows = [rng.standard_normal((min(1024, shape[0] - at), shape[1]), np.float32) for at in range(0, shape[0], 1024)]
    return np.concatenate([(0.02 * row).astype(np.float16) for row in rows])


def _load(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from conversion import open_base
    from moka_jax.llama import load_llama

    base = open_base(arguments.folder, quantise=arguments.quantise)
    jnp.zeros(()).block_until_ready()
    start_bytes = _peak()
    begin = time.perf_counter()
    timed = _Timed(base)
    model = load_llama(timed, dtype=jnp.dtype(arguments.dtype))
    jax.block_until_ready(nnx.state(model))
    seconds, peak = time.perf_counter() - begin, _peak()
    model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    tokens = np.arange(TOKENS)[None]
    assert np.isfinite(np.asarray(forward(state, tokens))).all()
    begin = time.perf_counter()
    forward(state, tokens).block_until_ready()
    forward_seconds, forward_peak = time.perf_counter() - begin, _peak()
    files = sorted(set(base.files.values()))
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    return {
        "model_bytes": model_bytes,
        "start_bytes": start_bytes,
        "peak_bytes": peak,
        "seconds": seconds,
        "reading_seconds": timed.seconds,
        "disk_seconds": time.perf_counter() - begin,
        "file_bytes": sum(path.stat().st_size for path in files),
        "forward_seconds": forward_seconds,
        "forward_peak_bytes": forward_peak,
    }


class _Timed:
    """A base whose reading is timed."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def flax_tensors(self) -> Any:
        tensors = self._base.flax_tensors()
        while True:
            begin = time.perf_counter()
            following = next(tensors, None)
            self.seconds += time.perf_counter() - begin
            if following is None:
                return
            yield following


def _peak() -> int:
    """The most resident memory so far. (Not `ru_maxrss`, which a process takes over from the one that started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
