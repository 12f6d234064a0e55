"""Every path that a command reads or writes, where the system cannot follow: one message, and nothing is left."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest

from conversion import open_base, save_adapter
from moka_core import MokaConfig
from tests.moka_cli.test_commands import call
from tests.moka_cli.test_import_command import save_lora
from tests.tiny import random_adapter, save_tiny_llama, write_run

SMALL = ("--set", "r=2", "--set", "num_shapes=1")
WRITTEN = {
    "lora": ("lora", "ADAPTER", "PATH", "--rank", "2"),
    "lora --json": ("lora", "ADAPTER", "OUT", "--rank", "2", "--json", "PATH"),
    "import": ("import", "LORA", "PATH", "--base", "BASE", *SMALL),
    "import --json": ("import", "LORA", "OUT", "--base", "BASE", *SMALL, "--json", "PATH"),
    "merge": ("merge", "ADAPTER", "PATH", "--base", "BASE"),
    "merge --json": ("merge", "ADAPTER", "OUT", "--base", "BASE", "--json", "PATH"),
    "parity --json": ("parity", "ADAPTER", "--base", "BASE", "--json", "PATH"),
    "inspect --png": ("inspect", "ADAPTER", "--png", "PATH"),
    "inspect --shares-png": ("inspect", "ADAPTER", "--shares-png", "PATH"),
    "export": ("export", "RUN", "PATH"),
    "demo": ("demo", "--output", "PATH"),
    "train": ("train", "CONFIG", "output=PATH"),
}
READ = {
    "lora": ("lora", "PATH", "OUT", "--rank", "2"),
    "lora --base": ("lora", "ADAPTER", "OUT", "--rank", "2", "--base", "PATH"),
    "import": ("import", "PATH", "OUT", "--base", "BASE"),
    "import --base": ("import", "LORA", "OUT", "--base", "PATH"),
    "merge": ("merge", "PATH", "OUT", "--base", "BASE"),
    "merge --base": ("merge", "ADAPTER", "OUT", "--base", "PATH"),
    "parity": ("parity", "PATH", "--base", "BASE"),
    "parity --base": ("parity", "ADAPTER", "--base", "PATH"),
    "inspect": ("inspect", "PATH"),
    "generate --base": ("generate", "--base", "PATH", "--prompt", "x"),
    "generate --adapter": ("generate", "--base", "BASE", "--adapter", "PATH", "--prompt", "x"),
    "generate --prompts": ("generate", "--base", "BASE", "--prompts", "PATH"),
    "params": ("params", "--arch", "PATH"),
    "params, a file": ("params", "--arch", "PATH/config.json"),
    "export": ("export", "PATH", "OUT"),
    "train": ("train", "PATH"),
    "train base": ("train", "CONFIG", "base=PATH"),
    "train data": ("train", "CONFIG", "data.train=PATH"),
    "train start": ("train", "CONFIG", "adapter.start=PATH"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What the words in capital letters stand for, but PATH and OUT."""
    root = tmp_path_factory.mktemp("paths")
    base = save_tiny_llama(root / "base")
    save_adapter(random_adapter(open_base(base), MokaConfig(r=2, num_shapes=1)), root / "adapter")
    return {
        "BASE": base,
        "ADAPTER": root / "adapter",
        "LORA": save_lora(base, root / "lora"),
        "CONFIG": write_run(root, base, train=2, eval=1, steps=1, batch_size=1),
        "RUN": root / "run",
    }


def fill(arguments, words) -> list[str]:
    for word, path in words.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    return arguments


def refused(arguments, words, folder: Path, capsys) -> str:
    """The one message of a command that fails and leaves nothing in `folder`."""
    before = set(folder.rglob("*"))
    assert call(*fill(arguments, {**words, "OUT": folder / "out"})) == 1
    told = capsys.readouterr().err
    assert told.startswith("moka: error: ")
    assert "not an error that moka foresaw" not in told
    assert str(words["PATH"]) in told
    assert set(folder.rglob("*")) == before
    return told


def bad_path(fault: str, folder: Path) -> Path:
    if fault == "a name too long":
        return folder / ("x" * 300)
    if fault == "below a name too long":
        return folder / ("x" * 300) / "it"
    if fault == "below a file":
        (folder / "file").write_text("mine")
        return folder / "file" / "it"
    (folder / "closed" / "it").mkdir(parents=True)
    (folder / "closed").chmod(0)
    if os.access(folder / "closed", os.W_OK):  # root's, whom permissions do not stop
        return Path("/proc/it") if sys.platform == "linux" else pytest.skip("to root every folder is open")
    return folder / "closed" / "it"


FAULTS = ("a name too long", "below a name too long", "below a file", "in a closed folder")
REASONS = ("File name too long", "Not a directory", "Permission denied", "No such file or directory")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", WRITTEN)
def test_what_cannot_be_written_is_refused(command, fault, folders, tmp_path, capsys):
    path = bad_path(fault, tmp_path)
    told = refused(WRITTEN[command], {**folders, "PATH": path}, tmp_path, capsys)
    if "expected an existing folder" not in told:
        assert any(reason in told for reason in REASONS)
        assert "; choose " in told or "; use another one" in told


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", READ)
def test_what_cannot_be_read_is_refused(command, fault, folders, tmp_path, capsys):
    path = bad_path(fault, tmp_path)
    told = refused(READ[command], {**folders, "PATH": path}, tmp_path, capsys)
    assert any(words in told for words in ("expected", "an adapter folder has", "unknown architecture"))


@pytest.mark.parametrize("command", ["lora", "import", "merge", "inspect --png"])
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(command, folders, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        told = refused(WRITTEN[command], {**folders, "PATH": tmp_path / "it"}, tmp_path, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written; File too large; make room on the disk, or choose another one" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("command", ["lora --json", "import --json", "merge --json"])
def test_figures_for_which_there_is_no_room_are_told_and_the_folder_stays(command, folders, tmp_path, capsys):
    assert call(*fill(WRITTEN[command], {**folders, "PATH": "/dev/full", "OUT": tmp_path / "out"})) == 1
    assert "/dev/full: cannot be written; No space left on device; make room" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_figures_go_through_a_pipe(folders, capfd):
    """As in a shell's `--json >(jq .)`: the name is /dev/fd/N, of which the real path is no file."""
    receiver, sender = os.pipe()
    assert call("inspect", folders["ADAPTER"], "--no-rank", "--json", f"/dev/fd/{sender}") == 0
    os.close(sender)
    with os.fdopen(receiver) as told:
        assert json.load(told)["trainable"] > 0
