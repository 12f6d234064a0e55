"""Folders and files that are written whole or not at all: a reader sees the old or the new, whenever the writer dies.

Whatever keeps them from being written is a `PathError`: the one place where the system's errors of writing are told.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moka_core import PathError

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_WAYS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on the disk, or choose another one"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR), "choose another name, or remove what stands there"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a place where no file stands for a folder",
}
_WAY = "choose a place where you may write"


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its place when the block ends without an error.

    What is written into it is on the disk before it takes that place. A folder that stands there is replaced in one
    step where the file system can exchange two names (Linux, macOS); elsewhere in two, between which a process that
    dies leaves the old folder beside it, as ".NAME.*.old". After an error everything is as it was. What a process that
    was killed leaves is a hidden folder ".NAME.*", which may be removed.

    Args:
        target: a link is followed; its parent is made if needed.
        replace: take the place of what stands there. Otherwise only of an empty folder.

    Raises:
        PathError: the folder cannot be made, written into by the block, or renamed, as when `target` stands there.
    """
    with _told(target):
        target = Path(os.path.realpath(target))
        made = [parent for parent in target.parents if not os.path.exists(parent)]
        draft = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            draft.chmod(0o755)
            yield draft
            for path in [*draft.rglob("*"), draft]:
                _to_disk(path)
            _publish(draft, target, replace=replace)
            _to_disk(target.parent)
        finally:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
            if not os.path.exists(target):
                for parent in made:
                    with contextlib.suppress(OSError):  # not made, or not empty any more
                        parent.rmdir()


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, which takes its place when the block ends without an error.

    Args:
        target: in a folder that is there; a link is followed, and a file that stands there is replaced. A device or a
            pipe is what the block gets itself.

    Raises:
        PathError: the file cannot be made, written by the block, or renamed.
    """
    with _told(target):
        if _is_special(target):
            yield target
            return
        target = Path(os.path.realpath(target))
        ending = target.suffix if len(target.suffix) < 10 else ""  # by which some choose a format
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=ending, dir=target.parent)
        os.close(handle)
        draft = Path(name)
        try:
            yield draft
            draft.chmod(0o644)
            _to_disk(draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)


def make_folder(target: Path) -> None:
    """Make a folder that stays, unless it is there, and see that files can be written into it.

    Raises:
        PathError: it cannot be made, or nothing can be written into it.
    """
    with _told(target):
        target.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=target))


def check_new(target: Path) -> None:
    """Refuse, before any work is done for it, a folder that stands there or that `new_folder` could not make.

    Raises:
        PathError: something stands there, or nothing can be written there.
    """
    with _told(target):
        with contextlib.suppress(FileNotFoundError):
            target.lstat()
            raise PathError(f"{target}: expected a folder that does not exist yet; choose another name or remove it")
        real = Path(os.path.realpath(target))
        nearest = next(parent for parent in real.parents if os.path.exists(parent))
        os.rmdir(tempfile.mkdtemp(prefix=_prefix(real), dir=nearest))


def check_file(target: Path) -> None:
    """Refuse, before any work is done for it, a file that `new_file` could not write.

    Raises:
        PathError: its folder is not there, a folder stands in its place, or nothing can be written there.
    """
    with _told(target):
        if _is_special(target):
            return
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(target.stat().st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        real = Path(os.path.realpath(target))
        if not os.path.isdir(real.parent):
            raise PathError(f"{target}: expected an existing folder; {target.parent} is none")
        os.rmdir(tempfile.mkdtemp(prefix=_prefix(real), dir=real.parent))


def write_json(target: Path, values: Any) -> None:
    """Write a JSON file whole or not at all; a NaN or an infinity in it is a ValueError.

    Raises:
        PathError: see `new_file`.
    """
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    with new_file(target) as draft:
        draft.write_text(text, encoding="utf-8")


def set_aside(target: Path) -> Path | None:
    """The folder that a process which died while it replaced `target` left beside it, if there is one."""
    try:
        names = sorted(os.listdir(target.parent))
    except (OSError, ValueError):  # the latter for a name with a null byte
        return None
    prefix = _prefix(target)
    return next((target.parent / name for name in names if name.startswith(prefix) and name.endswith(".old")), None)


def _is_special(target: Path) -> bool:
    """Whether it is a device or a pipe, by whatever name: of /dev/fd/1 the real path need not exist."""
    return os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target)


def _prefix(target: Path) -> str:
    """How the names begin under which `target` is written: short enough for any file system."""
    return f".{os.fsencode(target.name)[:100].decode(errors='ignore')}."


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """Turn the system's errors into a `PathError` of `target`.

    An OSError without a number is a library's own, which is not of writing; shutil's collect several that are.
    """
    if "\0" in str(target):
        raise PathError(f"{str(target)!r}: cannot be written; no name has a null byte; choose another name")
    try:
        yield
    except (OSError, SafetensorError) as error:
        in_text = re.search(r"os error (\d+)", str(error))  # safetensors', which is written in Rust
        number = error.errno if isinstance(error, OSError) else in_text and int(in_text[1])
        if number is None and not isinstance(error, (SafetensorError, shutil.Error)):
            raise
        reason = str(error) if number is None else os.strerror(number)
        named = error.filename if isinstance(error, OSError) else None
        if isinstance(named, str) and not os.path.realpath(named).startswith(os.path.realpath(target.parent)):
            reason += f": {named}"  # not the target, nor a part of it
        raise PathError(f"{target}: cannot be written; {reason}; {_WAYS.get(number or 0, _WAY)}") from error


def _publish(draft: Path, target: Path, *, replace: bool) -> None:
    """Give `draft` the name `target`; what stood there is then called `draft`, or is gone."""
    if not (replace and target.exists()):
        draft.rename(target)
        return
    if _exchange(draft, target):
        return
    old = draft.with_name(f"{draft.name}.old")
    target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith(("linux", "darwin")):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap is not None and swap(*names, _EXCHANGE) == 0
    swap = getattr(library, "renameat2", None)
    return swap is not None and swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0


def _to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
