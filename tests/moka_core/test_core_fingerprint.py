"""The base fingerprint: equal for one model however it is held and spelled, different for another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig

from moka_core import AdapterError, ModelError, base_difference, base_fingerprint, check_base

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def norms(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(2)] + ["model.norm.weight"]
    return {name: rng.uniform(0.5, 1.5, 64).astype(np.float32) for name in names}


def digest(norm: dict[str, np.ndarray] | None = None, **changes: Any) -> str:
    return base_fingerprint({**CONFIG, **changes}, norms() if norm is None else norm)


def test_the_fingerprint_is_pinned_since_it_stands_in_saved_adapters() -> None:
    ones = {"model.norm.weight": np.ones(64, np.float32)}
    assert base_fingerprint(CONFIG, ones) == "abeb4eb04b573b693d319637cde9cc46096533380b2f6a7529274356e67e2563"


def test_float32_and_bfloat16_norms_give_one_fingerprint() -> None:
    halved = {name: weight.astype(ml_dtypes.bfloat16).astype(np.float32) for name, weight in norms().items()}
    assert any((halved[name] != weight).any() for name, weight in norms().items())
    assert digest(halved) == digest()


def test_rounding_to_bfloat16_is_to_nearest_with_ties_to_even() -> None:
    tie_down, tie_up = np.float32(1 + 2**-8), np.float32(1 + 3 * 2**-8)
    for value in (tie_down, tie_up):
        held = np.full(4, value, np.float32)
        rounded = held.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert rounded[0] != value
        assert base_fingerprint({}, {"norm": held}) == base_fingerprint({}, {"norm": rounded})


def test_the_order_in_which_norms_are_read_does_not_matter() -> None:
    assert digest(dict(reversed(norms().items()))) == digest()


def test_the_sketch_of_the_linear_weights_follows_the_digest() -> None:
    layers = {"model.layers.0.self_attn.q_proj": None, "model.layers.1.self_attn.q_proj": None, "lm_head": None}
    assert base_fingerprint(CONFIG, norms(), layers) == f"{digest()}.q_proj:{'.' * 64}"
    assert base_fingerprint(CONFIG, norms(), {"lm_head": None}) == digest()


def changed_norm() -> dict[str, np.ndarray]:
    values = norms()
    values["model.norm.weight"][17] *= 1.01
    return values


def renamed_norm() -> dict[str, np.ndarray]:
    values = norms()
    first, second, last = values
    return {first: values[second], second: values[first], last: values[last]}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: digest(changed_norm()), id="one norm weight"),
        pytest.param(lambda: digest(renamed_norm()), id="two layers' norms exchanged"),
        pytest.param(lambda: digest({"model.norm.weight": norms()["model.norm.weight"]}), id="a norm less"),
        pytest.param(lambda: digest(rope_theta=10000.0), id="rope theta"),
        pytest.param(lambda: digest(moka_merged=["ab"]), id="an adapter was merged"),
        pytest.param(lambda: digest(num_hidden_layers=3), id="layers"),
        pytest.param(lambda: digest(num_key_value_heads=4), id="key heads"),
        pytest.param(lambda: digest(rms_norm_eps=1e-6), id="epsilon"),
        pytest.param(lambda: digest(rope_scaling=None), id="no rope scaling"),
        pytest.param(lambda: digest(rope_scaling={**CONFIG["rope_scaling"], "factor": 32.0}), id="rope factor"),
        pytest.param(lambda: digest(rope_scaling={**CONFIG["rope_scaling"], "rope_type": "yarn"}), id="rope type"),
    ],
)
def test_another_model_has_another_fingerprint(other: Any) -> None:
    assert other() != digest()


def test_what_quantisation_and_saving_add_to_a_config_does_not_matter() -> None:
    assert digest(quantization_config={"load_in_4bit": True}, torch_dtype="bfloat16", use_cache=False) == digest()


@pytest.mark.parametrize("scaling", [CONFIG["rope_scaling"], None, {"type": "linear", "factor": 2.0}], ids=str)
def test_rope_scaling_and_rope_parameters_spell_one_model(scaling: dict[str, Any] | None) -> None:
    old = {**CONFIG, "rope_scaling": scaling}
    new = {key: value for key, value in CONFIG.items() if key not in ("rope_scaling", "rope_theta")}
    nested = {("rope_type" if key == "type" else key): value for key, value in (scaling or {}).items()}
    new["rope_parameters"] = {"rope_type": "default", **nested, "rope_theta": 500000.0}
    assert base_fingerprint(old, norms()) == base_fingerprint(new, norms())


@pytest.mark.parametrize(
    "scaling", [CONFIG["rope_scaling"], None, {"type": "linear", "factor": 2.0}], ids=["llama3", "none", "linear"]
)
def test_a_config_that_transformers_read_and_wrote_keeps_its_fingerprint(scaling: dict[str, Any] | None) -> None:
    old = {**CONFIG, "rope_scaling": scaling}
    rewritten = LlamaConfig(**{key: dict(v) if isinstance(v, dict) else v for key, v in old.items()}).to_dict()
    assert "rope_parameters" in rewritten
    assert base_fingerprint(old, norms()) == base_fingerprint(rewritten, norms())


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 16), ("num_key_value_heads", 4), ("rope_theta", 10000.0), ("rms_norm_eps", 1e-6)],
)
def test_a_field_left_out_is_the_one_that_transformers_would_take(field: str, value: Any) -> None:
    without = {key: v for key, v in CONFIG.items() if key != field}
    assert base_fingerprint({**CONFIG, field: value}, norms()) == base_fingerprint(without, norms())
    nothing = {**CONFIG, field: None}
    assert base_fingerprint(nothing, norms()) == base_fingerprint(without, norms())


LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# settings that transformers completes, moves or overrules when it reads them
COMPLETED = {
    "yarn without its first context": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "longrope, its first context outside": {"rope_scaling": LONG, "original_max_position_embeddings": 512},
    "a factor of one outside": {"partial_rotary_factor": 1.0},
    "both spellings": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Mistral without key heads": {"model_type": "mistral", "num_key_value_heads": None, "rope_scaling": None},
}


@pytest.mark.parametrize("which", COMPLETED)
def test_what_transformers_completes_keeps_its_fingerprint(which: str, tmp_path: Path) -> None:
    config = {"model_type": "llama", "max_position_embeddings": 2048, **CONFIG, **COMPLETED[which]}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert read != config
    assert base_fingerprint(config, norms()) == base_fingerprint(read, norms())


def test_of_two_spellings_the_one_that_the_model_is_built_from_counts() -> None:
    both = [{**COMPLETED["both spellings"], "rope_scaling": {"rope_type": "linear", "factor": f}} for f in (2.0, 4.0)]
    assert digest(**both[0]) != digest(**both[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": "10000"}, "rope_theta: expected a positive number; got '10000'"),
        ({"rope_theta": -1.0}, "rope_theta: expected a positive number; got -1.0"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive number; got 1000"),
        ({"rope_scaling": "llama3"}, "expected the rotary settings to be a JSON object; got 'llama3'"),
        ({"rope_scaling": [1]}, "expected the rotary settings to be a JSON object; got [1]"),
    ],
)
def test_rotary_settings_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        digest(**changes)


def test_what_was_merged_counts_in_order_and_survives_transformers() -> None:
    assert digest(moka_merged=[]) == digest(moka_merged=None) == digest()
    found = {digest(moka_merged=merged) for merged in (["a"], ["b"], ["a", "b"], ["b", "a"], ["a", "a"])}
    assert len(found) == 5
    rewritten = LlamaConfig(**{**CONFIG, "rope_scaling": None}, moka_merged=["a"]).to_dict()
    assert base_fingerprint(rewritten, norms()) == digest(rope_scaling=None, moka_merged=["a"])


@pytest.mark.parametrize("merged", ["ab", [1], {"a": "b"}, True, [["a"]]])
def test_a_list_of_merged_adapters_that_is_none_is_refused(merged: Any) -> None:
    with pytest.raises(ModelError, match="moka_merged: expected a list of marks, which are texts; got"):
        digest(moka_merged=merged)


def test_numbers_that_are_none_give_a_digest_and_no_foreign_error() -> None:
    assert len(base_fingerprint({"hidden_size": "64", "num_attention_heads": 0}, {})) == 64


# ---- two fingerprints


A, B = "0123456789abcdef" * 4, "fedcba9876543210" * 4
Q, V = "0123456789abcdef" * 4, "a" * 64


def sketched(q: str = Q, v: str = V, digest: str = A) -> str:
    return f"{digest}.q_proj:{q}/v_proj:{v}"


def changed(digits: str, count: int) -> str:
    """The digits, the first ones others."""
    return "".join("1" if digit == "0" else "0" for digit in digits[:count]) + digits[count:]


@pytest.mark.parametrize(
    "other",
    [
        sketched(),
        sketched(q=changed(Q, 25)),
        sketched(q=changed(Q, 25), v=changed(V, 25)),
        A,
        sketched(q="." * 64),
        sketched(q="." * 32 + changed(Q, 64)[32:]),
        f"{A}.v_proj:{V}",
        f"{A}.up_proj:{'5' * 64}",
    ],
    ids=["itself", "rounded", "rounded everywhere", "no sketch", "unknown", "too few known", "a kind less", "others"],
)
def test_one_base_has_several_fingerprints(other: str) -> None:
    assert base_difference(sketched(), other) is None
    assert base_difference(other, sketched()) is None
    assert check_base(sketched(), other) == sketched()


LINEAR = "the architecture and the norm weights of 0123456789abcdef…, but other linear weights: "


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (B, "expected 0123456789abcdef…, got fedcba9876543210…: other architecture numbers, norm weights or merged"),
        (sketched(digest=B), "expected 0123456789abcdef…, got fedcba9876543210…: other architecture numbers"),
        ("mine", "expected 0123456789abcdef…, got mine: other architecture numbers"),
        (sketched(q=changed(Q, 26)), LINEAR + "q_proj in 26 of 64 samples"),
        (sketched(q="." * 16 + changed(Q, 36)[16:]), LINEAR + "q_proj in 20 of 48 samples"),
        (
            sketched(q=changed(Q, 64), v=changed(V, 31)),
            LINEAR + "q_proj in 64 of 64 samples, v_proj in 31 of 64 samples",
        ),
        (sketched(v=V[:32]), LINEAR + "v_proj 32 samples in place of 64"),
    ],
)
def test_another_base_is_told_by_what_differs(other: str, message: str) -> None:
    told = base_difference(sketched(), other)
    assert told is not None
    assert message in told
    with pytest.raises(AdapterError) as refused:
        check_base(sketched(), other)
    assert str(refused.value).startswith("base_fingerprint: the adapter was trained on another base model: " + told)
    assert "Load the adapter's own base" in str(refused.value)
    assert "allow_other_base=True, --allow-other-base" in str(refused.value)
    assert check_base(sketched(), other, allow_other_base=True) == other


def test_texts_of_other_kinds_are_compared_whole() -> None:
    assert base_difference("mine", "mine") is None
    assert base_difference("mine.q_proj:00", "mine.q_proj:01") is not None


def test_a_base_that_cannot_be_told_is_refused_unless_allowed() -> None:
    with pytest.raises(AdapterError, match="expected 0123456789abcdef…, and this model has no fingerprint to tell it"):
        check_base(A, None)
    assert check_base(A, None, allow_other_base=True) is None


def test_an_adapter_without_a_fingerprint_goes_on_any_base() -> None:
    assert check_base(None, B) == B
    assert check_base(None, None) is None


def test_an_older_fingerprint_is_replaced_by_one_that_says_more() -> None:
    assert check_base(A, sketched()) == sketched()
