"""A byte-level tokenizer with a chat template, a one-layer model and small data sets, for the tests of training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moka_core import MokaConfig
from moka_jax import MokaParam, attach
from moka_jax.train import TrainConfig

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(
    template: str | None = TEMPLATE, *, merges: tuple[tuple[str, str], ...] = (), bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each merge; `bos` makes the tokenizer add <s> to plain texts."""
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
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


def make_model(*, vocabulary: int = 261, dropout: float = 0.1, seed: int = 0) -> ToyModel:
    """A toy model with an adapter that is non-zero everywhere."""
    model = ToyModel(vocabulary)
    attach(model, MokaConfig(r=3, num_shapes=2, dropout=dropout, target_modules=("q_proj",)), seed=seed)
    state = nnx.state(model, MokaParam)
    rng = np.random.default_rng(seed + 1)
    nnx.update(
        model, jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), state)
    )
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


@contextlib.contextmanager
def quick_compilation(folder: Path) -> Iterator[None]:
    """Compile without optimising, and once: compiled functions are kept in a folder for the same run in other tests."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def arrays(state: Any) -> list[np.ndarray]:
    """Copies of all arrays of a state, in order."""
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]
