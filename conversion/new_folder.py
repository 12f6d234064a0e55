"""A folder that is written whole or not at all: a reader sees the old one or the new one, whenever the writer dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS


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
        OSError: as from the system, also if `target` stands there.
    """
    target = Path(os.path.realpath(target))
    made = [parent for parent in target.parents if not parent.exists()]
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
        draft.chmod(0o755)
        yield draft
        for path in [*draft.rglob("*"), draft]:
            _to_disk(path)
        _publish(draft, target, replace=replace)
        _to_disk(target.parent)
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if not target.exists():
            for parent in made:
                with contextlib.suppress(OSError):  # not made, or not empty any more
                    parent.rmdir()


def set_aside(target: Path) -> Path | None:
    """The folder that a process which died while it replaced `target` left beside it, if there is one."""
    return next(iter(sorted(target.parent.glob(f".{target.name[:100]}.*.old"))), None)


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
