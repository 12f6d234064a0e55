"""Train a MoKA adapter on a 4-bit base with transformers' Trainer, as one trains a QLoRA.

    python examples/qlora_trainer.py --model report/base --data report/data/train.jsonl --output run

The data is JSON lines of {"prompt": "…", "completion": "…"}; only completions are learned. The script holds some lines
out, trains, keeps the best checkpoint, saves the adapter to OUTPUT/adapter, loads it from there onto a fresh base and
checks that the loss is the same. The losses are Trainer's: the mean over batches of the mean over learned tokens.
instruction_data.py beside it reads the data and makes tokens of it, shared.py has what sft_trainer.py needs as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from instruction_data import IGNORED, Tokens, encode, model_folder, read_rows, split
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from shared import CHECKPOINTING, Losses, check_saved, load_4bit, save_merged, trainer_settings
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import moka_torch
from moka_core import preset


def main(
    model: Annotated[Path, typer.Option(help="Folder of the base model, with its tokenizer.", callback=model_folder)],
    data: Annotated[
        Path, typer.Option(help='JSON lines of {"prompt": …, "completion": …}.', exists=True, dir_okay=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the adapter.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples of one forward pass.", min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="Forward passes of one step.", min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak rate; 3e-3 is what suits this preset.")] = 3e-3,
    held_out: Annotated[int, typer.Option(help="Lines that are kept out of training.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens at which an example is cut.")] = 256,
    evaluations: Annotated[int, typer.Option(help="How often to evaluate and save while training.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of the adapter's start, the split and the order of the data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUTPUT.")] = False,
    merged_output: Annotated[
        Path | None, typer.Option(help="Also write the base with the adapter merged in, dense, in bfloat16.")
    ] = None,
) -> Losses:
    """Train a MoKA adapter on a 4-bit model with transformers' Trainer."""
    set_seed(seed)
    rows = read_rows(data)
    tokenizer = load_tokenizer(model)
    learned, kept = split(encode(rows, tokenizer, max_length), held_out, seed)
    config = moka_torch.MokaConfig.from_core(preset("recommended"), task_type="CAUSAL_LM")
    arguments = training_arguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,  # none if few: the first has a rate of 0
        eval_steps=max(1, steps // evaluations),
        save_steps=max(1, steps // evaluations),
        seed=seed,
    )

    # moka_torch.attach(load_base(model), config, seed=seed) does the same, with one start on every device.
    peft_model = get_peft_model(load_base(model), config)
    peft_model.print_trainable_parameters()
    trainer = make_trainer(peft_model, tokenizer, arguments, learned, kept)
    before = held_out_loss(trainer)  # a fresh adapter is ΔW = 0
    trainer.train(resume_from_checkpoint=resume)
    after = held_out_loss(trainer)
    peft_model.save_pretrained(str(output / "adapter"))
    tokenizer.save_pretrained(output / "adapter")
    del trainer, peft_model

    loaded = PeftModel.from_pretrained(load_base(model), output / "adapter")
    losses = Losses(before, after, held_out_loss(make_trainer(loaded, tokenizer, arguments, learned, kept)))
    check_saved(losses, output / "adapter")
    if merged_output is not None:
        save_merged(loaded, tokenizer, merged_output)
    return losses


def load_base(folder: Path) -> PreTrainedModel:
    """The 4-bit base, frozen and ready for training."""
    return prepare_model_for_kbit_training(load_4bit(folder), gradient_checkpointing_kwargs=CHECKPOINTING)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with a token to pad with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_arguments(output: Path, **settings: Any) -> TrainingArguments:
    """Trainer's settings; `settings` go before what stands here."""
    return TrainingArguments(output_dir=str(output), **{**trainer_settings(), **settings})


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    learned: list[Tokens],
    kept: list[Tokens],
) -> Trainer:
    """A Trainer that pads each batch to its longest example."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=learned,  # type: ignore[arg-type]  # a list has all that Trainer asks of a data set
        eval_dataset=kept,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
    )


def held_out_loss(trainer: Trainer) -> float:
    """The loss on what is held out."""
    return trainer.evaluate()["eval_loss"]


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
