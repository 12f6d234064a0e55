"""The LoRA folder: the best approximation of each rank, whichever way it is computed, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import conversion.low_rank
from conversion.adapter_folder import PREFIX
from conversion.lora import export_lora, target_modules
from conversion.low_rank import (
    FactoredDelta,
    lanczos_pays,
    rank_for,
    relative_errors,
    singular_values,
    truncated_svd,
)
from moka_core import Adapter, AdapterError, ConfigError, LayerFactors, MokaConfig, PathError
from moka_core.oracle import dense_delta
from tests.cases import CASES, LayerCase, random_layer

CASE = {case.name: case for case in CASES}
SQUARE, TALL = CASE["square"], CASE["tall"]
# Large enough that Lanczos pays.
LARGE = LayerCase(name="large", out_features=640, in_features=576, settings={"r": 6, "num_shapes": 3})


def case_adapter(case: LayerCase, *, seed: int = 0, layers: int = 2) -> Adapter:
    factors = {f"model.layers.{index}.layer": random_layer(case, seed + index) for index in range(layers)}
    return Adapter(config=case.config, layers=factors, base_model="tiny")


def read_delta(folder, path: str) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{path}.lora_{name}.weight"].astype(np.float64) for name in "AB")
    return b @ a


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_factored_delta_is_the_oracles(case):
    layer = random_layer(case)
    oracle = dense_delta(layer, case.config)
    delta = FactoredDelta.of(layer, case.config)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(case.in_features), rng.standard_normal(case.out_features)
    size = np.linalg.norm(oracle)
    # measured: at most 6e-17 of ‖ΔW‖ (times ‖x‖) in all of them
    np.testing.assert_allclose(delta @ x, oracle @ x, rtol=0, atol=1e-14 * size * np.linalg.norm(x))
    np.testing.assert_allclose(delta.T @ y, oracle.T @ y, rtol=0, atol=1e-14 * size * np.linalg.norm(y))
    np.testing.assert_allclose(delta.dense(), oracle, rtol=0, atol=1e-14 * size)
    half = case.out_features // 2
    np.testing.assert_allclose(delta.rows(1, half + 1), oracle[1 : half + 1], rtol=0, atol=1e-14 * size)
    assert delta.norm == pytest.approx(size, rel=1e-14)


def test_the_norm_and_the_distance_do_not_depend_on_the_height_of_the_panels(monkeypatch):
    delta = FactoredDelta.of(random_layer(TALL), TALL.config)
    whole = delta.norm
    b, a = np.ones((TALL.out_features, 1)), np.ones((1, TALL.in_features))
    apart = delta.distance(b, a)
    monkeypatch.setattr(conversion.low_rank, "_PANEL_ENTRIES", 7 * TALL.in_features)
    other = FactoredDelta.of(random_layer(TALL), TALL.config)
    assert len(list(other.panels())) == 14
    assert other.norm == pytest.approx(whole, rel=1e-14)
    assert other.distance(b, a) == pytest.approx(apart, rel=1e-14)
    assert apart == pytest.approx(float(np.linalg.norm(dense_delta(random_layer(TALL), TALL.config) - 1)), rel=1e-13)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_rank_is_the_best_and_its_error_is_what_numpy_says(case):
    layer = random_layer(case)
    oracle = dense_delta(layer, case.config)
    values = np.linalg.svd(oracle, compute_uv=False)
    delta = FactoredDelta.of(layer, case.config)
    # measured: 1.2e-15
    np.testing.assert_allclose(singular_values(delta), values, rtol=0, atol=1e-13 * values[0])
    for rank in {1, 2, len(values) // 2 or 1, len(values)}:
        found = truncated_svd(delta, rank)
        b, a = found.balanced()
        best = np.sqrt(np.sum(values[rank:] ** 2))
        assert np.linalg.norm(oracle - b @ a) == pytest.approx(best, rel=1e-9, abs=1e-13 * values[0])
        assert delta.distance(b, a) == pytest.approx(best, rel=1e-9, abs=1e-13 * values[0])
        following = values[rank] if rank < len(values) else 0.0
        assert found.next_value == pytest.approx(following, rel=1e-9, abs=1e-13 * values[0])
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_full_rank_the_folder_holds_delta(case, tmp_path):
    adapter = case_adapter(case)
    full = min(case.out_features, case.in_features)
    report = export_lora(adapter, tmp_path / "lora", rank=full)
    assert report.rank == full
    for layer in report.layers:
        oracle = dense_delta(adapter.layers[layer.path], adapter.layer_config(layer.path))
        error = relative(read_delta(tmp_path / "lora", layer.path), oracle)
        assert error < 1e-5  # float32's rounding; measured: at most 4.2e-8
        assert layer.relative == pytest.approx(error, rel=1e-6)
        assert layer.spectral == 0.0


def test_the_reported_errors_are_those_of_the_written_folder(tmp_path):
    adapter = case_adapter(SQUARE)
    for dtype in ("float32", "bfloat16", "float16"):
        report = export_lora(adapter, tmp_path / dtype, rank=20, dtype=dtype)
        squares = []
        for layer in report.layers:
            oracle = dense_delta(adapter.layers[layer.path], SQUARE.config)
            values = np.linalg.svd(oracle, compute_uv=False)
            written = read_delta(tmp_path / dtype, layer.path)
            assert layer.relative == pytest.approx(relative(written, oracle), rel=1e-9)
            assert layer.best == pytest.approx(np.sqrt(np.sum(values[20:] ** 2)) / layer.norm, rel=1e-9)
            assert layer.relative >= layer.best * (1 - 1e-12)
            assert layer.spectral == pytest.approx(values[20] / values[0], rel=1e-9)
            squares.append(np.linalg.norm(written - oracle) ** 2)
        assert report.total == pytest.approx(
            np.sqrt(sum(squares) / sum(layer.norm**2 for layer in report.layers)), rel=1e-9
        )
    assert report.parameters == sum(t.size for t in load_file(tmp_path / "float32/adapter_model.safetensors").values())
    assert load_file(tmp_path / "float16/adapter_model.safetensors").popitem()[1].dtype == np.float16


def test_lanczos_finds_what_lapack_finds_without_forming_delta(monkeypatch):
    layer = random_layer(LARGE)
    delta = FactoredDelta.of(layer, LARGE.config)
    values = np.linalg.svd(dense_delta(layer, LARGE.config), compute_uv=False)
    assert lanczos_pays(delta, 12)
    assert not lanczos_pays(delta, 192)
    monkeypatch.setattr(FactoredDelta, "dense", lambda self: pytest.fail("ΔW was formed"))
    found = truncated_svd(delta, 12)
    assert found.way == "lanczos"
    np.testing.assert_allclose(found.values, values[:12], rtol=1e-12)  # measured: 3e-15
    assert found.next_value == pytest.approx(values[12], rel=1e-5)
    best = np.sqrt(np.sum(values[12:] ** 2))
    assert delta.distance(*found.balanced()) == pytest.approx(best, rel=1e-10)
    again = truncated_svd(FactoredDelta.of(layer, LARGE.config), 12)
    np.testing.assert_array_equal(found.u, again.u)


def test_lanczos_that_misses_one_of_several_equal_values_is_noticed(monkeypatch):
    """I₄₈ ⊗ B + I₂₄ ⊗ C: every singular value stands there 24 times; what ARPACK returns is right, or not taken."""
    shapes = ((1, 48, 48, 2, 2), (1, 24, 24, 4, 4))
    case = LayerCase(name="", out_features=96, in_features=96, shapes=shapes, settings={"identity": "a"})
    layer = random_layer(case)
    delta = FactoredDelta.of(layer, case.config)
    values = np.linalg.svd(dense_delta(layer, case.config), compute_uv=False)
    monkeypatch.setattr(conversion.low_rank, "lanczos_pays", lambda delta, rank: True)
    found = truncated_svd(delta, 6)
    np.testing.assert_allclose(found.values, values[:6], rtol=1e-12)
    # without the check of what is left over, the second value would stand there: one vector sees each value once
    monkeypatch.setattr(
        conversion.low_rank, "svds", lambda *_, k, **__: (found.u, values[[0, 24, 48, 72, 72, 72]], found.vt)
    )
    assert truncated_svd(delta, 6).way == "lapack, since lanczos failed"


def test_a_lanczos_that_does_not_converge_is_replaced_and_reported(tmp_path, monkeypatch):
    def gives_up(*arguments, **settings):
        raise conversion.low_rank.ArpackError(-9999)

    monkeypatch.setattr(conversion.low_rank, "svds", gives_up)
    adapter = case_adapter(LARGE, layers=1)
    report = export_lora(adapter, tmp_path / "lora", rank=3)
    assert "Lanczos did not converge for model.layers.0.layer" in "".join(report.notes)
    values = np.linalg.svd(dense_delta(adapter.layers["model.layers.0.layer"], LARGE.config), compute_uv=False)
    assert report.worst.spectral == pytest.approx(values[3] / values[0], rel=1e-9)


def test_a_delta_of_lower_rank_than_asked_for_leaves_nothing(monkeypatch):
    """Outer products: ΔW of 576x576 has rank 2; both ways know that nothing is left."""
    shapes = ((1, 576, 1, 1, 576), (1, 1, 576, 576, 1))
    case = LayerCase(name="", out_features=576, in_features=576, shapes=shapes)
    delta = FactoredDelta.of(random_layer(case), case.config)
    for pays in (True, False):
        monkeypatch.setattr(conversion.low_rank, "lanczos_pays", lambda delta, rank, pays=pays: pays)
        found = truncated_svd(delta, 4)
        assert found.next_value <= 1e-12 * found.values[0]
        assert delta.distance(*found.balanced()) <= 1e-12 * delta.norm


@pytest.mark.parametrize("case", [SQUARE, CASE["identity a"], LARGE], ids=lambda case: case.name or "")
@pytest.mark.parametrize("error", [0.9, 0.3, 1e-3, 1e-7])
def test_the_rank_for_an_error_is_the_smallest(case, error):
    layer = random_layer(case)
    values = np.linalg.svd(dense_delta(layer, case.config), compute_uv=False)
    errors = [np.sqrt(np.sum(values[k:] ** 2)) / np.linalg.norm(values) for k in range(len(values) + 1)]
    expected = next(k for k, value in enumerate(errors) if value <= error)
    assert rank_for(FactoredDelta.of(layer, case.config), error) == expected


def test_small_errors_do_not_cancel():
    values = np.array([1.0, 1e-9, 1e-12])
    np.testing.assert_allclose(relative_errors(values), [1.0, 1e-9, 1e-12, 0.0], rtol=1e-5)


def test_max_error_takes_the_smallest_rank_at_which_every_layer_is_within(tmp_path):
    adapter = case_adapter(SQUARE, layers=3)
    report = export_lora(adapter, tmp_path / "lora", max_error=0.25)
    assert report.worst.relative <= 0.25
    below = export_lora(adapter, tmp_path / "below", rank=report.rank - 1)
    assert below.worst.relative > 0.25


def test_max_error_counts_the_rounding_of_the_dtype(tmp_path):
    """An error just above what the best rank 20 leaves: bfloat16 adds its rounding, and needs a rank more."""
    adapter = case_adapter(SQUARE, layers=1)
    error = export_lora(adapter, tmp_path / "exact", rank=20).worst.best * (1 + 1e-6)
    assert export_lora(adapter, tmp_path / "full", max_error=error).rank == 20
    rounded = export_lora(adapter, tmp_path / "half", max_error=error, dtype="bfloat16")
    assert rounded.rank == 21
    assert rounded.worst.relative <= error
    with pytest.raises(AdapterError, match=r"expected more than bfloat16 takes away from model.layers.0.layer, 0.00"):
        export_lora(adapter, tmp_path / "none", max_error=1e-4, dtype="bfloat16")
    assert not (tmp_path / "none").exists()


def test_max_rank_refuses_and_names_the_layers(tmp_path):
    adapter = case_adapter(SQUARE)
    needed = export_lora(adapter, tmp_path / "lora", max_error=0.25).rank
    with pytest.raises(AdapterError, match=rf"at rank 8 or less \(max_rank\); got 2 of 2(.|\n)*needs {needed}\n"):
        export_lora(adapter, tmp_path / "none", max_error=0.25, max_rank=8)
    assert list(tmp_path.iterdir()) == [tmp_path / "lora"]
    assert export_lora(adapter, tmp_path / "other", max_error=0.25, max_rank=needed).rank == needed


def test_a_layer_with_fewer_singular_values_is_filled_up_with_zeros(tmp_path):
    config = MokaConfig(r=4, num_shapes=2, dropout=0.0, target_modules=("q", "v"))
    cases = {"layers.0.q": (32, 48), "layers.0.v": (8, 48)}
    layers = {}
    for path, (out, in_) in cases.items():
        case = LayerCase(name="", out_features=out, in_features=in_, settings={"r": 4, "num_shapes": 2})
        layers[path] = random_layer(case)
    report = export_lora(Adapter(config=config, layers=layers), tmp_path / "lora", rank=24)
    assert [layer.padded for layer in report.layers] == [0, 16]
    assert "1 of 2 layers have fewer than 24 singular values" in report.notes[0]
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert tensors[f"{PREFIX}layers.0.v.lora_A.weight"].shape == (24, 48)
    assert tensors[f"{PREFIX}layers.0.v.lora_B.weight"].shape == (8, 24)
    assert (tensors[f"{PREFIX}layers.0.v.lora_B.weight"][:, 8:] == 0).all()
    assert report.layers[1].relative < 1e-6 < report.layers[0].relative


def test_identity_mixtures_are_said_to_be_a_bad_match(tmp_path):
    case = CASE["identity a"]
    report = export_lora(case_adapter(case), tmp_path / "lora", rank=2)
    assert "every singular value of I ⊗ S stands there as often" in report.notes[0]
    assert {layer.way for layer in report.layers} == {"kronecker"}
    # I₈ ⊗ S or larger: the third value equals the first
    assert report.worst.spectral == pytest.approx(1.0, abs=1e-12)
    assert not export_lora(case_adapter(SQUARE), tmp_path / "other", rank=2).notes


def test_an_untrained_layer_becomes_zeros(tmp_path):
    layer = random_layer(SQUARE)
    zero = LayerFactors(
        plan=layer.plan,
        factor_a=layer.factor_a,
        factor_b=tuple(np.zeros_like(b) for b in layer.factor_b),
        gate_logits=layer.gate_logits,
    )
    adapter = Adapter(config=SQUARE.config, layers={"a.layer": zero, "b.layer": layer})
    report = export_lora(adapter, tmp_path / "lora", max_error=0.5)
    assert report.layers[0].relative == report.layers[0].spectral == 0.0
    assert (read_delta(tmp_path / "lora", "a.layer") == 0).all()
    assert 0 < report.layers[1].relative <= 0.5


def test_the_config_is_lora_at_scaling_one(tmp_path):
    adapter = case_adapter(SQUARE)
    export_lora(adapter, tmp_path / "lora", rank=8, linear_layers=[*adapter.layers, "lm_head"])
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["target_modules"] == ["layer"]
    assert config["base_model_name_or_path"] == "tiny"
    assert config["bias"] == "none"
    assert config["inference_mode"] is True
    assert oct((tmp_path / "lora").stat().st_mode)[-3:] == "755"


def test_target_modules_are_names_only_where_they_match_no_other_layer():
    paths = [f"layers.{n}.{name}" for n in (0, 1) for name in ("q", "k")]
    assert target_modules(["layers.0.q", "layers.1.q"], paths) == ["q"]
    assert target_modules(paths, paths) == ["k", "q"]
    assert target_modules(["layers.0.q", "layers.1.k"], paths) == ["layers.0.q", "layers.1.k"]
    assert target_modules(["layers.0.q", "layers.1.q"]) == ["layers.0.q", "layers.1.q"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either a rank or a largest error; got neither"),
        ({"rank": 4, "max_error": 0.1}, "expected either a rank or a largest error; got both"),
        ({"rank": 0}, "rank: expected a whole number >= 1; got 0"),
        ({"rank": True}, "rank: expected a whole number >= 1; got True"),
        ({"rank": 65}, r"rank: expected at most 64, at which every layer is exact \(.*\); got 65"),
        ({"max_error": 0.0}, "max_error: expected 0 < max_error < 1"),
        ({"max_error": 1.0}, "max_error: expected 0 < max_error < 1"),
        ({"max_error": float("nan")}, "max_error: expected 0 < max_error < 1"),
        ({"max_error": 0.5, "max_rank": 0}, "max_rank: expected a whole number >= 1; got 0"),
        ({"rank": 4, "max_rank": 8}, "max_rank: expected together with max_error only"),
        ({"rank": 4, "dtype": "float64"}, "dtype: expected float32, bfloat16 or float16; got 'float64'"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_lora(case_adapter(SQUARE), tmp_path / "lora", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_left_alone_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(FactoredDelta, "of", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "lora").mkdir()
    with pytest.raises(PathError, match="lora: expected a folder that does not exist yet"):
        export_lora(case_adapter(SQUARE), tmp_path / "lora", rank=4)
    assert list((tmp_path / "lora").iterdir()) == []


def test_factors_that_overflow_float16_are_refused_and_nothing_is_left(tmp_path):
    case = LayerCase(name="", out_features=64, in_features=64, settings={"scale": 1e12})
    with pytest.raises(AdapterError, match="layer: its LoRA factors do not fit into float16; write them in float32"):
        export_lora(case_adapter(case), tmp_path / "lora", rank=4, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fails(*arguments, **settings):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("conversion.lora.save_file", fails)
    with pytest.raises(PathError, match="lora: cannot be written; No space left on device; make room"):
        export_lora(case_adapter(SQUARE), tmp_path / "lora", rank=4)
    assert list(tmp_path.iterdir()) == []
