"""Train a MoKA adapter on a 4-bit base with TRL's SFTTrainer.

    pip install -c constraints.txt -e ".[examples]"    # in a clone: TRL, which brings datasets
    python examples/sft_trainer.py --model report/base --data report/data/train.jsonl --output run

The data is JSON lines of {"prompt": "…", "completion": "…"}; only completions are learned. SFTTrainer takes a
MokaConfig as its `peft_config` like any other. One thing needs care on a quantised base: see `keep_float32`.
instruction_data.py beside it reads the data, shared.py has what qlora_trainer.py needs as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from instruction_data import encode, model_folder, read_rows, split
from peft import PeftConfig, PeftModel
from shared import Losses, check_saved, load_4bit, save_merged, trainer_settings
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import moka_torch
from moka_core import preset

try:
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    hint = 'in a clone of MoKA, run: pip install -c constraints.txt -e ".[examples]"'
    raise ModuleNotFoundError(f"{error}, which this script trains with; {hint}", name=error.name) from None
from datasets import Dataset


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
    """Train a MoKA adapter on a 4-bit model with TRL's SFTTrainer."""
    rows = read_rows(data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encode(rows, tokenizer, max_length)  # only to refuse prompts that fill max_length, which SFTTrainer would drop
    chat = tokenizer.chat_template is not None
    learned, kept = (messages_or_texts(part, chat=chat) for part in split(rows, held_out, seed))
    config = moka_torch.MokaConfig.from_core(preset("recommended"), task_type="CAUSAL_LM")
    arguments = sft_config(
        output,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,  # none if few: the first has a rate of 0
        max_length=max_length,
        eval_steps=max(1, steps // evaluations),
        save_steps=max(1, steps // evaluations),
        seed=seed,
    )

    trainer = make_trainer(load_4bit(model), tokenizer, arguments, learned, kept, config)
    print(f"trainable parameters: {trainer.get_num_trainable_parameters():,}")
    before = held_out_loss(trainer)  # a fresh adapter is ΔW = 0
    trainer.train(resume_from_checkpoint=resume)
    after = held_out_loss(trainer)
    trainer.save_model(str(output / "adapter"))
    del trainer

    loaded = PeftModel.from_pretrained(load_4bit(model), output / "adapter")
    losses = Losses(before, after, held_out_loss(make_trainer(loaded, tokenizer, arguments, learned, kept)))
    check_saved(losses, output / "adapter")
    if merged_output is not None:
        save_merged(loaded, tokenizer, merged_output)
    return losses


def messages_or_texts(rows: list[dict[str, str]], *, chat: bool) -> Dataset:
    """The examples as SFTTrainer wants them: messages if there is a chat template, texts otherwise."""
    if chat:
        roles = {"prompt": "user", "completion": "assistant"}
        return Dataset.from_list(
            [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in rows]
        )
    return Dataset.from_list(rows)


def sft_config(output: Path, **settings: Any) -> SFTConfig:
    """SFTTrainer's settings; `settings` go before what stands here."""
    defaults = trainer_settings() | {"completion_only_loss": True}
    return SFTConfig(output_dir=str(output), **{**defaults, **settings})


def make_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    learned: Dataset,
    kept: Dataset,
    config: PeftConfig | None = None,
) -> SFTTrainer:
    """An SFTTrainer for a base and a config, or for a PeftModel."""
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=learned,
        eval_dataset=kept,
        processing_class=tokenizer,
        peft_config=config,
    )
    keep_float32(trainer)
    return trainer


def keep_float32(trainer: SFTTrainer) -> None:
    """Bring trainable parameters back to float32, before the optimiser is made.

    On a quantised base SFTTrainer casts them to bfloat16, whichever the PEFT method. Of its 8 bits of precision little
    is left for small updates: in one step of AdamW at 1e-4, four of five entries of the test's adapter stay where they
    are, and none in float32. At 5e-3 it costs little: 3.042 for 3.039 after 60 steps on SmolLM2-135M.
    """
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def held_out_loss(trainer: SFTTrainer) -> float:
    """The loss on what is held out."""
    return trainer.evaluate()["eval_loss"]


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
