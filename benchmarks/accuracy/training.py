"""One run: an adapter on the base, trained on the answers of a task's questions, and scored on a split."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.scoring import Answer, Scores, answer_log_likelihoods, encode, score
from benchmarks.accuracy.tasks import Question, Task
from moka_core import Architecture, dequantise_nf4, quantise_nf4


@dataclass(frozen=True, kw_only=True)
class Run:
    """What tells one run from another.

    Args:
        task: of `TASKS`.
        method: of `METHODS`.
        rate: the learning rate's peak.
        seed: of the adapter's start, the order of the questions and dropout.
        split: what it is scored on.
        epochs: over the questions for training.
        batch: questions a step.
        dtype: "float32", or "bfloat16": the base's weights, and what is computed with them, as QLoRA does it; the
            adapter's own parameters stay float32.
    """

    task: str
    method: str
    rate: float
    seed: int
    split: str
    epochs: int = 1
    batch: int = 16
    dtype: str = "float32"


class Base:
    """A model whose linear layers of the blocks have the weights that NF4 with double quantisation decodes to.

    Every method is put onto a copy of it: what bitsandbytes computes on its 4-bit layers in that dtype, but for the
    order of sums, and the only base that LoKr of PEFT takes. Its time and memory are not those of a 4-bit base;
    `benchmarks.train_step` and `benchmarks.memory` measure these.

    Args:
        folder: of the model.
        device: "cpu" or "cuda".
        dtype: see `Run`.
    """

    def __init__(self, folder: Path, device: str, dtype: str = "float32") -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # On a CPU, PyTorch's fused attention takes four times as long for short rows in bfloat16 as plain products do.
        how = {"attn_implementation": "eager"} if device == "cpu" else {}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and path != "lm_head":
                weight = quantise_nf4(layer.weight.detach().numpy(), double=True)
                layer.weight.data = torch.from_numpy(dequantise_nf4(weight))
        self.architecture = Architecture.from_hf_config(model.config.to_dict())
        self.longest: int = model.config.max_position_embeddings
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        self.device, self.dtype = device, dtype
        self.model = model.to(device).requires_grad_(False)

    def with_adapter(self, method: str, seed: int) -> Any:
        """A copy of the model with a new adapter, as PEFT makes it."""
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(self.model), METHODS[method].config(self.architecture))

    def precision(self) -> torch.autocast:
        """In which an adapter, whose parameters are float32, is computed on this base."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def score(self, questions: Sequence[Question], model: nn.Module | None = None) -> Scores:
        """The model's scores, or those of another with its tokenizer."""
        with self.precision():
            return score(self.model if model is None else model, self.tokenizer, questions, longest=self.longest)


def execute(run: Run, base: Base, task: Task) -> dict[str, Any]:
    """Train and score; the row of the run, on a base of its dtype."""
    assert base.dtype == run.dtype
    model = base.with_adapter(run.method, run.seed)
    began = time.perf_counter()
    losses = train(model, base, task.train, run)
    trained = time.perf_counter() - began
    scores = base.score(task.split(run.split), model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        **asdict(run),
        "parameters": trainable,
        "steps": len(losses),
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "train_seconds": round(trained, 1),
        **figures(scores),
    }


def figures(scores: Scores) -> dict[str, Any]:
    """The figures of a split, and of each question.

    `accuracy_each` and `accuracy_norm_each` are a text of 0 and 1, `lost_each` has the nats of the right answers.
    """
    lost = [round(value, 3) for value in scores.lost]
    result: dict[str, Any] = {"questions": len(scores.right), "loss": scores.loss, "lost_each": lost}
    for name, normalised in (("accuracy", False), ("accuracy_norm", True)):
        picked = scores.picked(normalised=normalised)
        result[name] = scores.accuracy(normalised=normalised)
        result[f"{name}_each"] = "".join(str(int(a == b)) for a, b in zip(picked, scores.right, strict=True))
    return result


def train(model: Any, base: Base, questions: Sequence[Question], run: Run) -> list[float]:
    """The loss of every step: AdamW without decay, 10 % of warm-up, then linearly to 0; gradients of norm 1 at most.

    A step's loss is the mean over the answers' tokens of its batch, the end of the text included. The gates' logits
    have the method's `gate_rate` times the learning rate.
    """
    answers = [
        encode(base.tokenizer, question.prompt, question.choices[question.right], longest=base.longest, end=True)
        for question in questions
    ]
    generator = torch.Generator().manual_seed(run.seed)
    gates, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (gates if "moka_gate_logits" in name else others).append(parameter)
    parameters = others + gates
    groups = [{"params": others}, {"params": gates, "lr": run.rate * METHODS[run.method].gate_rate}]
    optimiser = torch.optim.AdamW(groups, lr=run.rate, weight_decay=0.0)
    steps = run.epochs * math.ceil(len(answers) / run.batch)
    schedule = get_scheduler("linear", optimiser, num_warmup_steps=round(0.1 * steps), num_training_steps=steps)
    model.train()
    losses = []
    for _ in range(run.epochs):
        for batch in _shuffled(answers, run.batch, generator):
            with base.precision():
                values = answer_log_likelihoods(model, batch, pad=base.tokenizer.eos_token_id)
            loss = -torch.cat(values).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


def _shuffled(answers: Sequence[Answer], size: int, generator: torch.Generator) -> Iterator[list[Answer]]:
    """Batches in a random order, each of similar lengths: of every eight that are drawn, the answers are sorted."""
    order = torch.randperm(len(answers), generator=generator).tolist()
    for start in range(0, len(order), 8 * size):
        some = sorted(order[start : start + 8 * size], key=lambda number: len(answers[number].tokens))
        batches = [some[first : first + size] for first in range(0, len(some), size)]
        for which in torch.randperm(len(batches), generator=generator).tolist():
            yield [answers[number] for number in batches[which]]
