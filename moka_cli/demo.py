"""`moka demo`: a real model fine-tuned in JAX, its adapter used in PyTorch, and the proof that both agree."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moka_cli.demo_base import prepare_base
from moka_cli.demo_data import write_splits
from moka_cli.generate import prompt_tokens, stop_tokens
from moka_cli.parity import check, parity_table, print_verdict
from moka_cli.pictures import plot_gates
from moka_cli.report import Completion, check_target, write_report
from moka_cli.train import attach_fresh, load_run_model, load_tokenizer
from moka_core import Adapter, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conversion.parity import ParityReport
    from moka_jax.llama import Llama
    from moka_jax.train import TrainConfig, TrainResult

HELD_OUT = 96
SEED = 0
NEW_TOKENS = 40


@dataclass
class Timer:
    """Seconds of each stage of the demo in this session."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, console: Console) -> Iterator[None]:
        """Show the stage while it runs, and note how long it took."""
        console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run_demo(output: Path, *, steps: int) -> None:
    """Every stage, reusing what an earlier run has finished; leaves a page, figures, pictures, adapter, metrics."""
    from conversion.new_folder import make_folder, write_json

    if steps < 1:
        raise ConfigError(f"steps: expected at least 1; got {steps}")
    console = Console()
    timer = Timer()
    make_folder(output)
    check_target(output / "report.html")

    with timer.stage("base model", console):
        made = prepare_base(output / "base")
        console.print("SmolLM2-135M-Instruct: " + ("unpacked" if made else "already there"))
    with timer.stage("data", console):
        train_file, eval_file = write_splits(output / "data", held_out=HELD_OUT, seed=SEED)
        counts = [sum(1 for _ in path.open()) for path in (train_file, eval_file)]
        console.print(f"docstrings of Python's standard library: {counts[0]:,} to learn, {counts[1]} held out")
    with timer.stage("training in JAX", console):
        model, tokenizer, before, result = _train(output, steps, console)
    with timer.stage("export", console):
        adapter = _export(model, output)
        console.print(f"{output / 'adapter'}: {adapter.trainable:,} parameters on {len(adapter.layers)} layers")
        after = _complete(model, tokenizer, _questions(eval_file))
    del model
    with timer.stage("PyTorch: PeftModel.from_pretrained on bitsandbytes 4-bit", console):
        in_torch = _complete_in_torch(output, tokenizer, _questions(eval_file))
        same = in_torch == after
        console.print(f"completions equal to JAX's: {'yes' if same else 'NO'}")
    completions = _completions(before, after, tokenizer, eval_file)
    page, run = output / "report.html", output / "run"
    write_report(page, run, adapter, result.step, completions=completions)
    with timer.stage("parity", console):
        console.print(f"(meanwhile: {page}, to which this is added)", highlight=False, soft_wrap=True)
        report = check(output / "adapter", output / "base", console=console, quantise="nf4-double", train=50)

    summary = _summary(result, adapter, timer, report, before, after, same, output)
    write_json(output / "report.json", summary)
    _pictures(result, adapter, output)
    write_report(page, run, adapter, result.step, parity=summary["parity"], completions=completions)
    _print(summary, report, completions, output, console)
    if not (report.passed and same):
        raise SystemExit(1)


def demo_config(output: Path, steps: int) -> TrainConfig:
    """The demo's training run: the preset `recommended` at its learning rate."""
    from moka_jax.train import TrainConfig

    return TrainConfig.from_dict(
        {
            "base": str(output / "base"),
            "output": str(output / "run"),
            "data": {
                "train": str(output / "data" / "train.jsonl"),
                "eval": str(output / "data" / "eval.jsonl"),
                "max_length": 128,
            },
            "optimiser": {"warmup_steps": min(5, steps - 1)},
            "adapter": {"preset": "recommended"},
            "steps": steps,
            "batch_size": 4,
            "dtype": "float32",
            "remat": False,
            "eval_every": max(steps // 2, 1),
            "checkpoint_every": 10,
            "seed": SEED,
        }
    )


def _train(
    output: Path, steps: int, console: Console
) -> tuple[Llama, PreTrainedTokenizerBase, dict[str, list[int]], TrainResult]:
    """The trained model, its tokenizer, the completions before training, and the run's result."""
    from conversion.new_folder import make_folder, write_json
    from moka_jax.train import train

    config = demo_config(output, steps)
    tokenizer = load_tokenizer(config.base)
    with console.status("loading and quantising"):
        model = load_run_model(config)
    kept = output / "run" / "before.json"
    questions = _questions(Path(config.data.eval or ""))
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    if before.keys() != {pair["prompt"] for pair in questions}:
        with console.status("completions before training"):
            before = _complete(model, tokenizer, questions)
        make_folder(kept.parent)
        write_json(kept, before)
    attach_fresh(model, config)
    result = train(model, tokenizer, config, console=console)
    if result.interrupted:
        console.print("start the demo again to go on from there")
        raise KeyboardInterrupt
    return model, tokenizer, before, result


def _export(model: Llama, output: Path) -> Adapter:
    from conversion import load_adapter, save_adapter
    from moka_jax import export_adapter

    save_adapter(export_adapter(model), output / "adapter", overwrite=True)
    return load_adapter(output / "adapter")


def _questions(eval_file: Path) -> list[dict[str, str]]:
    """The first two held-out pairs."""
    with eval_file.open(encoding="utf-8") as lines:
        return [json.loads(next(lines)) for _ in range(2)]


def _complete(model: Llama, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, str]]) -> dict[str, list[int]]:
    """Greedy completions in JAX, as tokens, by prompt."""
    from moka_jax.llama import generate

    stop = stop_tokens(tokenizer)
    return {
        pair["prompt"]: generate(
            model, prompt_tokens(tokenizer, pair["prompt"]), max_new_tokens=NEW_TOKENS, stop_tokens=stop
        )
        for pair in pairs
    }


def _complete_in_torch(
    output: Path, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, str]]
) -> dict[str, list[int]]:
    """The same completions from transformers with the exported adapter, loaded as any PEFT adapter is."""
    import torch
    from peft import PeftModel

    from moka_torch.probe import load_base

    model = PeftModel.from_pretrained(load_base(output / "base"), str(output / "adapter"))
    stop = stop_tokens(tokenizer)
    completions = {}
    for pair in pairs:
        tokens = torch.tensor([prompt_tokens(tokenizer, pair["prompt"])])
        whole = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        new = whole[0, tokens.shape[1] :].tolist()
        completions[pair["prompt"]] = new[: next((i for i, token in enumerate(new) if token in stop), len(new))]
    return completions


def _summary(
    result: TrainResult,
    adapter: Adapter,
    timer: Timer,
    report: ParityReport,
    before: dict[str, list[int]],
    after: dict[str, list[int]],
    same: bool,
    output: Path,
) -> dict[str, Any]:
    """The demo's figures as plain JSON values."""
    from moka_cli.params import read_architecture
    from moka_jax.train import read_metrics

    records = read_metrics(result.metrics)
    evaluations = [record for record in records if record["kind"] == "eval"]
    base = read_architecture(str(output / "base")).parameters()
    return {
        "held_out_loss": {"before": evaluations[0]["loss"], "after": evaluations[-1]["loss"]},
        "steps": result.step,
        "trainable": adapter.trainable,
        "share": adapter.trainable / base,
        "training_seconds_of_the_whole_run": max(record.get("seconds", 0.0) for record in records),
        "seconds_in_this_session": timer.seconds,
        "peak_memory_gb_in_this_session": peak_memory_gb(),
        "completions": {"before": before, "after": after, "same_in_pytorch": same},
        "parity": report.to_dict(),
    }


def peak_memory_gb() -> float:
    """The most memory that this process has had resident, in GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _pictures(result: TrainResult, adapter: Adapter, output: Path) -> None:
    from conversion.new_folder import new_file
    from moka_jax.train import plot_losses, read_metrics

    with new_file(output / "loss.png") as draft:
        plot_losses(read_metrics(result.metrics), draft)
    with new_file(output / "gates.png") as draft:
        plot_gates(adapter, draft)


def _completions(
    before: dict[str, list[int]], after: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, eval_file: Path
) -> list[Completion]:
    """What the model wrote before and after, beside what stands in the held-out examples."""

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    return [
        Completion(
            prompt=pair["prompt"],
            before=text(before[pair["prompt"]]),
            after=text(after[pair["prompt"]]),
            wanted=pair["completion"],
        )
        for pair in _questions(eval_file)
    ]


def _print(
    summary: dict[str, Any], report: ParityReport, completions: list[Completion], output: Path, console: Console
) -> None:
    console.rule("[bold]report", align="left")
    table = Table(show_header=False)
    losses = summary["held_out_loss"]
    table.add_row("held-out loss", f"{losses['before']:.4f} before, [bold]{losses['after']:.4f}[/bold] after")
    table.add_row("optimiser steps", str(summary["steps"]))
    table.add_row("trainable parameters", f"{summary['trainable']:,} ({summary['share']:.3%} of the model)")
    training = summary["training_seconds_of_the_whole_run"] / 60
    session = sum(summary["seconds_in_this_session"].values()) / 60
    table.add_row("time", f"{training:.1f} minutes of training; {session:.1f} minutes in this session")
    table.add_row("peak memory", f"{summary['peak_memory_gb_in_this_session']:.1f} GB in this session")
    console.print(table)
    for completion in completions:
        console.print(f"\n[bold]{escape(completion.prompt)}[/bold]")
        shown = {"before": completion.before, "after": completion.after, "docstring": completion.wanted or ""}
        for when, text in shown.items():
            console.print(f"  [dim]{when:>9}:[/dim] {escape(' '.join(text.split()))}", highlight=False, soft_wrap=True)
    console.print()
    console.print(parity_table(report))
    print_verdict(report, console)
    files = "report.html, report.json, loss.png, gates.png, adapter/, run/metrics.jsonl"
    console.print(f"{output}/: {files}", highlight=False, soft_wrap=True)
