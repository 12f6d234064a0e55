"""A real model on 4-bit weights: what training moves, what a folder keeps, and what merging costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from conversion import open_base
from moka_core.nf4 import BLOCK, NF4_LEVELS
from moka_torch import MokaConfig, attach, exact_on_cpu, merge, model_fingerprint
from moka_torch.base_weight import _decode
from moka_torch.loading import adapted_layers
from tests.moka_torch.conftest import NF4

# Half of the widest gap between two levels of NF4: how far from a level an entry of a block of scale 1 can be.
HALF_GAP = max(b - a for a, b in itertools.pairwise(NF4_LEVELS)) / 2


@pytest.fixture(scope="module")
def load(smollm):
    def load():
        model = LlamaForCausalLM.from_pretrained(smollm, dtype=torch.float32, quantization_config=NF4)
        assert exact_on_cpu(model) == 210
        return model

    return load


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 49152, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens).logits


@pytest.fixture(scope="module")
def trained(load, tokens):
    """A model after three steps, and its parameters before."""
    config = MokaConfig(target_modules=["q_proj", "v_proj"], dropout=0.0, task_type="CAUSAL_LM")
    model = attach(load(), config, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for _ in range(3):
        optimiser.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    return model.eval(), before


def test_the_fingerprint_of_the_trained_model_is_the_folders(trained, smollm):
    folder = open_base(smollm).fingerprint
    assert model_fingerprint(trained[0]) == folder
    assert [len(kind.partition(":")[2]) for kind in folder.partition(".")[2].split("/")] == [90] * 7


def test_training_moves_every_number_of_the_adapter_and_nothing_else(trained):
    model, before = trained
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert len(trainable) == 2 * 30 * 11
    assert all("moka_" in name for name in trainable)


def test_a_folder_keeps_the_logits_bit_for_bit_and_without_the_adapter_they_are_the_bases(
    trained, load, tokens, tmp_path
):
    model, _ = trained
    adapted = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path), tokens), adapted)
    base = logits(load(), tokens)
    assert not torch.equal(base, adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)


def test_merged_into_a_decoded_base_the_logits_are_the_same(trained, load, tokens, tmp_path):
    model, _ = trained
    adapted = logits(model, tokens)
    extent = adapted.max() - adapted.min()
    model.save_pretrained(tmp_path)
    dense = merge(PeftModel.from_pretrained(load(), tmp_path), dtype=torch.float32)
    assert type(dense) is LlamaForCausalLM
    assert all(parameter.dtype == torch.float32 for parameter in dense.parameters())
    # measured: see docs/peft.md
    assert (logits(dense, tokens) - adapted).abs().max() <= 1e-4 * extent
    dense.save_pretrained(tmp_path / "dense")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, tokens), logits(dense, tokens))
    half = merge(PeftModel.from_pretrained(load(), tmp_path), dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    assert half.config.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_merged_into_the_4_bit_base_every_weight_is_within_the_bound_of_its_blocks_scale(
    trained, load, tokens, tmp_path, scale
):
    model, _ = trained
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path)
    again.set_scale("default", scale)
    adapted = logits(again, tokens)
    wanted = {
        path: layer.get_base_weight().float() + layer.get_delta_weight("default")
        for path, layer in adapted_layers(again, "default").items()
    }
    with pytest.warns(UserWarning, match="encodes it again"):
        merged = merge(again)
    exact_on_cpu(merged)
    worst = 0.0
    for path, weight in wanted.items():
        held = merged.get_submodule(path).weight
        found = _decode(held.quant_state, held.data, torch.float32)
        blocks, off = weight.reshape(-1, BLOCK), (found - weight).reshape(-1, BLOCK).abs()
        scales = blocks.abs().amax(1, keepdim=True)
        used = found.reshape(-1, BLOCK).abs().amax(1, keepdim=True)  # the largest entry of a block is coded as ±1
        bound = HALF_GAP * scales + (used - scales).abs()
        assert (off <= bound * (1 + 1e-5)).all(), path
        worst = max(worst, float((off / bound).max()))
        x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(1))
        moved = (x @ (found - weight).T).abs()
        assert (moved <= x.abs() @ bound.expand(-1, BLOCK).reshape(weight.shape).T * (1 + 1e-4)).all(), path
    # measured: 0.36 and 0.98. The update of three steps is small against the gaps between the levels that W stands on,
    # so that rounding leaves W where it was: the merged model is the base, within 0.0018 of the logits' range (RMS)
    assert worst > (0.3 if scale == 1 else 0.9)
    after = logits(merged, tokens)
    if scale == 1:
        base = logits(load(), tokens)
        assert rms(after - base) < 0.1 * rms(adapted - base)
    else:
        assert rms(after - adapted) < rms(adapted)


def rms(tensor) -> float:
    return float(tensor.square().mean().sqrt())
