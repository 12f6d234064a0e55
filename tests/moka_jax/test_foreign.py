"""Adapters on models that are not ours: Flax's own modules, layers over several axes, layers stacked for nnx.scan."""

from __future__ import annotations

import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moka_core import ConfigError, MokaConfig, TargetError
from moka_core.oracle import dense_delta
from moka_jax import MokaLinear, MokaParam, attach, export_adapter, import_adapter, merge, register_einsum
from moka_jax.linear import with_dropout_key
from moka_jax.sites import linear_sites
from tests.moka_jax.toys import leaves, random_adapter, randomise, run

ALL = MokaConfig(r=5, num_shapes=2, dropout=0.0, target_modules="all-linear")
LAYERS = 2
X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
LINEAR = ["attention.key", "attention.out", "attention.query", "attention.value", "down", "up"]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Looped(nnx.Module):
    """Blocks in a list, applied by a loop."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(8, 8, rngs=rngs)
        self.decoder = nnx.Dict(blocks=nnx.List([Block(rngs) for _ in range(LAYERS)]), norm=nnx.LayerNorm(8, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.decoder.blocks:
            x = block(x)
        return self.decoder.norm(x)


class Scanned(nnx.Module):
    """The same blocks stacked by nnx.vmap and applied by nnx.scan."""

    def __init__(self, rngs: nnx.Rngs, out_axes: int = 0) -> None:
        self.embed = nnx.Linear(8, 8, rngs=rngs)
        make = nnx.vmap(Block, in_axes=(0,), out_axes=nnx.StateAxes({nnx.Param: out_axes, ...: 0}))
        self.decoder = nnx.Dict(blocks=nnx.split_rngs(splits=LAYERS)(make)(rngs), norm=nnx.LayerNorm(8, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.decoder.norm(step(self.embed(x), self.decoder.blocks))


def both() -> tuple[Looped, Scanned]:
    """The two with the same weights."""
    looped, scanned = Looped(nnx.Rngs(0)), Scanned(nnx.Rngs(1))
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *(nnx.state(b, nnx.Param) for b in looped.decoder.blocks))
    nnx.update(scanned.decoder.blocks, stacked)
    nnx.update(scanned.embed, nnx.state(looped.embed))
    nnx.update(scanned.decoder.norm, nnx.state(looped.decoder.norm))
    return looped, scanned


def error(model: nnx.Module) -> jax.Array:
    """The mean squared distance of the outputs from others."""
    return ((model(jnp.asarray(X)) - X[:, ::-1]) ** 2).mean()


def gradients(model: nnx.Module) -> dict[str, np.ndarray]:
    """The gradient of the error by every entry of the adapter, by layer and tensor."""
    gradient = nnx.jit(nnx.grad(error, argnums=nnx.DiffState(0, MokaParam)))(model)
    holder = nnx.clone(model)
    nnx.update(holder, gradient)
    layers = export_adapter(holder).layers
    return {f"{name}.{key}": array for name, layer in layers.items() for key, array in layer.tensors()}


# --- layers in a loop and layers stacked for a scan


def test_the_layers_of_a_scan_have_the_names_of_those_of_a_loop():
    names = ["embed", *(f"decoder.blocks.{index}.{name}" for index in range(LAYERS) for name in LINEAR)]
    for model in both():
        sites = {name: site for site in linear_sites(model) for name in site.names}
        assert sorted(sites) == sorted(names)
        assert sites["decoder.blocks.1.up"].dims == (12, 8)


def test_one_adapter_gives_the_same_outputs_gradients_and_merged_models_on_both():
    looped, scanned = both()
    base, adapter = run(looped, X), random_adapter(looped, ALL)
    looped, scanned = (import_adapter(model, adapter) for model in (looped, scanned))
    expected, found = run(looped, X), run(scanned, X)
    assert np.abs(expected - base).max() > 0.1 * np.ptp(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.ptp(expected))  # measured 3e-7
    theirs, ours = gradients(looped), gradients(scanned)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
    for model in (looped, scanned):
        assert not jax.tree.leaves(nnx.state(merge(model), MokaParam))
        np.testing.assert_allclose(run(model, X), expected, rtol=0, atol=5e-6 * np.ptp(expected))


def test_attach_draws_every_layer_of_a_scan_for_itself_and_starts_at_the_base():
    _, scanned = both()
    base = run(scanned, X)
    np.testing.assert_allclose(run(attach(scanned, ALL), X), base, rtol=0, atol=1e-6 * np.ptp(base))
    factors = [layer.factor_a[0] for name, layer in export_adapter(scanned).layers.items() if name.endswith(".up")]
    assert len(factors) == LAYERS
    assert np.isclose(factors[0], factors[1]).mean() < 0.1


@pytest.mark.parametrize("make", [Looped, Scanned])
def test_a_trainer_that_selects_lora_parameters_trains_the_adapter_alone(make):
    model = attach(make(nnx.Rngs(0)), ALL)
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, MokaParam))}
    before = leaves(model)
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimiser):
        value, gradient = nnx.value_and_grad(error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimiser.update(model, gradient)
        return value

    losses = [float(step(model, optimiser)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    after = leaves(model)
    assert trained < before.keys()
    for path, array in before.items():
        assert np.array_equal(after[path], array) == (path not in trained), path


def test_dropout_acts_in_the_layers_of_a_scan():
    _, scanned = both()
    randomise(attach(scanned, dataclasses.replace(ALL, dropout=0.5)))
    graphdef, state = nnx.split(scanned)
    outputs = [np.asarray(with_dropout_key(nnx.merge(graphdef, state), jax.random.key(k))(X)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.1
    assert np.abs(outputs[0] - run(scanned, X)).max() > 0.1


# --- layers over several axes, against a dense product in float64

GENERAL = {
    "heads": (lambda rngs: nnx.LinearGeneral(8, (3, 4), rngs=rngs), "abi,iop->abop", (2, 5, 8)),
    "last two": (lambda rngs: nnx.LinearGeneral((3, 4), 6, axis=(-2, -1), rngs=rngs), "aij,ijo->ao", (5, 3, 4)),
    "apart": (lambda rngs: nnx.LinearGeneral((3, 4), (2, 5), axis=(1, -1), rngs=rngs), "aibj,ijop->abop", (2, 3, 6, 4)),
    "first": (lambda rngs: nnx.LinearGeneral(3, 7, axis=0, use_bias=False, rngs=rngs), "ia,io->ao", (3, 6)),
    "swapped": (lambda rngs: nnx.LinearGeneral((3, 4), 6, axis=(-1, -2), rngs=rngs), "aij,ijo->ao", (5, 3, 4)),
    "einsum": (lambda rngs: nnx.Einsum("btd,dnh->btnh", (8, 2, 6), (2, 6), rngs=rngs), "btd,dnh->btnh", (2, 5, 8)),
    "turned": (lambda rngs: nnx.Einsum("btd,ndh->nbth", (2, 8, 6), rngs=rngs), "btd,ndh->nbth", (2, 5, 8)),
    "dots": (lambda rngs: nnx.Einsum("...nh,nhd->...d", (2, 6, 8), (8,), rngs=rngs), "btnh,nhd->btd", (3, 4, 2, 6)),
}


class Holder(nnx.Module):
    def __init__(self, layer: nnx.Module) -> None:
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


@pytest.mark.parametrize("which", GENERAL)
def test_a_layer_over_several_axes_is_adapted_as_one_matrix(which):
    make, equation, shape = GENERAL[which]
    x = np.random.default_rng(1).standard_normal(shape)
    model = Holder(make(nnx.Rngs(0)))
    base = run(model, np.float32(x))
    adapter = random_adapter(model, ALL)
    delta = dense_delta(adapter.layers["layer"], ALL)
    letters = equation.split(",")[1].split("->")
    rows = "".join(axis for axis in letters[0] if axis in letters[1])
    columns = "".join(axis for axis in letters[0] if axis not in letters[1])
    sizes = dict(zip(letters[0], model.layer.kernel.shape, strict=True))
    wide = delta.reshape(*(sizes[axis] for axis in rows + columns))
    kernel = np.einsum(f"{rows}{columns}->{letters[0]}", wide)
    expected = base + np.einsum(equation, x, kernel)
    import_adapter(model, adapter)
    found = run(model, np.float32(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.ptp(expected))
    assert np.abs(found - base).max() > 0.1 * np.ptp(base)
    before = type(model.layer.base)
    np.testing.assert_allclose(run(merge(model), np.float32(x)), expected, rtol=0, atol=2e-6 * np.ptp(expected))
    assert type(model.layer) is before


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.LinearGeneral(8, 4, batch_axis={0: 2}, rngs=rngs),  # a matrix for each entry of the batch
        lambda rngs: nnx.Einsum("bd,bdh->bh", (2, 8, 6), rngs=rngs),
        lambda rngs: nnx.Einsum("btd,dh->bh", (8, 6), rngs=rngs),  # t is summed
        lambda rngs: nnx.Einsum("bd,dhk->bh", (8, 6, 2), rngs=rngs),  # k is summed
        lambda rngs: nnx.Einsum(
            "bd,h->bdh", (6,), kernel_init=nnx.initializers.ones, rngs=rngs
        ),  # nothing is contracted
    ],
)
def test_a_layer_that_is_not_one_matrix_is_no_linear_layer(make):
    assert linear_sites(Holder(make(nnx.Rngs(0)))) == []


class Projection(nnx.Module):
    """Another library's layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.formula = "bd,dnh->bnh"
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 2, 3)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.formula, x, self.w[...])


class Doubled(Projection):
    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * super().__call__(x)


def test_a_class_of_another_library_is_a_target_once_it_is_made_known(monkeypatch):
    monkeypatch.setattr("moka_jax.general._EINSUMS", {})
    assert linear_sites(Holder(Projection(nnx.Rngs(0)))) == []
    register_einsum(Projection, kernel="w", equation="formula")
    assert linear_sites(Holder(Doubled(nnx.Rngs(0)))) == []  # it computes something else
    model = Holder(Projection(nnx.Rngs(0)))
    base, adapter = run(model, X[0]), random_adapter(model, ALL)
    import_adapter(model, adapter)
    expected = base + (X[0] @ dense_delta(adapter.layers["layer"], ALL).T).reshape(-1, 2, 3)
    np.testing.assert_allclose(run(model, X[0]), expected, rtol=0, atol=2e-6 * np.ptp(expected))


def test_a_model_can_read_the_settings_of_an_adapted_layer_but_not_its_weight_alone():
    layer = attach(Holder(nnx.LinearGeneral(8, (3, 4), rngs=nnx.Rngs(0))), ALL).layer
    assert (layer.in_features, layer.out_features, layer.use_bias) == ((8,), (3, 4), True)
    with pytest.raises(AttributeError, match=r"'kernel' of an adapted layer is the base's alone, without ΔW"):
        _ = layer.kernel
    with pytest.raises(AttributeError, match="kernels"):
        _ = layer.kernels


# --- refusals


def test_the_merged_execution_and_an_output_sharding_are_refused():
    with pytest.raises(ConfigError, match=r"layer: execution: 'merged' .* \(over several axes\)"):
        attach(Holder(nnx.LinearGeneral(8, (3, 4), rngs=nnx.Rngs(0))), ALL, execution="merged")
    for layer in (nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.LinearGeneral(8, (3, 4), rngs=nnx.Rngs(0))):
        model = attach(Holder(layer), ALL)
        assert isinstance(model.layer, MokaLinear)
        with pytest.raises(ConfigError, match="out_sharding: expected None, got"):
            model.layer(X, out_sharding=jax.sharding.PartitionSpec("data"))


def test_layers_stacked_over_another_axis_are_refused_where_they_are_targets():
    with pytest.raises(
        TargetError, match=r"up cannot be adapted: its weight has the shape \(8, 2, 12\), expected \(8, 12\)"
    ):
        attach(Scanned(nnx.Rngs(0), out_axes=1), dataclasses.replace(ALL, target_modules=("up",)))
    attach(Scanned(nnx.Rngs(0), out_axes=1), dataclasses.replace(ALL, target_modules=("embed",)))
    nested = nnx.vmap(lambda key: nnx.vmap(lambda key: nnx.Linear(4, 6, rngs=nnx.Rngs(key)))(jax.random.split(key, 2)))
    with pytest.raises(TargetError, match=r"its weight has the shape \(3, 2, 4, 6\)"):
        attach(Holder(nested(jax.random.split(jax.random.key(0), 3))), ALL)


def test_a_linen_model_is_refused_with_the_reason():
    linen = nnx.bridge.ToNNX(flax.linen.Dense(6), rngs=nnx.Rngs(0))
    linen.lazy_init(jnp.ones((1, 8)))
    with pytest.raises(TargetError, match=r"layer is a Linen module behind nnx\.bridge\.ToNNX.*write it in NNX"):
        attach(Holder(linen), ALL)
    mixed = Holder(linen)
    mixed.head = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TargetError, match=r"layer is a Linen module"):
        attach(mixed, ALL)
    assert list(export_adapter(attach(mixed, dataclasses.replace(ALL, target_modules=("head",)))).layers) == ["head"]
