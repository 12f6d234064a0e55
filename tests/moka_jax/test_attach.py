"""The verbs on whole models, ours and others: attach, merge, export_adapter, import_adapter, and what they refuse."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moka_core import AdapterError, ConfigError, TargetError, preset
from moka_core.oracle import dense_delta
from moka_jax import (
    MokaLinear,
    MokaParam,
    Nf4Linear,
    attach,
    export_adapter,
    import_adapter,
    merge,
)
from moka_jax.llama import packed_weights
from moka_jax.sites import linear_sites
from tests.moka_jax.toys import CONFIG, FOREIGN_SITES, Foreign, leaves, random_adapter, randomise, run, tiny_llama

ALL = dataclasses.replace(CONFIG, target_modules="all-linear")
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 6))
X = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)

MODELS = {
    "stacked LLaMA": (tiny_llama, CONFIG, TOKENS),
    "NF4 LLaMA": (lambda: tiny_llama(packed=True), CONFIG, TOKENS),
    "foreign model": (lambda: Foreign(nnx.Rngs(0)), ALL, X),
}
each_model = pytest.mark.parametrize("which", MODELS)


def assert_same_adapter(found, expected) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        assert found.layers[name].plan == layer.plan
        ours, theirs = dict(found.layers[name].tensors()), dict(layer.tensors())
        assert ours.keys() == theirs.keys()
        for tensor, array in theirs.items():
            assert ours[tensor].dtype == array.dtype
            np.testing.assert_array_equal(ours[tensor], array, err_msg=f"{name}.{tensor}")


def test_sites_of_a_stacked_llama_have_the_names_and_dims_of_a_checkpoint():
    for packed in (False, True):
        model = tiny_llama(packed=packed)
        found = {name: site.dims for site in linear_sites(model) for name in site.names}
        assert found == model.architecture.linear_layers()
        attach(model, CONFIG)
        assert {name: site.dims for site in linear_sites(model) for name in site.names} == found


def test_sites_of_a_foreign_model_are_its_linear_layers_and_nothing_else():
    """nnx.LoRALinear computes more than W x."""
    model = Foreign(nnx.Rngs(0))
    model.lora = nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0))
    assert [name for site in linear_sites(model) for name in site.names] == FOREIGN_SITES
    with pytest.raises(TargetError, match="'lora' matches no linear layer"):
        attach(model, dataclasses.replace(CONFIG, target_modules=("lora",)))


@pytest.mark.parametrize("which", ["stacked LLaMA", "NF4 LLaMA"])
def test_the_start_is_the_base(which):
    make, config, inputs = MODELS[which]
    expected = run(make(), inputs)
    found = run(attach(make(), config, execution="factored"), inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_preset_is_attached_by_its_name():
    model = tiny_llama()
    by_name = export_adapter(attach(model, "paper-s"))
    assert_same_adapter(by_name, export_adapter(attach(tiny_llama(), preset("paper-s", model.architecture))))
    with pytest.raises(ConfigError, match="preset"):
        attach(tiny_llama(), "papr")


@each_model
def test_attach_train_export_import_gives_the_same_bits(which):
    make, config, inputs = MODELS[which]
    model = randomise(attach(make(), config))
    adapter = export_adapter(model)
    again = import_adapter(make(), adapter)
    assert_same_adapter(export_adapter(again), adapter)
    before, after = leaves(model), leaves(again)
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array, err_msg=str(path))
    np.testing.assert_array_equal(run(again, inputs), run(model, inputs))


@each_model
def test_every_layer_gets_its_own_factors_and_computes_the_oracles_delta(which):
    make, config, _ = MODELS[which]
    model = make()
    adapter = random_adapter(model, config)
    import_adapter(model, adapter)
    assert_same_adapter(export_adapter(model), adapter)
    checked = set()
    for site in linear_sites(model):
        if not isinstance(site.module, MokaLinear):
            continue
        delta = MokaLinear.delta if site.layers is None else nnx.vmap(MokaLinear.delta)
        found = np.asarray(delta(site.module)).reshape(len(site.names), *site.dims)
        for name, array in zip(site.names, found, strict=True):
            expected = dense_delta(adapter.layers[name], config)
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
            checked.add(name)
    assert checked == set(adapter.layers)


def test_an_exported_adapter_does_not_follow_the_model():
    model = randomise(attach(tiny_llama(), CONFIG), seed=1)
    adapter = export_adapter(model)
    before = {(name, key): array.copy() for name, layer in adapter.layers.items() for key, array in layer.tensors()}
    randomise(model, seed=2)
    for name, layer in adapter.layers.items():
        for key, array in layer.tensors():
            np.testing.assert_array_equal(array, before[name, key])


@pytest.mark.parametrize(("which", "execution"), list(zip(MODELS, ["factored", "merged", "factored"], strict=True)))
def test_a_merged_model_computes_what_the_adapted_one_does_with_dense_layers_only(which, execution):
    make, config, inputs = MODELS[which]
    model = import_adapter(make(), random_adapter(make(), dataclasses.replace(config, scale=0.2)), execution=execution)
    assert {site.module.execution for site in linear_sites(model) if isinstance(site.module, MokaLinear)} == {execution}
    expected, base = run(model, inputs), run(make(), inputs)
    targets = [site.path for site in linear_sites(model) if isinstance(site.module, MokaLinear)]
    assert merge(model) is model
    found = run(model, inputs)
    # one rounding more on one side; the mixture alone differs by 2.5e-7 (test_mixture.py)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.ptp(expected))
    assert np.abs(expected - base).max() > 0.05 * np.ptp(expected)
    after = {site.path: site.module for site in linear_sites(model)}
    dense = {nnx.Linear, nnx.LinearGeneral} if which == "foreign model" else {nnx.Linear}
    assert {type(after[path]) for path in targets} == dense
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    assert jax.tree.leaves(nnx.state(model, MokaParam)) == []
    untouched = [site.module for site in linear_sites(model) if site.path not in targets]
    assert any(isinstance(module, Nf4Linear) for module in untouched) == (which == "NF4 LLaMA")


def test_a_merged_model_can_be_adapted_again():
    model = merge(import_adapter(tiny_llama(packed=True), random_adapter(tiny_llama())))
    expected = run(model, TOKENS)
    found = run(attach(model, CONFIG, execution="factored"), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.ptp(expected))


@each_model
def test_exactly_the_adapter_is_selected_for_training(which):
    make, config, _ = MODELS[which]
    before = leaves(make())
    model = attach(make(), config)
    _, adapter, frozen = nnx.split(model, MokaParam, ...)
    expected = random_adapter(make(), config).trainable
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == expected
    bases = {tuple(part for part in path if part != "base"): variable for path, variable in nnx.to_flat_state(frozen)}
    assert bases.keys() == before.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(bases[path][...], array, err_msg=str(path))


def test_the_seed_decides_the_start_and_sites_and_layers_differ():
    one, again, other = (export_adapter(attach(tiny_llama(), CONFIG, seed=seed)) for seed in (0, 0, 1))
    assert_same_adapter(one, again)
    drawn = [layer.factor_a[0] for layer in (*one.layers.values(), *other.layers.values())]
    same_shape = [array for array in drawn if array.shape == drawn[0].shape]
    assert len(same_shape) >= 6
    for index, first in enumerate(same_shape):
        for second in same_shape[index + 1 :]:
            assert np.isclose(first, second).mean() < 0.1


def test_packed_weights_are_the_same_under_an_adapter():
    model = tiny_llama(packed=True)
    before = {name: weight.parts() for name, weight in packed_weights(model)}
    after = {name: weight.parts() for name, weight in packed_weights(attach(model, CONFIG))}
    assert before.keys() == after.keys()
    assert len(before) == 12
    for name, parts in before.items():
        for part, array in parts.items():
            assert after[name][part].tobytes() == array.tobytes(), (name, part)


# --- refusals: each must leave the model as it was


def refused(model: nnx.Module, error: type[Exception], act, *parts: str) -> str:
    """Check that `act(model)` raises, that the message has every part, and that nothing of the model changed."""
    graphdef, before = nnx.graphdef(model), leaves(model)
    with pytest.raises(error) as caught:
        act(model)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert nnx.graphdef(model) == graphdef
    after = leaves(model)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[path], array) for path, array in before.items())
    return str(caught.value)


def targets(*names: str):
    return dataclasses.replace(CONFIG, target_modules=names)


def test_attach_or_import_on_an_adapted_model_is_refused():
    model = attach(tiny_llama(), CONFIG)
    refused(model, ConfigError, lambda m: attach(m, CONFIG), "has an adapter already; merge it first")
    refused(model, ConfigError, lambda m: attach(m, targets("down_proj")), "has an adapter already")
    refused(model, ConfigError, lambda m: import_adapter(m, random_adapter(tiny_llama())), "has an adapter already")


def test_arguments_of_another_kind_are_refused_by_name():
    adapter = random_adapter(tiny_llama())
    for error, act, message in (
        (AdapterError, lambda m: import_adapter(m, "folder"), "expected an Adapter, as conversion.load_adapter reads"),
        (ConfigError, lambda m: import_adapter(adapter, m), "import_adapter: expected a model"),
        (ConfigError, lambda _: attach(Foreign, CONFIG), "as the first argument; got the class Foreign"),
        (ConfigError, lambda m: attach(m, {"r": 5}), "expected a MokaConfig or a preset's name; got dict"),
    ):
        refused(tiny_llama(), error, act, message)


def test_export_or_merge_without_an_adapter_is_refused():
    refused(tiny_llama(), AdapterError, export_adapter, "export_adapter: this model has no adapter; attach one")
    refused(tiny_llama(), AdapterError, merge, "merge: this model has no adapter; attach one")


def test_a_target_that_matches_nothing_is_refused_with_near_misses():
    act = lambda m: attach(m, targets("v_proj", "q_prj"))  # noqa: E731
    refused(tiny_llama(), TargetError, act, "'q_prj' matches no linear layer", "did you mean 'q_proj'")


def test_a_regex_for_some_layers_of_a_stack_is_refused():
    config = dataclasses.replace(CONFIG, target_modules=r".*\.[02]\.self_attn\.v_proj")
    refused(
        tiny_llama(),
        TargetError,
        lambda m: attach(m, config),
        "2 of 3 layers of the stack 'model.layers.block.self_attn.v_proj' match",
        "first that does not: model.layers.1.self_attn.v_proj",
    )
    whole = dataclasses.replace(CONFIG, target_modules=r"model\.layers\.\d+\.self_attn\.v_proj")
    assert len(export_adapter(attach(tiny_llama(), whole)).layers) == 3


def test_an_unknown_execution_is_refused():
    act = lambda m: attach(m, CONFIG, execution="fast")  # noqa: E731
    refused(tiny_llama(), ConfigError, act, "execution: expected one of auto, factored, merged; got 'fast'")


def test_an_adapter_for_other_layers_or_dims_is_refused_with_all_of_them():
    model, adapter = tiny_llama(), random_adapter(tiny_llama())
    layers = dict(adapter.layers)
    layers["model.layers.7.self_attn.q_proj"] = layers["model.layers.0.self_attn.q_proj"]
    layers["model.layers.8.self_attn.q_proj"] = layers["model.layers.0.self_attn.q_proj"]
    layers["model.layers.1.self_attn.q_proj"] = layers["model.layers.0.self_attn.v_proj"]
    refused(
        model,
        AdapterError,
        lambda m: import_adapter(m, dataclasses.replace(adapter, layers=layers)),
        "3 problems",
        "model.layers.7.self_attn.q_proj: this model has no such linear layer",
        "model.layers.8.self_attn.q_proj: this model has no such linear layer",
        "model.layers.1.self_attn.q_proj: adapter is for 32x64, the model's layer is 64x64",
    )


def test_an_adapter_for_some_layers_of_a_stack_is_refused():
    adapter = random_adapter(tiny_llama())
    layers = {name: layer for name, layer in adapter.layers.items() if name != "model.layers.2.self_attn.v_proj"}
    act = lambda m: import_adapter(m, dataclasses.replace(adapter, layers=layers))  # noqa: E731
    refused(tiny_llama(), AdapterError, act, "does not fit this model", "model.layers.2.self_attn.v_proj")


def test_a_damaged_adapter_is_refused():
    adapter = random_adapter(tiny_llama())
    adapter.layers["model.layers.2.self_attn.v_proj"].factor_b[1][0, 0, 0] = np.nan
    act = lambda m: import_adapter(m, adapter)  # noqa: E731
    refused(tiny_llama(), AdapterError, act, "model.layers.2.self_attn.v_proj: factor_b.1 has NaN")


def test_an_adapter_of_another_base_is_refused_unless_allowed():
    model = tiny_llama()
    model.base_fingerprint = "b" * 64
    adapter = random_adapter(model, base_fingerprint="a" * 64)
    refused(model, AdapterError, lambda m: import_adapter(m, adapter), "another base model", "aaaaaaaa", "bbbbbbbb")
    import_adapter(model, adapter, allow_other_base=True)
    assert export_adapter(model).base_fingerprint == "b" * 64
    same = tiny_llama()
    same.base_fingerprint = "a" * 64
    import_adapter(same, adapter)
    refused(tiny_llama(), AdapterError, lambda m: import_adapter(m, adapter), "this model has no fingerprint")
    unknown = import_adapter(tiny_llama(), adapter, allow_other_base=True)
    assert export_adapter(unknown).base_fingerprint is None
    import_adapter(tiny_llama(), random_adapter(tiny_llama()))  # it names no base


def test_a_base_in_another_precision_is_the_same_base():
    digits = "0123456789abcdef" * 4
    rounded = f"{'a' * 64}.q_proj:{digits.replace('3', '4')}"
    adapter = random_adapter(tiny_llama(), base_fingerprint=f"{'a' * 64}.q_proj:{digits}")
    model = tiny_llama()
    model.base_fingerprint = rounded
    import_adapter(model, adapter)
    tuned = tiny_llama()
    tuned.base_fingerprint = f"{'a' * 64}.q_proj:{'5' * 64}"
    act = lambda m: import_adapter(m, adapter)  # noqa: E731
    refused(tuned, AdapterError, act, "other linear weights: q_proj in 60 of 64 samples")


def test_a_layer_that_cannot_be_replaced_everywhere_is_refused():
    class Shared(nnx.Module):
        def __init__(self):
            self.free = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.one = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            self.other = self.one

    class Tuple(nnx.Module):
        def __init__(self):
            self.free = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.fixed = nnx.data((nnx.Linear(8, 8, rngs=nnx.Rngs(1)),))

    refused(Shared(), TargetError, lambda m: attach(m, targets("free", "one")), "stands under one and other")
    refused(Tuple(), TargetError, lambda m: attach(m, targets("free", "0")), "fixed.0 stands in a tuple", "nnx.List")
    for make in (Shared, Tuple):
        assert list(export_adapter(attach(make(), targets("free"))).layers) == ["free"]
