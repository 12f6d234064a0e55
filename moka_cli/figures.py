"""`--json FILE`, the same in all commands: the figures go to the file, too; with "-" to standard output, alone."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

TOLD_EVERY = 10.0  # seconds between lines of progress, without a terminal


def is_standard_output(file: Path | None) -> bool:
    """Whether the JSON goes to standard output, so that nothing else may."""
    return file == Path("-")


def check_json(file: Path | None) -> None:
    """Refuse, before anything is computed, a file that could not be written in the end.

    Raises:
        PathError: its folder is not there, a folder stands in its place, or nothing can be written there.
    """
    from conversion.new_folder import check_file

    if file is not None and not is_standard_output(file):
        check_file(file)


def text_console(file: Path | None) -> Console:
    """The console for everything but JSON: it prints nothing where standard output takes the JSON."""
    return Console(quiet=is_standard_output(file))


def write_json(file: Path | None, values: dict[str, Any]) -> None:
    """Write or print the figures, if they were asked for; a figure that is no finite number is null.

    Raises:
        PathError: the file cannot be written.
    """
    from conversion import new_folder

    if is_standard_output(file):
        print(json.dumps(finite(values), indent=2, allow_nan=False))
    elif file is not None:
        new_folder.write_json(file, finite(values))


@contextlib.contextmanager
def json_lines(file: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes an object a line as it comes, or nothing where there is no file."""
    if file is None:
        yield lambda values: None
        return
    with _opened(file) as out:
        yield lambda values: print(json.dumps(values, ensure_ascii=False), file=out, flush=True)


def _opened(file: Path) -> contextlib.AbstractContextManager[TextIO]:
    return contextlib.nullcontext(sys.stdout) if is_standard_output(file) else file.open("w", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same with null for every figure that is no finite number."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
