"""The arguments and options that several commands take."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer


def _print_schema(wanted: bool) -> None:
    if wanted:
        from moka_jax.train.schema import run_schema

        print(json.dumps(run_schema(), indent=1))
        raise typer.Exit


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moka {version('moka')}")
        raise typer.Exit


AdapterFolder = Annotated[Path, typer.Argument(help="Adapter folder.")]
NewAdapter = Annotated[Path, typer.Argument(help="Adapter folder to write; it must not exist yet.")]
Base = Annotated[Path, typer.Option(help="The base model's folder.")]
Run = Annotated[Path, typer.Argument(help="Output folder of a training run.")]
MovedBase = Annotated[Path | None, typer.Option(help="Where the base model is now, if it was moved.")]
Checkpoint = Annotated[
    Literal["last", "best"], typer.Option(help="The newest checkpoint, or the one of the lowest held-out loss.")
]
Preset = Annotated[str, typer.Option(help="Preset: recommended, paper or paper-s.")]
Fields = Annotated[list[str] | None, typer.Option("--set", help="Change a field of the preset, as key=value.")]
Held = Literal["nf4-double", "nf4", "none"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantise = Annotated[
    Held | None,
    typer.Option(
        help="How the base is held, nf4-double being QLoRA's way; by default as the adapter was trained, else "
        "nf4-double."
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", dir_okay=False, allow_dash=True, help="Write the figures to this file, too; - prints them, alone."
    ),
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Take another base than the adapter was trained on.")
]
Schema = Annotated[
    bool, typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON schema of CONFIG.")
]
Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]
