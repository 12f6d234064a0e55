"""Our LLaMA as a model of lm-evaluation-harness: likelihoods of answers, perplexity, and generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moka_core import ConfigError, DataError, ModelError
from moka_core.harness import MAX_NEW, HarnessTokenizer
from moka_jax.llama.generate import padded_length, stream
from moka_jax.llama.model import Llama
from moka_jax.llama.sampling import Sampling

_PLACES = 128  # positions that the output head sees at once
_IDLE = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "use_cache": True}  # what they must be

Request = tuple[Any, list[int], list[int]]


class FlaxLM(HarnessTokenizer, TemplateLM):
    """A `Llama`, with or without an adapter, for `lm_eval.evaluator.evaluate` and `simple_evaluate`.

    Args:
        model: in the dtype that it computes in.
        tokenizer: of transformers; texts become tokens as in lm-eval's HFLM.
        batch_size: texts that are read at once; changes no figure but by rounding.
        stop_tokens: end a generated text, beside the tokenizer's end token.

    Raises:
        ConfigError: batch_size is below 1.

    What is longer than the model's context is refused, where HFLM cuts it.
    """

    def __init__(self, model: Llama, tokenizer: Any, *, batch_size: int = 8, stop_tokens: Collection[int] = ()) -> None:
        super().__init__(tokenizer)
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1; got {batch_size}")
        self.model = model
        self.batch_size = batch_size
        self.stop_tokens = frozenset({self.eot_token_id, *stop_tokens})

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text in nats; a longer one than the context in windows, each token predicted once."""
        windows: list[Request] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt up to the first of its stop texts, which is not part of it.

        Raises:
            ConfigError: see `generation`.
            DataError: a prompt and its new tokens do not fit the context.
        """
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        for numbers in alike.values():
            stops, max_new, sampling = generation(requests[numbers[0]].args[1])
            stops = handle_stop_sequences(stops, self.tokenizer.decode(self.eot_token_id))
            rows = {number: self.prompt_tokens(requests[number].args[0]) for number in numbers}
            numbers.sort(key=lambda number: len(rows[number]))
            for start in range(0, len(numbers), self.batch_size):
                some = numbers[start : start + self.batch_size]
                steps = stream(
                    self.model,
                    [rows[number] for number in some],
                    max_new_tokens=max_new,
                    stop_tokens=self.stop_tokens,
                    sampling=sampling,
                    row_keys=some,
                )
                for number, text in zip(some, self._until(steps, len(some), stops), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _until(self, steps: Iterator[list[int | None]], rows: int, stops: list[str]) -> list[str]:
        """The rows' texts up to a stop; steps are taken until every row has one, or has ended."""
        tokens: list[list[int]] = [[] for _ in range(rows)]
        texts, done = [""] * rows, [False] * rows
        for step in steps:
            for row, token in enumerate(step):
                if token is not None and not done[row]:
                    tokens[row].append(token)
                    texts[row] = self.tokenizer.decode(tokens[row], skip_special_tokens=True)
                    done[row] = any(stop in texts[row] for stop in stops if stop)
            if all(done):
                break
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether each of its tokens is the likeliest) of every request.

        Requests that differ in the last token alone are one row of a batch.
        """
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            inputs = (*context, *continuation)[:-1]
            if len(inputs) > self.max_length or not context or not continuation:
                raise DataError(
                    f"expected a context and a continuation of at least a token each, and of {self.max_length + 1} "
                    f"together at most; got {len(context)} and {len(continuation)}"
                )
            asked.setdefault(inputs, []).append(number)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches(list(asked)):
            told = [(row, number) for row, inputs in enumerate(batch) for number in asked[inputs]]
            places = [
                (row, len(requests[number][1]) - 1 + step, token)
                for row, number in told
                for step, token in enumerate(requests[number][2])
            ]
            logs, likeliest = self._at(batch, np.array(places, np.int32))
            end = 0
            for _, number in told:
                start, end = end, end + len(requests[number][2])
                found[number] = (float(logs[start:end].sum()), bool(likeliest[start:end].all()))
                if requests[number][0] is not None:  # a whole text's windows have no name of their own
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of similar lengths together, the longest first."""
        batch: list[tuple[int, ...]] = []
        for row in sorted(rows, key=len, reverse=True):
            full = len(batch) == self.batch_size
            if batch and (full or (self._exact(len(batch[0])) and len(row) != len(batch[0]))):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _exact(self, length: int) -> bool:
        """Whether padding would change the rotary angles of a row of this length."""
        rope = self.model.config.rope
        return rope.kind in ("dynamic", "longrope") and self._padded(length) > rope.original_max_position

    def _padded(self, length: int) -> int:
        return padded_length(length, self.max_length)

    def _at(self, batch: list[tuple[int, ...]], places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p of the token of each place, float64, and whether it is the likeliest there.

        Args:
            batch: rows of tokens.
            places: (places, 3): row, position that has read all before the token, token.
        """
        longest = max(map(len, batch))
        tokens = np.zeros((self.batch_size, longest if self._exact(longest) else self._padded(longest)), np.int32)
        for padded, row in zip(tokens, batch, strict=False):
            padded[: len(row)] = row
        graphdef, state = nnx.split(self.model)
        hidden = _hidden(graphdef, state, tokens)
        count = -(-len(places) // _PLACES) * _PLACES
        filled = np.zeros((count, 3), np.int32)
        filled[: len(places)] = places
        parts = [_score(graphdef, state, hidden, filled[at : at + _PLACES]) for at in range(0, count, _PLACES)]
        logs, likeliest = (np.concatenate([np.asarray(part[index]) for part in parts]) for index in (0, 1))
        if not np.isfinite(logs[: len(places)]).all():
            raise ModelError(
                "the model's logits are not finite; its weights or its adapter may hold NaN or infinite entries, or "
                f"overflow in {jnp.dtype(self.model.dtype).name}"
            )
        return logs[: len(places)].astype(np.float64), likeliest[: len(places)]


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).hidden(tokens)


@partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef, state: nnx.State, hidden: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p of each place's token, (places,), float32, and whether no token is likelier; see `FlaxLM._at`."""
    rows, positions, targets = places.T
    logits = nnx.merge(graphdef, state).head(hidden[rows, positions])
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[:, None], axis=-1)[:, 0]
    return logs, jnp.argmax(logits, axis=-1) == targets


def generation(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """(stop texts, the most new tokens, how a token is chosen) of a task's `generation_kwargs`.

    Raises:
        ConfigError: a setting that is not supported here, or one out of range.
    """
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), MAX_NEW))
    stops, most = wanted.pop("until"), wanted.pop("max_gen_toks")
    draws, temperature = wanted.pop("do_sample"), wanted.pop("temperature", 0.0)
    kept = {name: wanted.pop(name, None) for name in ("top_k", "top_p")}
    foreign = {name: value for name, value in wanted.items() if name not in _IDLE or value != _IDLE[name]}
    if foreign:
        raise ConfigError(
            f"generation_kwargs: expected until, max_gen_toks, do_sample, temperature, top_k, top_p; got {foreign}; "
            "--backend torch takes all that transformers does"
        )
    if draws and not temperature:
        raise ConfigError("generation_kwargs: do_sample: true needs a temperature above 0")
    return stops, most, Sampling(temperature=temperature, **kept) if draws else Sampling()
