"""The script that adapts a model of Flax's own layers: it learns, and its folder serves the same base, and no other."""

from __future__ import annotations

import flax_own_model
import pytest
from flax import nnx

from conversion import load_adapter
from moka_core import AdapterError, TargetError
from moka_jax import import_adapter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flax") / "new"
    return folder, flax_own_model.main(folder, base_steps=4, steps=60, width=16)


def test_the_adapter_learns_and_is_the_same_on_a_copy_and_merged(run):
    _, losses = run
    assert losses.after < losses.before - 0.1
    assert losses.merged == pytest.approx(losses.after, abs=1e-5)


def test_the_folder_names_every_target_and_refuses_another_base(run):
    folder, _ = run
    adapter = load_adapter(folder / "adapter")
    ends = {path.rsplit(".", 1)[-1] for path in adapter.layers}
    assert (ends, len(adapter.layers)) == (set(flax_own_model.TARGETS), 5 * 4)
    other = flax_own_model.Gpt(width=16, rngs=nnx.Rngs(1))
    other.base_fingerprint = flax_own_model.fingerprint(other)
    with pytest.raises(AdapterError, match="another base model"):
        import_adapter(other, adapter)
    with pytest.raises((AdapterError, TargetError), match="blocks"):
        import_adapter(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), adapter, allow_other_base=True)
