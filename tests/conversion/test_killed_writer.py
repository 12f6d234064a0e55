"""Whenever the writer dies, the folder is the old one or the new one; and so it is for whoever reads meanwhile."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_writer_killed_at_fifty_moments_leaves_an_old_or_a_new_folder(tmp_path):
    command = [sys.executable, "-m", "tests.conversion.killed_writer", str(tmp_path), "50"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["after"].keys() == {"old", "new"}
    assert sum(found["after"].values()) == 50
    assert found["drafts left"] >= 10  # it was killed in the middle of writing, not between two folders
    assert found["reads"] >= 10
