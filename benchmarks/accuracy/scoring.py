"""The likelihood of answers: log p(answer | prompt), token by token, and the figures of a split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.tasks import Question
from moka_core import DataError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt and one answer in tokens; the answer begins at `start`."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model says of a split's questions.

    Args:
        log_likelihoods: of every choice of every question, in nats.
        characters: of every choice, without the space before it.
        right: the number of the right choice of every question.
        tokens: of every right answer.
    """

    log_likelihoods: Sequence[Sequence[float]]
    characters: Sequence[Sequence[int]]
    right: Sequence[int]
    tokens: Sequence[int]

    @property
    def lost(self) -> list[float]:
        """The negative log-likelihood of every question's right answer, in nats."""
        return [-values[right] for values, right in zip(self.log_likelihoods, self.right, strict=True)]

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood of the right answers' tokens, in nats."""
        return sum(self.lost) / sum(self.tokens)

    def picked(self, *, normalised: bool) -> list[int]:
        """The choice of the largest log-likelihood, by character or not, of every question; the first of equals."""
        picks = []
        for values, sizes in zip(self.log_likelihoods, self.characters, strict=True):
            known = [value if math.isfinite(value) else -math.inf for value in values]  # of a run that diverged
            scaled = [value / size if normalised else value for value, size in zip(known, sizes, strict=True)]
            picks.append(scaled.index(max(scaled)))
        return picks

    def accuracy(self, *, normalised: bool) -> float:
        """The share of questions of which the right choice is picked."""
        picks = self.picked(normalised=normalised)
        return sum(pick == right for pick, right in zip(picks, self.right, strict=True)) / len(picks)


def encode(tokenizer: Any, prompt: str, answer: str, *, longest: int, end: bool = False) -> Answer:
    """A prompt and an answer in tokens.

    Args:
        tokenizer: of transformers.
        longest: the most tokens that the model takes.
        end: append the end-of-text token to the answer: training teaches the model to stop.

    Raises:
        DataError: together they are longer than `longest`, or the answer changes the prompt's tokens.
    """
    before = tokenizer(prompt).input_ids
    tokens = tokenizer(prompt + answer).input_ids
    if tokens[: len(before)] != before or len(tokens) == len(before):
        raise DataError(
            f"expected an answer that adds tokens to its prompt; {answer!r} does not, after {prompt[-40:]!r}"
        )
    if end:
        tokens = [*tokens, tokenizer.eos_token_id]
    if len(tokens) > longest:
        raise DataError(f"expected at most {longest} tokens; got {len(tokens)} for {prompt[:60]!r}")
    return Answer(tokens=tuple(tokens), start=len(before))


def answer_log_likelihoods(model: nn.Module, answers: Sequence[Answer], *, pad: int) -> list[Tensor]:
    """log p of every answer's tokens given what stands before each, in nats, float32; differentiable.

    The output head sees the answers' positions alone. Without a gradient it computes in float32: bfloat16 has steps of
    1/16 at a logit of 10, which would decide between choices.

    Args:
        model: a causal model of transformers, or what PEFT made of one.
        pad: a token to fill up with behind the answers, where nothing that counts can attend to it.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    width = max(len(answer.tokens) for answer in answers)
    rows = torch.full((len(answers), width), pad)
    for row, answer in enumerate(answers):
        rows[row, : len(answer.tokens)] = torch.tensor(answer.tokens)
    places = torch.arange(width)
    first = torch.tensor([answer.start for answer in answers])[:, None]
    last = torch.tensor([len(answer.tokens) for answer in answers])[:, None]
    told = ((places >= first) & (places < last)).to(device)
    rows = rows.to(device)
    hidden = base.model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1][told[:, 1:]]
    if torch.is_grad_enabled():
        logits = base.lm_head(hidden).float()
    else:
        with torch.autocast(device.type, enabled=False):
            logits = nn.functional.linear(hidden.float(), base.lm_head.weight.float())
    values = -nn.functional.cross_entropy(logits, rows[told], reduction="none")
    return list(values.split([len(answer.tokens) - answer.start for answer in answers]))


@torch.no_grad()
def score(model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, longest: int, batch: int = 32) -> Scores:
    """The likelihood of every choice of every question, without its end; `batch` rows at a time, by their length."""
    rows = [
        (number, choice, encode(tokenizer, question.prompt, text, longest=longest))
        for number, question in enumerate(questions)
        for choice, text in enumerate(question.choices)
    ]
    found = [[math.nan] * len(question.choices) for question in questions]
    tokens = [0] * len(questions)
    training = model.training
    model.eval()
    for some in _batches(sorted(rows, key=lambda row: len(row[2].tokens)), batch):
        values = answer_log_likelihoods(model, [answer for _, _, answer in some], pad=tokenizer.eos_token_id)
        for (number, choice, _), value in zip(some, values, strict=True):
            found[number][choice] = float(value.double().sum())
            if choice == questions[number].right:
                tokens[number] = len(value)
    model.train(training)
    return Scores(
        log_likelihoods=found,
        characters=[[len(choice) - 1 for choice in question.choices] for question in questions],
        right=[question.right for question in questions],
        tokens=tokens,
    )


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
