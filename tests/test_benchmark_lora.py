"""The benchmarks of the LoRA export run to their end on a small model and small layers, and write what they find."""

from __future__ import annotations

import pytest

from benchmarks import lora_error, lora_svd
from conversion import open_base, save_adapter
from moka_core import MokaConfig
from tests.tiny import random_adapter, save_tiny_llama


def test_the_error_falls_with_the_rank_and_is_drawn(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    config = MokaConfig(r=6, num_shapes=3, dropout=0.0, scale=0.02)
    save_adapter(random_adapter(open_base(base), config), tmp_path / "adapter")
    options = ["--adapter", tmp_path / "adapter", "--base", base, "--name", "tiny", "--quantise", "none"]
    options += ["--ranks", "2,32,128,999", "--output", tmp_path / "out", "--picture", tmp_path / "error.png"]
    result = lora_error.main([str(option) for option in options])
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "lora_error_tiny_cpu.json",
        "lora_error_tiny_cpu.md",
    }
    rows = result["logits"]
    assert [row["rank"] for row in rows] == [2, 32, 128]
    assert rows[0]["lost"] > rows[1]["lost"] > rows[2]["lost"]
    for kind, curve in result["kinds"].items():
        assert curve["median"][0] == pytest.approx(1.0)
        assert curve["median"] == sorted(curve["median"], reverse=True), kind
    # what was predicted from the singular values is what the written folder has
    worst = max(curve["worst"][2] for curve in result["kinds"].values())
    assert rows[0]["delta_worst"] == pytest.approx(worst, rel=1e-5)


def test_both_ways_are_timed_and_agree(tmp_path):
    options = ["--shapes", "96x192", "--ranks", "4", "--repeats", "1", "--output", str(tmp_path)]
    (case,) = lora_svd.main(options)["cases"]
    assert case["converged"]
    assert case["largest_error"] < 1e-12
    assert case["lanczos"]["median"] > 0 < case["lapack"]["median"]
    assert "| 96x192 | 4 |" in (tmp_path / "lora_svd_cpu.md").read_text()
