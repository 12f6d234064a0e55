"""The page of a run: its figures are the run's, it loads nothing, and a browser renders it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from conversion import load_adapter
from moka_cli.main import main
from moka_cli.report import MARK, events, tiles
from moka_cli.report_charts import gates_figure, norms_figure, training_figure
from moka_core import plan_layer, preset
from moka_core.oracle import dense_delta, term_gates
from moka_core.spectrum import layer_figures
from moka_jax.train import read_metrics
from tests.cases import random_factors
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import save_tiny_llama, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert(1)</script> {{ name }} & \"'"
PARITY = {
    "passed": False,
    "sides": ["JAX", "PyTorch"],
    "notes": ["held another way"],
    "diagnosis": {"module": "layer 3", "cause": "the gate"},
    "rows": [
        {"name": "logits", "figure": 2.5e-6, "bound": 1e-4, "unit": "of their range", "worst": "", "passed": True},
        {"name": "ΔW, JAX", "figure": None, "bound": 1e-6, "unit": "error", "worst": "a.b", "passed": False},
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a run of six steps, stopped after none."""
    folder = tmp_path_factory.mktemp("report")
    base = save_tiny_llama(folder / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(base)
    write_run(folder, base, train=24, eval=5, steps=6, batch_size=4, eval_every=3, checkpoint_every=2)
    call("train", folder / "run.yaml", "optimiser.warmup_steps=1")
    call("export", folder / "out", folder / "adapter")
    return folder / "out"


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_page_tells_what_the_run_did_and_loads_nothing(run, tmp_path, capsys):
    before = write(tmp_path / "before.jsonl", {"prompt": HOSTILE, "completion": "one"})
    after = write(tmp_path / "after.jsonl", {"prompt": HOSTILE, "completion": HOSTILE})
    parity = write(tmp_path / "parity.json", PARITY)
    assert call("report", run, "--parity", parity, "--before", before, "--after", after) == 0
    assert f"{run / 'report.html'}: open it in a browser" in capsys.readouterr().out
    page = (run / "report.html").read_text()

    records = read_metrics(run / "metrics.jsonl")
    held_out = [record["loss"] for record in records if record["kind"] == "eval"]
    assert f"<dd>{held_out[0]:.4f} → {held_out[-1]:.4f}</dd>" in page
    assert f"<dd>{load_adapter(run.parent / 'adapter').trainable:,} on " in page
    assert "<dt>steps recorded</dt><dd>6 of 6</dd>" in page
    assert "<tr><th>optimiser.warmup_steps</th><td><code>1</code></td></tr>" in page
    assert f"jax {records[0]['versions']['jax']}, " in page
    assert page.count("<img ") == 3
    assert "JAX and PyTorch disagree." in page
    assert "<p>held another way</p>" in page
    assert "First difference: layer 3; likely cause: the gate" in page
    assert '<td class="n">not finite</td><td class="n">1e-06</td><td class="bad">FAILS</td>' in page
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; {{ name }} &amp; &#34;&#39;") == 2
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)""", page)
    assert loaded
    assert all(address.startswith("data:") for pair in loaded for address in pair if address)
    assert "<script" not in page

    assert call("report", run) == 0, "a page of an earlier call is replaced"
    page = (run / "report.html").read_text()
    assert page.count("Not given.") == 2
    assert "disagree" not in page


def test_the_charts_draw_the_records(run):
    records = read_metrics(run / "metrics.jsonl")
    adapter = load_adapter(run.parent / "adapter")
    losses = training_figure(records).axes[0].lines
    drawn = {line.get_label(): line.get_ydata().tolist() for line in losses}
    kinds = {"training": "train", "held out": "eval"}
    assert drawn == {label: [r["loss"] for r in records if r["kind"] == kind] for label, kind in kinds.items()}

    figure = gates_figure(records, adapter, 6)
    gates = [record["gates"] for record in records if record["kind"] == "gates"]
    last = {path: term_gates(layer, adapter.config) for path, layer in adapter.layers.items()}
    assert all(gates[-1][path] == pytest.approx(last[path], abs=1e-6) for path in last)
    panel = next(axes for axes in figure.axes if axes.get_title().startswith("v_proj"))
    paths = [f"model.layers.{number}.self_attn.v_proj" for number in range(2)]
    terms = adapter.layers[paths[0]].plan.terms
    expected = [[one[path][term] for one in gates] for term in range(terms) for path in paths]
    assert np.abs(panel.images[0].get_array() - expected).max() < 1e-6  # what the records round
    assert len(gates) == 4
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "2", "4", "6"]

    figures = {path: layer_figures(layer, adapter.layer_config(path)) for path, layer in adapter.layers.items()}
    line = next(line for line in norms_figure(figures).axes[0].lines if line.get_label().startswith("v_proj"))
    assert line.get_xdata().tolist() == [0, 1]
    assert [text.get_text() for text in norms_figure(figures).axes[0].get_legend().texts] == [
        "q_proj 128x128",
        "v_proj 64x128",
    ]
    assert line.get_ydata() == pytest.approx(
        [np.linalg.norm(dense_delta(adapter.layers[path], adapter.layer_config(path))) for path in paths], rel=1e-6
    )


def test_a_start_of_even_gates_is_white(run):
    adapter = load_adapter(run.parent / "adapter")
    config = preset("paper", r=3)
    plan = plan_layer(config, 64, 64)
    layer = random_factors(plan, config, np.random.default_rng(0))
    even = dataclasses.replace(layer, gate_logits=np.zeros(3, np.float32))
    adapter = dataclasses.replace(adapter, config=config, layers={"a.0.q_proj": even})
    figure = gates_figure([{"kind": "gates", "step": 0, "gates": {"a.0.q_proj": [0.333333] * 3}}], adapter, 1)
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (3, 2)
    assert np.abs(image.norm(image.get_array()) - 0.5).max() < 1e-3


def test_a_run_without_a_loss_or_a_gate_has_a_page(run, capsys):
    settings = ("data.eval=null", "log_every=6", "adapter.gate=uniform", "optimiser.warmup_steps=1")
    call("train", run.parent / "run.yaml", f"output={run.parent / 'bare'}", *settings)
    lines = (run.parent / "bare" / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kind": "train"' not in line]  # as if it had been stopped before step 6
    (run.parent / "bare" / "metrics.jsonl").write_text("".join(kept))
    assert call("report", run.parent / "bare") == 0
    page = (run.parent / "bare" / "report.html").read_text()
    assert "No loss is recorded yet." in page
    assert "This adapter has a uniform gate: every term counts alike." in page
    assert "<dd>6 of 6</dd>" in page


def test_the_best_checkpoint_has_a_page_though_the_newest_is_damaged(run, capsys):
    copied = run.parent / "copied"
    shutil.copytree(run, copied)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [{**line, "loss": 0.1} if line["kind"] == "eval" and line["step"] == 3 else line for line in lines]
    write(copied / "metrics.jsonl", *changed)
    newest, best = copied / "checkpoints" / "6", copied / "checkpoints" / "3"
    shutil.copytree(newest, best, dirs_exist_ok=True)
    shutil.rmtree(newest)
    newest.mkdir()
    assert call("report", copied) == 1
    assert "damaged checkpoint" in capsys.readouterr().err
    assert call("report", copied, "--checkpoint", "best") == 0
    assert "<dt>adapter shown</dt><dd>after step 3</dd>" in (copied / "report.html").read_text()


def test_what_a_run_did_not_record_is_left_out(run, capsys):
    old = run.parent / "old"
    shutil.copytree(run, old, ignore=shutil.ignore_patterns("report.html"))
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"gates"' not in line]
    (old / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if '"start"' not in line))
    assert call("report", old) == 0
    page = (old / "report.html").read_text()
    assert "This run recorded no gates" in page
    assert "Not recorded: the run is of a version that did not yet." in page
    assert page.count("<img ") == 2


def test_what_happened_beside_the_steps_is_told():
    train = {"kind": "train", "loss": 2.0, "tokens_per_second": 10.0, "skipped": 1, "seconds": 7200.0}
    records = [
        {"kind": "eval", "step": 0, "loss": 4.0},
        {**train, "step": 1},
        {"kind": "start", "step": 1},
        {"kind": "fallback", "step": 1, "damaged": [{"step": 3, "why": "cut"}]},
        {"kind": "skip", "step": 2, "reason": "loss is nan"},
        {"kind": "eval", "step": 2, "loss": 1.0},
        {**train, "step": 3},
        {"kind": "eval", "step": 3, "loss": 3.0},
    ]
    assert list(events(records)) == [
        "It was stopped, and went on from step 1 (a dotted line in the charts).",
        "It went on from step 1, since newer checkpoints were damaged: 3.",
        "Of the steps that changed nothing, these were recorded: 2 (loss is nan).",
    ]
    plan = plan_layer(preset("paper"), 64, 64)

    class Stub:
        trainable, layers = 1234, {"a": plan}

    found = dict(tiles(records, Stub(), 3, of=9))
    assert found["steps recorded"] == "3 of 9"
    assert found["held-out loss"] == "4.0000 → 3.0000"
    assert found["lowest held-out loss"] == "1.0000 after step 2"
    assert found["skipped steps"] == "1"
    assert found["time, all included"] == "2.0 hours"
    one = [record for record in records if record["kind"] == "eval"][:1]
    assert dict(tiles(one, Stub(), 0, of=9))["held-out loss"] == "4.0000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--before", "ok.jsonl"), "expected both, files that moka generate --json writes of the same prompts"),
        (("--before", "ok.jsonl", "--after", "other.jsonl"), "expected the same prompts in both; only one has 'a'"),
        (("--before", "ok.jsonl", "--after", "swapped.jsonl"), "expected the same prompts in both; only one has 'b'"),
        (("--before", "ok.jsonl", "--after", "empty.jsonl"), "empty.jsonl: expected lines that moka generate"),
        (("--before", "ok.jsonl", "--after", "list.json"), "list.json: expected lines that moka generate --json FILE"),
        (("--parity", "nowhere.json"), "nowhere.json: expected the figures that moka parity --json FILE writes"),
        (("--parity", "list.json"), "list.json: expected the figures that moka parity --json FILE writes; it has no"),
        (("--parity", "row.json"), "row 0 has no figure and no passed"),
        (
            ("--parity", "verdict.json"),
            "verdict.json: expected the figures that moka parity --json FILE writes; its verdict",
        ),
        (
            ("--before", "ok.jsonl", "--after", "null.jsonl"),
            "null.jsonl: expected lines that moka generate --json FILE",
        ),
        (("--out", "nowhere/page.html"), "nowhere/page.html: expected an existing folder"),
        (("--out", "ok.jsonl"), "ok.jsonl: expected a place without a file, or a page that moka report wrote"),
        (("--base", "nowhere"), "nowhere: no such folder; expected the run's base model"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(run, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ok.jsonl", {"prompt": "a", "completion": "b"})
    write(tmp_path / "other.jsonl", {"prompt": "c", "completion": "b"})
    write(tmp_path / "swapped.jsonl", {"prompt": "b", "completion": "b"}, {"prompt": "a", "completion": "b"})
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "list.json", [1, 2])
    write(tmp_path / "row.json", {**PARITY, "rows": [{**PARITY["rows"][0], "figure": "x", "passed": 1}]})
    write(tmp_path / "verdict.json", {**PARITY, "passed": True})
    write(tmp_path / "null.jsonl", {"prompt": None, "completion": "b"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = () if "--out" in options else ("--out", tmp_path / "page.html")
    assert call("report", run, *options, *out) == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert call("report", tmp_path) == 1
    assert "expected the output folder of a training run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def shown(page: Path, picture: Path) -> list[str]:
    """What a browser prints on its console while it renders a page into a picture."""
    options = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars")
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "enable-logging=stderr")
    command = [BROWSER, *(f"--{name}" for name in (*options, *quiet)), f"--user-data-dir={picture.parent / 'profile'}"]
    command += ["--window-size=1100,2600", f"--screenshot={picture}", page.resolve().as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None and not os.environ.get("CI"), reason="there is no Chromium here")
def test_a_browser_renders_the_page_without_a_complaint(run, tmp_path):
    assert BROWSER is not None, "CI installs Chromium"
    assert call("report", run, "--out", tmp_path / "page.html") == 0
    assert shown(tmp_path / "page.html", tmp_path / "page.png") == []
    pixels = (matplotlib.image.imread(tmp_path / "page.png")[..., :3] * 255).round()
    blue = (np.abs(pixels - np.array([0x1F, 0x77, 0xB4])) < 3).all(-1)  # of the first curve in every chart
    assert blue.sum() > 500

    broken = tmp_path / "broken.html"
    page = (tmp_path / "page.html").read_text()
    assert MARK in page
    broken.write_text(page.replace("<h1>", '<img src="http://localhost:9/picture.png"><h1>'))
    assert any("Content Security Policy" in line for line in shown(broken, tmp_path / "broken.png"))
