"""`moka generate`: a greedy completion in JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moka_cli.train import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_generate(
    base: Path, prompt: str, *, adapter: Path | None, quantise: str, max_new_tokens: int, raw: bool
) -> None:
    """Print the completion of a prompt."""
    from conversion import load_adapter
    from moka_jax import import_adapter
    from moka_jax.llama import generate

    value = None if adapter is None else load_adapter(adapter)
    tokenizer = load_tokenizer(base)
    model = load_model(base, quantise=quantise)
    if value is not None:
        import_adapter(model, value)
    tokens = prompt_tokens(tokenizer, prompt, raw=raw)
    new = generate(model, tokens, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens(tokenizer))
    print(tokenizer.decode(new, skip_special_tokens=True))


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool = False) -> list[int]:
    """The tokens that the model reads: the prompt as a user's message if the tokenizer has a chat template."""
    if raw or tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    from moka_jax.train.data import chat_text

    message = [{"role": "user", "content": prompt}]
    text = chat_text(message, tokenizer, tokenizer.get_chat_template(), prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """The tokens that end a completion."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
