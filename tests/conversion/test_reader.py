"""The reader of docs/, written from FORMAT.md alone, finds the library's ΔW in every folder that the library writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversion import save_adapter
from moka_core import Adapter, LayerFactors, MokaConfig, plan_layer
from moka_core.oracle import dense_delta
from tests.cases import CASES, random_factors, random_layer

FILE = Path(__file__).parents[2] / "docs" / "read_adapter.py"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module")
def reader() -> Any:
    spec = importlib.util.spec_from_file_location("read_adapter", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cast(layer: LayerFactors, config: MokaConfig, dtype: Any) -> LayerFactors:
    return LayerFactors.from_tensors(layer.plan, config, {name: array.astype(dtype) for name, array in layer.tensors()})


def check(reader: Any, adapter: Adapter, folder: Path) -> None:
    found = dict(reader.deltas(save_adapter(adapter, folder)))
    assert set(found) == set(adapter.layers)
    for path, layer in adapter.layers.items():
        expected = dense_delta(layer, adapter.layer_config(path))
        assert np.abs(expected).max() > 0.01
        assert found[path].dtype == np.float64
        # measured: 2e-16 at most (on a trained adapter of 60 layers 1.4e-16)
        assert np.linalg.norm(found[path] - expected) <= 1e-12 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_in_every_dtype(reader: Any, case: Any, dtype: str, tmp_path: Path) -> None:
    layers = {
        path: cast(random_layer(case, seed), case.config, DTYPES[dtype])
        for seed, path in enumerate(("model.layers.0.layer", "model.layers.10.layer", "été.layer"))
    }
    check(reader, Adapter(config=case.config, layers=layers, base_fingerprint="ab", base_model="é"), tmp_path / "a")


@pytest.mark.parametrize("quantisation", ["nf4-double", None])
def test_layers_with_shapes_and_scales_of_their_own(reader: Any, quantisation: str | None, tmp_path: Path) -> None:
    config = MokaConfig(
        r=5, num_shapes=2, scaling="stable", scale=0.1, r_pattern={"v_proj": 3}, scale_pattern={"1.q_proj": -2.5}
    )
    rng = np.random.default_rng(0)
    layers = {}
    for path in ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"):
        own = config.for_layer(path, 24, 36)
        layers[path] = random_factors(plan_layer(own, 24, 36), own, rng)
    adapter = Adapter(config=config, layers=layers, base_quantisation=quantisation)
    check(reader, adapter, tmp_path / "a")
    stated = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert stated["shapes_pattern"]
    assert stated["scale_pattern"]


def example(tmp_path: Path) -> tuple[Adapter, Path]:
    case = CASES[1]
    adapter = Adapter(config=case.config, layers={"m.0.layer": random_layer(case), "m.1.layer": random_layer(case, 1)})
    return adapter, save_adapter(adapter, tmp_path / "a")


@pytest.mark.parametrize("field", ["scale", "zero_factor", "format_version", "base_fingerprint"])
def test_a_changed_setting_is_refused(reader: Any, field: str, tmp_path: Path) -> None:
    _, folder = example(tmp_path)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config[field] = {"scale": 1.5, "zero_factor": "a", "format_version": 1, "base_fingerprint": "00"}[field]
    file.write_text(json.dumps(config))
    changed = (
        "format version 2; got 1" if field == "format_version" else "not as it was written, its checksum is another"
    )
    with pytest.raises(ValueError, match=changed):
        dict(reader.deltas(folder))


def test_a_changed_number_is_refused(reader: Any, tmp_path: Path) -> None:
    _, folder = example(tmp_path)
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="not as it was written"):
        dict(reader.deltas(folder))


def test_it_runs_alone_and_needs_numpy_and_safetensors_only(tmp_path: Path) -> None:
    adapter, folder = example(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    copy = Path(alone / FILE.name)
    copy.write_bytes(FILE.read_bytes())
    blocked = "import sys, runpy; sys.modules.update(dict.fromkeys(('ml_dtypes', 'moka_core', 'conversion'))); "

    def run(*arguments: object) -> str:
        script = f"{blocked} sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-P", "-c", script, copy, folder, *arguments]
        command = list(map(str, command))
        return subprocess.run(command, cwd=alone, capture_output=True, text=True, check=True, timeout=120).stdout

    norms = {path: np.linalg.norm(dense_delta(layer, adapter.config)) for path, layer in adapter.layers.items()}
    assert run() == "".join(f"{path} (96, 24) {norm:.6g}\n" for path, norm in norms.items())
    first = f"{dense_delta(adapter.layers['m.1.layer'], adapter.config)[0, 0]:.8f}"
    assert run("m.1.layer").startswith("m.1.layer [[")
    assert first in run("m.1.layer")
    usage = subprocess.run([sys.executable, FILE], capture_output=True, text=True, check=False, timeout=120)
    assert (usage.returncode, usage.stderr) == (1, "usage: python read_adapter.py FOLDER [LAYER]\n")


def test_layers_come_in_the_models_order_and_an_unknown_one_is_named(reader: Any, tmp_path: Path) -> None:
    case = CASES[1]
    paths = [f"m.{number}.{name}" for number in range(11) for name in ("k", "q")]
    layers = {path: random_layer(case) for path in reversed(paths)}
    folder = save_adapter(Adapter(config=case.config, layers=layers), tmp_path / "a")
    assert [path for path, _ in reader.deltas(folder)] == paths
    with pytest.raises(ValueError, match=r"no layer 'm\.11\.k'; expected one of its 22, such as m\.0\.k"):
        next(reader.deltas(folder, "m.11.k"))
    with pytest.raises(FileNotFoundError):
        next(reader.deltas(tmp_path / "nowhere"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="expected a MoKA adapter of format version 2; got None"):
        next(reader.deltas(folder))


def test_it_is_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_sample_of_the_format_is_read(reader: Any, tmp_path: Path) -> None:
    """FORMAT.md states two entries of the ΔW of its sample."""
    config = MokaConfig(r=3, num_shapes=2, dropout=0.0, target_modules=("q_proj",))
    text = (FILE.parents[1] / "conversion" / "FORMAT.md").read_text(encoding="utf-8")
    values = json.loads(text.split("```json\n")[1].split("```")[0])
    stated = MokaConfig.from_dict({"shapes": values["shapes"], "r": 3}).shapes
    config = dataclasses.replace(config, shapes=stated)
    tensors = {
        "factor_a.0": np.arange(1, 13).reshape(2, 2, 3) / 4,
        "factor_a.1": np.array([[[20, 21]]]) / 4,
        "factor_b.0": np.arange(-10, -2).reshape(2, 2, 2) / 4,
        "factor_b.1": np.arange(40, 52).reshape(1, 4, 3) / 4,
        "gate_logits": np.array([-1, 0, 1]) / 4,
    }
    layer = LayerFactors.from_tensors(stated[0], config, {k: v.astype(np.float32) for k, v in tensors.items()})
    path = "model.layers.0.self_attn.q_proj"
    folder = save_adapter(Adapter(config=config, layers={path: layer}), tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps(values))  # the sample's own words and checksum
    delta = dict(reader.deltas(folder))[path]
    assert f"ΔW[0, 0] = {delta[0, 0]:.9f} and ΔW[3, 5] = {delta[3, 5]:.9f}" in text
