"""Whether a file or a folder can be read, for any path that a user may give, and the JSON object in a file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from moka_core.errors import MokaError


def no_folder(path: str | os.PathLike[str]) -> str | None:
    """Why a path is no folder whose files can be read, in words for a message; None if it is one.

    >>> no_folder("."), no_folder("nowhere")
    (None, 'no such folder')
    """
    return _why_not(path, "folder", os.R_OK | os.X_OK)


def no_file(path: str | os.PathLike[str]) -> str | None:
    """Why a path is no regular file that can be read, in words for a message; None if it is one.

    >>> no_file("."), no_file("nowhere")
    ('no such file, it is a folder', 'no such file')
    """
    return _why_not(path, "file", os.R_OK)


def json_object(path: str | os.PathLike[str], failure: type[MokaError], *, needed: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        failure: what is raised.
        needed: what is said where there is no such file: what a folder with it would be.

    Raises:
        MokaError: `failure`; the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"{path}: {no_file(path) or error}; {needed}") from None
    except (ValueError, RecursionError) as error:
        raise failure(f"{path}: expected JSON; {error}") from error
    if not isinstance(values, dict):
        raise failure(f"{path}: expected a JSON object; got {type(values).__name__}")
    return values


def _why_not(path: str | os.PathLike[str], kind: str, access: int) -> str | None:
    """Unlike `Path.is_dir` and its like, nothing is raised for a name that is too long or a folder that is closed."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name with a null byte
        return f"no such {kind}"
    except OSError as error:
        return f"no such {kind}, {(error.strerror or str(error)).lower()}"
    found = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device or the like"
    if found != kind:
        return f"no such {kind}, it is a {found}"
    return None if os.access(path, access) else f"no such {kind} that may be read"
