"""Whether a file or a folder can be read, for any path that a user may give."""

from __future__ import annotations

import os
import stat


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
