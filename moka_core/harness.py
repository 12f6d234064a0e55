"""How the texts of lm-evaluation-harness become tokens, the same for a check of a task and for every backend."""

from __future__ import annotations

from typing import Any

MAX_NEW = 256  # tokens, where a task does not say: as lm-eval's model of transformers


class HarnessTokenizer:
    """The rules by which lm-eval's model of transformers, HFLM, reads a text; for a class that is a `TemplateLM`, too.

    Args:
        tokenizer: of transformers.

    Holds: special tokens are what the tokenizer adds by itself, unless the text begins with a start token already.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer: Any = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before: the start token, else the end token."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text whose likelihood is asked for, or of what stands before it."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """The tokens of a text that is to be continued."""
        start = self.tokenizer.bos_token
        return self._encode(prompt, False if start is not None and prompt.startswith(start) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """What the tokenizer's chat template writes for messages; the last one is left open if nothing is added."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _encode(self, text: str, special: bool | None) -> list[int]:
        return list(self.tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special})))
