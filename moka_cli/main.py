"""The command line: what each command takes, and how a failure ends."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from moka_cli.options import (
    AdapterFolder,
    AllowOtherBase,
    Base,
    Checkpoint,
    Dtype,
    Fields,
    Held,
    JsonFile,
    MovedBase,
    NewAdapter,
    Preset,
    Quantise,
    Run,
    Schema,
    Version,
)
from moka_core.errors import MokaError

app = typer.Typer(
    name="moka",
    help="Adapt LLaMA-family models with mixtures of Kronecker adapters, in JAX and in PyTorch.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Version = False,
) -> None:
    """Each command has its own --help with an example."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("report"),
    steps: Annotated[int, typer.Option(help="Optimiser steps; 80 or more show a clear fall of the loss.")] = 100,
) -> None:
    """Fine-tune a real model in JAX, load the adapter in PyTorch, and prove that both agree.

    Takes SmolLM2-135M in 4 bits, teaches it what the functions of Python's standard library do, exports the adapter,
    loads it with plain PEFT on bitsandbytes, and prints a report. No model hub is needed. Stop it with Ctrl-C and
    start it again: it goes on where it was.

    [dim]Example: moka demo --output report[/dim]
    """
    from moka_cli.demo import run_demo

    run_demo(output, steps=steps)


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the settings of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change, as key.sub=value.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the first examples, say what memory each part will take, and stop.")
    ] = False,
    schema: Schema = False,
) -> None:
    """Train an adapter in JAX, or go on with a run that was stopped.

    [dim]Example: moka train run.yaml steps=500 optimiser.learning_rate=5e-3[/dim]

    A config has at least: base (a model folder), output, data.train (JSON lines with prompt/completion, messages or
    text), steps and batch_size, and optimiser.learning_rate where the preset has none. An unknown key is an error, with
    the nearest known one. With --schema, editors complete and check a config: begin it with the line
    "# yaml-language-server: $schema=run.schema.json".

    [dim]Example: moka train --schema > run.schema.json[/dim]
    """
    from moka_cli.train import run_dry, run_train

    for given in (str(config), *(overrides or [])):
        if given.startswith("-"):
            setting = given.strip("-").partition("=")[0].replace("-", "_")
            raise typer.BadParameter(
                f"No such option: {given}; the options are --dry-run, --schema and --help, and settings of the run "
                f"are given without dashes: {setting}=VALUE"
            )
    (run_dry if dry_run else run_train)(config, overrides or [])


@app.command()
def export(run: Run, out: NewAdapter, base: MovedBase = None, checkpoint: Checkpoint = "last") -> None:
    """Write a run's adapter as a folder that both backends load, PEFT included.

    [dim]Example: moka export runs/first adapters/first[/dim]
    """
    from moka_cli.train import run_export

    run_export(run, out, base=base, which=checkpoint)


@app.command()
def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="The page to write; RUN/report.html by default.")] = None,
    base: MovedBase = None,
    checkpoint: Checkpoint = "last",
    parity: Annotated[Path | None, typer.Option(help="Show the figures that moka parity --json wrote.")] = None,
    before: Annotated[
        Path | None, typer.Option(help="Show completions: the lines that moka generate --json wrote without --adapter.")
    ] = None,
    after: Annotated[Path | None, typer.Option(help="The lines of the same prompts with --adapter.")] = None,
) -> None:
    """Write what a run did as one page of HTML: losses, gates over time, norms of ΔW, settings, versions.

    The page loads nothing from elsewhere, so it can be mailed or kept as it is. A page of an earlier call is replaced.

    [dim]Example: moka report runs/first --parity parity.json[/dim]
    """
    from moka_cli.report import run_report

    run_report(run, out=out, base=base, which=checkpoint, parity=parity, before=before, after=after)


@app.command()
def lora(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Argument(help="LoRA folder to write; it must not exist yet.")],
    rank: Annotated[int | None, typer.Option(help="The rank k, the same for every layer.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Take the smallest rank at which no layer's relative error is above this.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="With --max-error: the largest rank to write.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the written factors.")] = "float32",
    base: Annotated[
        Path | None, typer.Option(help="The base model's folder: measure the error in logits, too.")
    ] = None,
    quantise: Quantise = None,
    allow_other_base: AllowOtherBase = False,
    json_: JsonFile = None,
) -> None:
    """Write an adapter as a plain PEFT LoRA, for servers that take nothing else, and say what that loses.

    Each layer gets the best approximation of its ΔW that has this rank. Give either --rank or --max-error.

    [dim]Example: moka lora report/adapter lora --rank 64 --base report/base[/dim]
    """
    from moka_cli.lora import run_lora

    run_lora(
        adapter,
        out,
        rank=rank,
        max_error=max_error,
        max_rank=max_rank,
        dtype=dtype,
        base=base,
        quantise=quantise,
        allow_other_base=allow_other_base,
        json_file=json_,
    )


@app.command()
def parity(
    adapter: AdapterFolder,
    base: Annotated[Path, typer.Option(help="The base model's folder, dense or packed by bitsandbytes.")],
    backend: Annotated[
        Literal["both", "jax", "torch"], typer.Option(help="Both against each other, or one against float64 in NumPy.")
    ] = "both",
    quantise: Quantise = None,
    train: Annotated[
        int | None, typer.Option(help="Optimiser steps to compare; 0 leaves them out. 50 if both backends run.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="1 x 16 tokens, no optimiser steps.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Rows of tokens; by default 2.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; by default 64.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tokens, where the base has no tokenizer.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Show the difference of every module's output.")] = False,
    allow_other_base: AllowOtherBase = False,
    json_: JsonFile = None,
) -> None:
    """Prove that an adapter computes the same in JAX and in PyTorch, or in one of them and by definition.

    Compares frozen weights bit for bit, ΔW with the float64 oracle, logits, next tokens, gradients, and the losses of
    identical optimiser steps, each with its bound. Where they disagree it names the first module that differs, by how
    much, and the likely cause. Exit status: 0 they agree, 3 they disagree, 1 it could not be compared.

    [dim]Example: moka parity report/adapter --base report/base[/dim]

    [dim]In a CI that has one backend: moka parity my-adapter --base my-base --backend torch --quick[/dim]
    """
    from moka_cli.parity import run_parity

    run_parity(
        adapter,
        base,
        json_file=json_,
        trace=trace,
        backend=backend,
        quantise=quantise,
        train=train,
        quick=quick,
        batch_size=batch_size,
        length=length,
        seed=seed,
        allow_other_base=allow_other_base,
    )


@app.command()
def merge(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Argument(help="Model folder to write; it must not exist yet.")],
    base: Base,
    dtype: Annotated[Dtype, typer.Option(help="Of the merged weights.")] = "bfloat16",
    pack: Annotated[
        Literal["nf4-double", "nf4"] | None,
        typer.Option(
            help="Write linear weights in 4 bits, as QLoRA or without double quantisation; loses small updates."
        ),
    ] = None,
    quantise: Quantise = None,
    max_shard_gb: Annotated[float, typer.Option(help="Largest file, in GB; one is in memory at a time.")] = 1.0,
    allow_other_base: AllowOtherBase = False,
    json_: JsonFile = None,
) -> None:
    """Write base and adapter as one model folder, which transformers loads without moka or PEFT.

    W + ΔW is rounded once. Needs neither JAX nor PyTorch, and memory for one shard; a 7B model stays below 4 GB.

    [dim]Example: moka merge report/adapter merged --base report/base[/dim]
    """
    from moka_cli.merge import run_merge

    run_merge(
        adapter,
        out,
        base=base,
        dtype=dtype,
        pack=pack,
        quantise=quantise,
        max_shard_gb=max_shard_gb,
        allow_other_base=allow_other_base,
        json_file=json_,
    )


@app.command()
def generate(
    base: Base,
    prompt: Annotated[list[str] | None, typer.Option(help="What to complete; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='File with a prompt a line; .jsonl: JSON strings, or objects with "prompt".')
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder; without one the base model answers.")] = None,
    allow_other_base: AllowOtherBase = False,
    quantise: Quantise = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to add to each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; above: draw one.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among this many of the most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest tokens with this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts read at once; changes no completion.")] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json",
            dir_okay=False,
            allow_dash=True,
            help="Write a line of JSON for each prompt to this file, too; - prints them, alone.",
        ),
    ] = None,
) -> None:
    """Complete prompts in JAX: one as it comes, several in batches.

    [dim]Example: moka generate --base report/base --adapter report/adapter --prompt "What does math.gcd do?"[/dim]
    """
    from moka_cli.generate import run_generate

    run_generate(
        base,
        prompt or [],
        prompts_file=prompts,
        adapter=adapter,
        allow_other_base=allow_other_base,
        quantise=quantise,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        raw=raw,
        json_file=json_,
        settings={"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
    )


@app.command("eval")
def eval_(
    base: Base,
    adapter: Annotated[Path | None, typer.Argument(help="Adapter folder; without one the base is evaluated.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names of lm-eval's tasks and YAML files of your own, with commas between.")
    ] = None,
    set_: Annotated[
        str | None, typer.Option("--set", help="commonsense: the paper's eight tasks; mmlu: MMLU with 5 examples.")
    ] = None,
    backend: Annotated[Literal["torch", "jax"], typer.Option(help="What computes.")] = "torch",
    shots: Annotated[int | None, typer.Option(help="Examples before each question, unless a task fixes none.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first questions of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that are read at once.")] = 8,
    quantise: Quantise = None,
    allow_other_base: AllowOtherBase = False,
    chat: Annotated[bool, typer.Option("--chat", help="Write questions by the tokenizer's chat template.")] = False,
    json_: JsonFile = None,
    samples: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a line of JSON for each question to this file.")
    ] = None,
) -> None:
    """Evaluate a base or an adapter with EleutherAI's lm-evaluation-harness, in PyTorch or in JAX.

    Every question is checked before anything is computed: one without a right answer, with an empty choice, or longer
    than the model's context is refused by its number. Tasks by name need access to the hub. Needs moka\\[eval].

    [dim]Example: moka eval report/adapter --base report/base --tasks task.yaml --backend jax[/dim]

    [dim]The paper's tasks: moka eval report/adapter --base report/base --set commonsense[/dim]
    """
    from moka_cli.eval import run_eval

    run_eval(
        adapter,
        base,
        tasks=tasks,
        set_=set_,
        backend=backend,
        shots=shots,
        limit=limit,
        batch_size=batch_size,
        quantise=quantise,
        allow_other_base=allow_other_base,
        chat=chat,
        json_file=json_,
        samples=samples,
    )


@app.command()
def params(
    arch: Annotated[str, typer.Option(help="Name of an architecture (llama3-8b, …), or a model folder.")],
    preset: Preset = "paper",
    set_: Fields = None,
    explain: Annotated[bool, typer.Option(help="Say how each layer would be computed, and at what cost.")] = False,
    json_: JsonFile = None,
) -> None:
    """Count trainable parameters and list the shapes of the factors; needs no weights.

    [dim]Example: moka params --arch llama3-8b --preset paper --set r=20 --explain[/dim]
    """
    from moka_cli.params import run_params

    run_params(arch, preset, set_ or [], explain=explain, json_file=json_)


@app.command()
def inspect(
    adapter: AdapterFolder,
    layers: Annotated[bool, typer.Option("--layers", help="Print every layer, too, and every dead term.")] = False,
    no_rank: Annotated[
        bool, typer.Option("--no-rank", help="Leave out what needs singular values, which take nearly all of the time.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the gates, layers by terms, into this file.")] = None,
    shares_png: Annotated[Path | None, typer.Option(help="Draw how much each term counts into this file.")] = None,
    json_: JsonFile = None,
) -> None:
    """Say what an adapter holds and what its training made of it; needs neither JAX nor PyTorch, nor the base.

    Shapes, gates, norm, rank and effective rank of ΔW, terms that do nothing or repeat another, base, and size on disk.

    [dim]Example: moka inspect report/adapter --png gates.png[/dim]
    """
    from moka_cli.inspect import run_inspect

    run_inspect(adapter, rank=not no_rank, layers=layers, json_file=json_, gates_png=png, shares_png=shares_png)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="A LoRA adapter's folder (PEFT), or a model fine-tuned from the base.")
    ],
    out: NewAdapter,
    base: Base,
    preset: Preset = "paper",
    set_: Fields = None,
    lora_terms: Annotated[
        int, typer.Option(help="Add so many terms (1 x in) ⊗ (out x 1); as many as a LoRA's rank hold it exactly.")
    ] = 0,
    quantise: Annotated[
        Held | None,
        typer.Option(
            help="How the base will be held, which the adapter notes; by default as the folder is packed, else "
            "nf4-double."
        ),
    ] = None,
    only_targets: Annotated[
        bool, typer.Option("--only-targets", help="Leave behind what changed beside the targeted layers.")
    ] = False,
    max_error: Annotated[float | None, typer.Option(help="Write nothing if a layer's relative error is above.")] = None,
    json_: JsonFile = None,
) -> None:
    """Turn a LoRA adapter, or a fine-tuned model, into the nearest MoKA adapter, and say how near it is.

    Targets are the layers that the LoRA adapts, or the preset's. What comes out is a warm start: moka train goes on
    from it with adapter: {start: OUT}.

    [dim]Example: moka import my-lora warm --base report/base --preset paper --lora-terms 8[/dim]
    """
    from moka_cli.import_ import run_import

    run_import(
        source,
        out,
        base=base,
        preset_name=preset,
        settings=set_ or [],
        lora_terms=lora_terms,
        quantise=quantise,
        only_targets=only_targets,
        max_error=max_error,
        json_file=json_,
    )


for _command in app.registered_commands:  # typer joins the lines of the first paragraph only
    _command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", cleandoc(_command.callback.__doc__ or ""))


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every failure ends with one message and a status other than 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")] if debug else arguments
    _quieten_libraries()
    try:
        app(args=arguments, prog_name="moka")
    except MokaError as error:
        _fail(str(error), debug=debug)
    except Exception as error:  # noqa: BLE001  (the outermost boundary: nothing is hidden, --debug shows it all)
        text = f"{type(error).__name__}: {error}"
        _fail(f"{text}\n(not an error that moka foresaw; --debug shows where it came from)", debug=debug)


def _quieten_libraries() -> None:
    """Keep other libraries' progress bars and advice off the screen, unless the user's environment says otherwise.

    bitsandbytes' advice to install CPU kernels is for bfloat16; exact float32 is what is compared here.
    """
    for name, value in {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _fail(message: str, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"moka: error: {message}", file=sys.stderr)
    sys.exit(1)
