"""An adapter crosses between the backends, through a folder, without losing a bit; whichever wrote it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel

import moka_torch
from conversion import load_adapter, open_base, save_adapter
from moka_core import Adapter, AdapterError, MokaConfig, TargetError
from moka_jax import attach, export_adapter, import_adapter
from moka_jax.llama import load_llama
from moka_torch.probe import load_base
from tests.tiny import random_adapter, save_tiny_llama

CONFIGS = {
    "softmax": MokaConfig(r=5, num_shapes=3, target_modules=("q_proj", "v_proj", "down_proj")),
    "moka_s": MokaConfig(r=3, num_shapes=1, identity="a", block_entries=64, gate="uniform", scaling="stable"),
    "lora terms": MokaConfig(r=4, num_shapes=2, lora_terms=1, scaling="stable", target_modules=("q_proj", "up_proj")),
    "zero a": MokaConfig(r=3, num_shapes=2, zero_factor="a", scale=-0.5),
    "patterns": MokaConfig(r=3, num_shapes=2, r_pattern={"v_proj": 5}, scale_pattern={"q_proj": 0.5}),
    "identity b": MokaConfig(r=1, num_shapes=1, identity="b", zero_factor="a", block_entries=64, gate="uniform"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("round") / "base")


def assert_same_bits(first: Adapter, second: Adapter) -> None:
    assert first.layers.keys() == second.layers.keys()
    assert first.base_fingerprint == second.base_fingerprint
    for path, layer in first.layers.items():
        assert layer.plan == second.layers[path].plan
        ours, theirs = dict(layer.tensors()), dict(second.layers[path].tensors())
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            assert array.any()
            np.testing.assert_array_equal(array.view(np.uint32), theirs[name].view(np.uint32), err_msg=f"{path}.{name}")


@pytest.mark.parametrize("name", CONFIGS)
def test_jax_to_pytorch_to_jax_is_bit_equal(base, tmp_path, name):
    model = import_adapter(load_llama(open_base(base)), random_adapter(open_base(base), CONFIGS[name]))
    started = export_adapter(model)
    save_adapter(started, tmp_path / "from-jax")
    in_torch = PeftModel.from_pretrained(load_base(base), str(tmp_path / "from-jax"))
    in_torch.save_pretrained(tmp_path / "from-torch")
    back = import_adapter(load_llama(open_base(base)), load_adapter(tmp_path / "from-torch"))
    assert_same_bits(started, export_adapter(back))


def test_layers_of_one_stack_cannot_have_shapes_or_scales_of_their_own_in_jax(base, tmp_path):
    one = "model.layers.1.self_attn.q_proj"
    for pattern in ({"r_pattern": {one: 2}}, {"scale_pattern": {one: 2.0}}):
        config = MokaConfig(r=3, num_shapes=2, target_modules=("q_proj",), **pattern)
        save_adapter(random_adapter(open_base(base), config), tmp_path / next(iter(pattern)))
        adapter = load_adapter(tmp_path / next(iter(pattern)))
        model = load_llama(open_base(base))
        with pytest.raises(AdapterError, match="have other shapes or another scale; here they are layers of the stack"):
            import_adapter(model, adapter)
        with pytest.raises(TargetError, match="layers of the stack"):
            attach(model, config)
        in_torch = moka_torch.import_adapter(load_base(base), adapter)
        assert_same_bits(adapter, moka_torch.export_adapter(in_torch))


def test_a_regular_expression_that_peft_reads_otherwise_still_loads_in_peft(base, tmp_path):
    """`layers` decides what is adapted, not target_modules: JAX knows linear layers only, PEFT every module."""
    config = MokaConfig(r=2, num_shapes=1, target_modules=r".*layers\..*")
    model = import_adapter(load_llama(open_base(base)), random_adapter(open_base(base), config))
    save_adapter(export_adapter(model), tmp_path / "adapter")
    in_torch = PeftModel.from_pretrained(load_base(base), str(tmp_path / "adapter"))
    assert_same_bits(export_adapter(model), moka_torch.export_adapter(in_torch))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_trained_and_saved_computes_the_same_in_jax(base, tmp_path, name):
    torch.manual_seed(0)
    model = moka_torch.attach(load_base(base), CONFIGS[name], seed=1)
    tokens = torch.randint(0, 256, (2, 24))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits.numpy()
        with model.disable_adapter():
            without = model(input_ids=tokens).logits.numpy()
    model.save_pretrained(tmp_path / "adapter")

    adapter = load_adapter(tmp_path / "adapter")
    assert_same_bits(adapter, moka_torch.export_adapter(model))
    ours = import_adapter(load_llama(open_base(base)), adapter)
    span = wanted.max() - wanted.min()
    assert np.abs(wanted - without).max() / span > 1e-2, "the adapter must matter for this to count"
    # measured: 3e-7 to 6e-7 of the range
    assert np.abs(np.asarray(ours(tokens.numpy())) - wanted).max() / span < 1e-5
