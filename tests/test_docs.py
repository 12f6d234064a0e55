"""The pages of docs/: their Python runs as it stands, their settings and commands are ones that there are."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest
import torch
import yaml
from flax import nnx
from transformers import AutoModelForCausalLM
from typer.main import get_command

from conversion import open_base, save_adapter
from moka_cli.main import app, main
from moka_core import preset
from moka_jax.train import TrainConfig
from moka_jax.train.schema import run_schema
from tests.moka_jax.train_toys import LEAST_CONFIG, make_tokenizer
from tests.tiny import random_adapter, save_tiny_llama

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
QUICK_STARTS = ("quickstart_jax.md", "quickstart_pytorch.md")
ELSEWHERE = {"README.md", *QUICK_STARTS}  # whose Python is run by test_readme.py, and below with their commands
NOT_RUN = "<!-- not run"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, without those that a comment before them says are not run."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^([^\n]*)\n```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for before, code in found if not before.startswith(NOT_RUN)]


def merged(folder: Path) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["merge", "report/adapter", "merged", "--base", "report/base"])
    assert not stop.value.code
    return {}


def in_torch(folder: Path) -> dict[str, Any]:
    for name in ("adapter", "warm"):
        (folder / name).symlink_to(folder / "report" / "adapter")
    return {"base": AutoModelForCausalLM.from_pretrained("report/base", dtype=torch.float32), "torch": torch}


class Attention(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.query, self.value = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.query(x)) * self.value(x)


def in_flax(folder: Path) -> dict[str, Any]:
    x = jnp.ones((3, 16))
    names = {"model": Attention(), "another": Attention(), "nnx": nnx, "optax": optax}
    return names | {"loss_of": lambda model: (model(x) ** 2).mean()}


def two_samples(folder: Path) -> dict[str, Any]:
    for name, shift in {"torch": 0.0, "jax": 0.5}.items():
        rows = [{"resps": [[[str(-1.0 - shift)]], [["-2.0"]]]}, {"resps": [[["-3.0"]], [["-2.0"]]]}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


# What a page takes for granted beside `report/base` and `report/adapter`: names, and files.
GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "concepts.md": lambda folder: {},
    "evaluation.md": two_samples,
    "flax.md": in_flax,
    "merging.md": merged,
    "peft.md": in_torch,
    "serving.md": in_torch,
    "warm_start.md": in_torch,
}
PRINTED = {
    "concepts.md": "64 layers, 5243520 trained parameters",
    "evaluation.md": "2 of 2 picks are the same; log-likelihoods differ by 0.5",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the demo leaves, of a small model."""
    folder = tmp_path_factory.mktemp("docs") / "report"
    base = save_tiny_llama(folder / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(base)
    opened = open_base(base)
    save_adapter(random_adapter(opened, preset("paper")), folder / "adapter")
    (folder / "data").mkdir()
    for name, count in (("train", 24), ("eval", 4)):
        rows = [{"prompt": f"add {n} {n}", "completion": f"gives {2 * n}"} for n in range(count)]
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_the_python_of_a_page_runs_from_top_to_bottom(name, report, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").symlink_to(report)
    names = GIVEN[name](tmp_path)
    code = blocks(ROOT / "docs" / name, "python")
    assert code
    before = (
        {key: np.array(leaf) for key, leaf in enumerate(jax.tree.leaves(nnx.state(names["model"])))}
        if "model" in names
        else {}
    )
    for block in code:
        exec(block, names)
    assert PRINTED.get(name, "") in capsys.readouterr().out
    if before:
        assert len(jax.tree.leaves(nnx.state(names["model"]))) > len(before), "the model has an adapter now"


def test_every_page_with_python_is_run():
    assert {page.name for page in PAGES if blocks(page, "python")} - ELSEWHERE == set(GIVEN)


def test_a_block_that_is_not_run_says_so(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        f"a\n```python\none\n```\nb\n\n{NOT_RUN}: needs a GPU -->\n```python\ntwo\n```\nc\n```sh\nmoka\n```\n"
    )
    assert blocks(page, "python") == ["one\n"]
    assert blocks(page, "sh") == ["moka\n"]


def commands() -> list[tuple[str, str]]:
    """Every `moka …` in the sh blocks, with its page."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, part.strip()) for line in lines for part in line.split("&&") if "moka " in part[:6]]
    return found


def test_the_commands_of_the_pages_can_be_parsed():
    group = get_command(app)
    parsed = 0
    for page, line in commands():
        name, *arguments = shlex.split(line, comments=True)[1:]
        assert name in group.commands, f"{page}: {line}"
        group.commands[name].make_context(name, arguments)  # raises on an option that is not there
        parsed += 1
    assert parsed >= 15


def test_the_quick_starts_from_their_config_to_the_adapter_that_comes_back(report, tmp_path, monkeypatch, capsys):
    """Both pages as a reader goes through them: every command and all Python, in order, in one folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report").symlink_to(report)
    (yaml_block,) = blocks(ROOT / "docs" / "quickstart_jax.md", "yaml")
    (tmp_path / "run.yaml").write_text(yaml_block)
    ran = []
    for name in QUICK_STARTS:
        names: dict[str, Any] = {}
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if language == "python":
                exec(block, names)
                continue
            for line in filter(lambda line: line.startswith("moka "), block.splitlines()):
                with pytest.raises(SystemExit) as stop:
                    main(shlex.split(line, comments=True)[1:])
                assert not stop.value.code, f"{name}: {line}"
                ran.append(shlex.split(line)[1])
    assert ran.count("train") == ran.count("parity") == 2
    printed = capsys.readouterr().out
    first, *_, last = map(float, re.findall(r"held-out loss (\d+\.\d+)", printed))
    assert last < first - 3  # measured: 5.90 to 0.61
    assert printed.count("both backends agree") == 2


def run_configs() -> list[tuple[str, dict[str, Any]]]:
    """Every config of a run in the yaml blocks, with its page; one that shows some settings only is filled up."""
    found = []
    for page in PAGES:
        for block in blocks(page, "yaml"):
            values = yaml.safe_load(block)
            if "task" not in values:  # lm-eval's, which test_eval.py runs
                whole = "base" in values  # such a page shows a config that lacks nothing
                found.append((page.name, values if whole else {**LEAST_CONFIG, **values}))
    return found


def test_the_settings_of_the_pages_are_taken():
    validator = jsonschema.Draft202012Validator(run_schema())
    taken = set()
    for page, values in run_configs():
        TrainConfig.from_dict(values)
        validator.validate(values)
        taken.add(page)
    assert {"README.md", "choosing.md", "large_models.md", "warm_start.md"} <= taken


def test_the_files_that_the_pages_name_are_there():
    rooms = ("moka_core", "moka_jax", "moka_torch", "conversion", "moka_cli", "benchmarks", "tests", "docs", "examples")
    here = [f"/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*.*")]
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"`([\w/]+\.(?:py|md|sh|ipynb))`", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    gone = {name for _, name in named if not any(path.endswith(f"/{name}") for path in here)}
    assert gone == {"results/NAME.md", "convert_lora_to_gguf.py"}  # a name to fill in, and llama.cpp's
