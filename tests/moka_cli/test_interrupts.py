"""Ctrl-C in any command: no traceback, and status 130, as shells have it."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.main import get_command

import moka_cli.__main__
from moka_cli.main import app, main
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import save_tiny_llama, write_run

ARGUMENTS = {
    "demo": [],
    "train": ["run.yaml"],
    "export": ["run", "out"],
    "report": ["run"],
    "lora": ["adapter", "out", "--rank", "1"],
    "parity": ["adapter", "--base", "base"],
    "merge": ["adapter", "out", "--base", "base"],
    "generate": ["--base", "base", "--prompt", "p"],
    "eval": ["--base", "base", "--tasks", "t"],
    "params": ["--arch", "llama3-8b"],
    "inspect": ["adapter"],
    "import": ["source", "out", "--base", "base"],
}
MODULES = {"export": "train", "import": "import_"}


@pytest.mark.parametrize("command", sorted(get_command(app).commands))
def test_ctrl_c_ends_a_command_without_a_traceback(command, monkeypatch, capsys):
    def pressed(*args, **options):
        raise KeyboardInterrupt

    module = importlib.import_module(f"moka_cli.{MODULES.get(command, command)}")
    monkeypatch.setattr(module, f"run_{command}", pressed)
    with pytest.raises(SystemExit) as stop:
        main([command, *ARGUMENTS[command]])
    assert stop.value.code == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_signal_from_outside_does_the_same():
    wait = "import moka_cli.params as p, time; p.run_params = lambda *a, **o: (print('on', flush=True), time.sleep(60))"
    code = f"{wait}; from moka_cli.main import main; main(['params', '--arch', 'llama3-8b'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "")


def test_stopped_twice_while_it_compiles_a_run_ends_with_the_same_status(tmp_path):
    """The interpreter's own end would crash then; see `moka_cli.__main__`."""
    base = save_tiny_llama(tmp_path / "base", vocab_size=320)
    make_tokenizer().save_pretrained(base)
    write_run(tmp_path, base, train=24, eval=5, steps=6, batch_size=4, eval_every=3, checkpoint_every=3)
    process = subprocess.Popen(
        [sys.executable, "-m", "moka_cli", "train", str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 0/6"):  # the evaluation before the first step, which compiles
            break
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error  # the second signal may have come in a callback that lets nothing out


def test_the_interpreters_end_is_left_out_only_after_an_interruption_and_never_among_several_processes(monkeypatch):
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)  # the real one does not return

    monkeypatch.setattr(os, "_exit", end)
    for status, several, expected in ((130, False, [130]), (130, True, []), (1, False, []), (None, False, [])):
        ended.clear()
        monkeypatch.setattr(moka_cli.__main__, "main", lambda status=status: sys.exit(status))
        monkeypatch.setattr(moka_cli.__main__, "_one_of_several", lambda several=several: several)
        with pytest.raises(SystemExit) as stop:
            moka_cli.__main__.console()
        assert (stop.value.code, ended) == (status, expected)
