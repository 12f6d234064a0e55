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

from moka_cli.main import app, main

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
