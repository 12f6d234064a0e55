"""tunix's PeftTrainer trains an adapter of ours as it is. Run by `make test-tunix`, in an environment of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moka_core import MokaConfig
from moka_jax import MokaParam, attach, export_adapter, merge, register_einsum
from moka_jax.llama import packed_weights
from tests.moka_jax.toys import CONFIG, leaves, tiny_llama

peft_trainer = pytest.importorskip("tunix.sft.peft_trainer")

STEPS = 12
RATE = 2e-2
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 40, (STEPS, 4, 16))
MASK = (rng.random((STEPS, 4, 16)) < 0.8).astype(np.int32)


def batches() -> list:
    return [peft_trainer.TrainingInput(input_tokens=a, input_mask=b) for a, b in zip(TOKENS, MASK, strict=True)]


def our_loss(model: nnx.Module, input_tokens: jax.Array, input_mask: jax.Array) -> jax.Array:
    """What tunix's own loss computes, for a model that is called with the tokens alone."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(input_tokens)[:, :-1], input_tokens[:, 1:])
    return (losses * input_mask[:, 1:]).sum() / input_mask[:, 1:].sum()


def as_our_input(batch) -> dict:
    return {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}


def as_their_input(batch) -> dict:
    batch_size, time = batch.input_tokens.shape
    positions = jnp.broadcast_to(jnp.arange(time), (batch_size, time))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (batch_size, time, time))
    return {**as_our_input(batch), "positions": positions, "attention_mask": causal}


def trainer(model: nnx.Module, optimiser: optax.GradientTransformation | None = None, **settings):
    settings = {"eval_every_n_steps": 1000, "max_steps": STEPS, **settings}
    config = peft_trainer.TrainingConfig(**settings)
    return peft_trainer.PeftTrainer(model, optimiser or optax.adamw(RATE, weight_decay=0.0), config)


def ours(model: nnx.Module, **settings):
    return trainer(model, **settings).with_loss_fn(our_loss).with_gen_model_input_fn(as_our_input)


def assert_only_the_adapter_moved(model: nnx.Module, before: dict) -> None:
    """Every entry that an optimiser step could move moved, and nothing else did."""
    after = leaves(model)
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, MokaParam))}
    assert trained
    assert trained < before.keys()
    assert after.keys() == before.keys()
    for path, array in before.items():
        assert np.array_equal(after[path], array) == (path not in trained), path


def test_a_packed_llama_ends_where_a_loop_of_ones_own_ends():
    expected = attach(tiny_llama(packed=True), CONFIG)
    graphdef, adapter, frozen = nnx.split(expected, MokaParam, ...)
    optimiser = optax.adamw(RATE, weight_decay=0.0)

    @jax.jit
    def step(adapter, moments, tokens, mask):
        loss = lambda adapter: our_loss(nnx.merge(graphdef, adapter, frozen), tokens, mask)  # noqa: E731
        change, moments = optimiser.update(jax.grad(loss)(adapter), moments, adapter)
        return optax.apply_updates(adapter, change), moments

    moments = optimiser.init(adapter)
    for tokens, mask in zip(TOKENS, MASK, strict=True):
        adapter, moments = step(adapter, moments, tokens, mask)
    nnx.update(expected, adapter)

    model = attach(tiny_llama(packed=True), CONFIG)
    before, packed = leaves(model), dict(packed_weights(model))
    ours(model).train(batches())
    assert_only_the_adapter_moved(model, before)
    theirs = export_adapter(expected).layers
    for name, layer in export_adapter(model).layers.items():
        for (tensor, array), (_, other) in zip(layer.tensors(), theirs[name].tensors(), strict=True):
            np.testing.assert_allclose(
                array, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=f"{name} {tensor}"
            )
    for name, weight in packed_weights(model):
        for part, array in weight.parts().items():
            assert packed[name].parts()[part].tobytes() == array.tobytes(), (name, part)


def test_the_trainer_resumes_from_its_own_checkpoint(tmp_path):
    whole = attach(tiny_llama(packed=True), CONFIG)
    ours(whole).train(batches())
    first = attach(tiny_llama(packed=True), CONFIG)
    begun = ours(first, max_steps=5, checkpoint_root_directory=str(tmp_path / "run"))
    begun.train(batches())
    begun.close()
    second = attach(tiny_llama(packed=True), CONFIG, seed=7)  # another start, which the checkpoint replaces
    resumed = ours(second, checkpoint_root_directory=str(tmp_path / "run"))
    assert resumed.train_steps == 5
    resumed.train(batches())
    expected = leaves(whole)
    for path, array in leaves(second).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=str(path))


def test_accumulated_gradients_are_the_adapters_alone():
    model = attach(tiny_llama(), CONFIG)
    before = leaves(model)
    ours(model, gradient_accumulation_steps=3, max_steps=STEPS // 3).train(batches())
    assert_only_the_adapter_moved(model, before)


def train_theirs(model: nnx.Module, rate: float) -> None:
    """30 steps on one batch with tunix's own loss: the adapter alone moves, the loss falls, merged it stays."""
    before = leaves(model)
    batch = batches()[0]
    inputs = as_their_input(batch)
    loss = nnx.jit(lambda model: peft_trainer._default_loss_fn(model, **inputs))
    first = float(loss(model))
    trainer(model, optax.adam(rate), max_steps=30).with_gen_model_input_fn(as_their_input).train([batch] * 30)
    last = float(loss(model))
    assert last < 0.95 * first, (first, last)  # measured 0.76 and 0.93
    assert_only_the_adapter_moved(model, before)
    logits = nnx.jit(
        lambda model: model(inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"])[0]
    )
    adapted = np.asarray(logits(model))
    np.testing.assert_allclose(np.asarray(logits(merge(model))), adapted, rtol=0, atol=1e-5 * np.ptp(adapted))


def test_tunix_own_toy_of_flax_modules():
    common = pytest.importorskip("tunix.tests.test_common")
    model = common.ToyTransformer(common.ModelConfig(num_layers=2), rngs=nnx.Rngs(0))
    targets = ("query", "value", "out", "w1", "w2")
    train_theirs(attach(model, dataclasses.replace(CONFIG, target_modules=targets)), rate=2e-2)


def test_tunix_own_llama_once_its_einsum_is_made_known():
    llama = pytest.importorskip("tunix.models.llama3.model")
    register_einsum(llama.Einsum, kernel="w", equation="einsum_str")
    sizes = {"num_layers": 2, "vocab_size": 40, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "head_dim": 8}
    config = llama.ModelConfig(**sizes, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5)
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    for layer in model.layers:  # theirs start at zero
        for name in ("gate_proj", "up_proj", "down_proj"):
            kernel = getattr(layer.mlp, name).kernel
            kernel.set_value(0.1 * jax.random.normal(jax.random.key(0), kernel.get_value().shape))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    attach(model, MokaConfig(r=5, num_shapes=2, dropout=0.0, target_modules=targets))
    assert len(export_adapter(model).layers) == 2 * len(targets)
    train_theirs(model, rate=5e-2)
