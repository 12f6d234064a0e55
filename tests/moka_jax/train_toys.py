"""A byte-level tokenizer with a chat template, a one-layer model and small data sets, for the tests of training."""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moka_core import MokaConfig, MokaError
from moka_jax import MokaParam, attach
from moka_jax.train import TrainConfig, TrainResult, read_metrics, train

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A config of a run that lacks nothing; what it names need not be there.
LEAST_CONFIG: dict[str, Any] = {
    "base": "b",
    "output": "o",
    "data": {"train": "t"},
    "optimiser": {"learning_rate": 1e-3},
    "steps": 100,
    "batch_size": 1,
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(
    template: str | None = TEMPLATE,
    *,
    merges: tuple[tuple[str, str], ...] = (),
    bos: bool = False,
    eos: bool = False,
) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each merge; `bos` and `eos` make the tokenizer add <s> and </s> to plain texts."""
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos or eos:
        from tokenizers.processors import TemplateProcessing

        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    return fast


class ToyModel(nnx.Module):
    """Each token predicts the next from itself and the mean of those before: embed, two linear layers, head."""

    def __init__(self, vocabulary: int, size: int = 12) -> None:
        rngs = nnx.Rngs(7)
        self.embed = nnx.Embed(vocabulary, size, rngs=rngs)
        self.q_proj = nnx.Linear(size, size, rngs=rngs)
        self.v_proj = nnx.Linear(size, size, rngs=rngs)
        self.head = nnx.Linear(size, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        counts = jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
        x = x + jnp.tanh(self.v_proj(jnp.cumsum(x, axis=1) / counts))
        return self.head(x + jnp.tanh(self.q_proj(x)))


class PackableModel(ToyModel):
    """The same, of the tokens before in the same segment; a token's position moves it a little."""

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        segments = jnp.zeros_like(tokens) if segments is None else segments
        x = self.embed(tokens) + 0.1 * jnp.sin(positions)[..., None]
        time = jnp.arange(tokens.shape[1])
        seen = (segments[:, :, None] == segments[:, None, :]) & (time[:, None] >= time)
        x = x + jnp.tanh(self.v_proj(seen @ x / seen.sum(-1, keepdims=True)))
        return self.head(x + jnp.tanh(self.q_proj(x)))


def make_model(
    *, vocabulary: int = 261, dropout: float = 0.1, seed: int = 0, kind: type[ToyModel] = ToyModel
) -> ToyModel:
    """A toy model with an adapter that is non-zero everywhere.

    NumPy draws the numbers: those of JAX differ in the last bit with how they are compiled, so between processes.
    """
    model = kind(vocabulary)
    attach(model, MokaConfig(r=3, num_shapes=2, dropout=dropout, target_modules=("q_proj",)), seed=seed)
    for kind_of, scale, rng in (
        (nnx.Not(MokaParam), 0.3, np.random.default_rng(7)),
        (MokaParam, 0.3, np.random.default_rng(seed + 1)),
    ):
        drawn = jax.tree.map(
            lambda leaf, scale=scale, rng=rng: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype),
            nnx.state(model, kind_of),
        )
        nnx.update(model, drawn)
    return model


def write_lines(path: Path, values: list[Any]) -> str:
    """A JSON-lines file; a value of str is written as it is."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_data(folder: Path) -> tuple[str, str]:
    """13 examples to learn, of different lengths, and 5 held-out ones."""
    learn = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n + 1)))} for n in range(13)]
    held = [{"prompt": f"say {n}", "completion": f"{n} {n}" * (n + 1)} for n in range(5)]
    return write_lines(folder / "train.jsonl", learn), write_lines(folder / "eval.jsonl", held)


def make_config(folder: Path, **changes: Any) -> TrainConfig:
    """A run of 7 steps; changes are fields of TrainConfig, or "data.max_length" and the like in a dict."""
    train, held = write_data(folder)
    values: dict[str, Any] = {
        "base": "toy",
        "output": str(folder / "run"),
        "data": {"train": train, "eval": held, "max_length": 96},
        "optimiser": {"learning_rate": 0.02, "warmup_steps": 2},
        "steps": 7,
        "batch_size": 3,
        "accumulate": 2,
        "eval_every": 3,
        "checkpoint_every": 4,
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return TrainConfig.from_dict(values)


def poison(model: ToyModel) -> ToyModel:
    """The model, which now computes NaN for every text with a "~" in it."""
    token = make_tokenizer().convert_tokens_to_ids("~")
    model.embed.embedding[...] = model.embed.embedding[...].at[token].set(jnp.nan)
    return model


def write_poisoned_data(folder: Path) -> str:
    """The examples of `write_data`, and one with a "~"."""
    learn = [json.loads(line) for line in Path(write_data(folder)[0]).read_text().splitlines()]
    return write_lines(folder / "poisoned.jsonl", [*learn, {"prompt": "count", "completion": "1 ~ 2"}])


Ended = tuple[TrainResult, ToyModel, str]


def run(
    folder: Path, on_step: Callable[..., None] | None = None, *, model: ToyModel | None = None, **changes: Any
) -> Ended:
    """The result of a run, its model, and what it printed."""
    folder.mkdir(exist_ok=True)
    model = make_model() if model is None else model
    console = Console(file=io.StringIO(), width=40)
    result = train(model, make_tokenizer(), make_config(folder, **changes), on_step=on_step, console=console)
    return result, model, console.file.getvalue()


def losses(path: Path) -> list[tuple[Any, ...]]:
    """Every record without what depends on the clock, or on how often the run was started."""
    names = ("kind", "step", "loss", "learning_rate", "grad_norm", "tokens", "reason", "skipped", "gates")
    return [tuple(record.get(name) for name in names) for record in read_metrics(path) if record["kind"] != "start"]


def assert_same_end(one: Ended, other: Ended) -> None:
    """The same records, clocks apart, and the same bits."""
    assert losses(one[0].metrics) == losses(other[0].metrics)
    for a, b in zip(arrays(nnx.state(one[1])), arrays(nnx.state(other[1])), strict=True):
        assert a.tobytes() == b.tobytes()  # NaN included


def arrays(state: Any) -> list[np.ndarray]:
    """Copies of all arrays of a state, in order."""
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]


def _process(folder: Path, mode: str) -> None:
    """A run in a process of its own, whose end is told in JSON; for what must not be done to the tests' process.

    "slow": every step takes a while. "stuck": step 2 never ends. "full": the disk, or what a file may grow to, is full;
    first for the metrics of step 6, then, in the folder "checkpoint", for the checkpoint of step 7.
    """

    def on_step(step: int, *_: Any) -> None:
        print(f"step {step}", flush=True)
        if mode == "slow":
            time.sleep(0.2)
        if mode == "stuck" and step == 2:
            time.sleep(60)
        if mode == "full" and step == 5:
            metrics = folder / "run" / "metrics.jsonl"
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 20, resource.RLIM_INFINITY))

    def fill_up(step: int, *_: Any) -> None:
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    if mode != "full":
        result, _, printed = run(folder, on_step)
        print(json.dumps({"step": result.step, "interrupted": result.interrupted, "printed": printed}), flush=True)
        return
    told = []
    for where, hook, changes in (
        (folder, on_step, {}),
        (folder / "checkpoint", fill_up, {"data": {"eval": None}, "log_every": 7}),
    ):
        try:
            run(where, hook, **changes)
        except MokaError as error:
            told.append({"type": type(error).__name__, "message": str(error)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    _process(Path(sys.argv[1]), sys.argv[2])
