"""The notebook runs from top to bottom, on a small model in the place of the demo's, and is committed as it was run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import save_tiny_llama

NOTEBOOK = Path(__file__).parents[2] / "examples" / "jax_to_torch.ipynb"


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that its cells printed."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture(scope="module")
def executed(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("notebook")
    base = save_tiny_llama(folder / "report" / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(base)
    data = folder / "report" / "data"
    data.mkdir()
    rows = [{"prompt": f"add {n} {n}", "completion": f"gives {2 * n}"} for n in range(40)]
    for name, some in {"train": rows[8:], "eval": rows[:8]}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def test_it_runs_and_both_backends_agree(executed):
    text = printed(executed)
    before, after = map(float, re.findall(r"held-out loss ([\d.]+) before, ([\d.]+) after", text)[0])
    assert after < before
    differences = [float(found) for found in re.findall(r"(?:logits: |differ by )([\d.e+-]+\d)", text)]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    assert float(re.findall(r"moved by ([\d.e+-]+\d);", text)[0]) > 100 * max(differences)
    assert "passed" in text
    assert "FAILED" not in text


def test_what_is_committed_was_run_in_order_and_without_a_failure():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert not re.findall(r"(?:/tmp|/home|/work|/root)\S*", printed(notebook))
