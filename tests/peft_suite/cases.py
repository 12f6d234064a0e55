"""The MokaConfigs that PEFT's tests are run with, in the shape of PEFT's own lists of cases."""

from __future__ import annotations

from typing import Any

from moka_torch import MokaConfig

# Shapes of terms that are all unlike: copies, a_out, a_in, b_out, b_in.
_LIN0 = {"20x10": [[2, 4, 5, 5, 2], [1, 2, 10, 10, 1], [3, 20, 1, 1, 10]]}
_LIN1 = {"2x20": [[1, 1, 4, 2, 5], [2, 2, 10, 1, 2]]}
_TWO = {"r": 2, "num_shapes": 2}

# By name: what one adapter is, apart from where it goes.
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"r": 5, "num_shapes": 2},
    "uniform": {"r": 4, "num_shapes": 3, "gate": "uniform", "dropout": 0.0},
    "stable": {"r": 4, "num_shapes": 2, "scaling": "stable", "scale": 2.0},
    # ungated: copies of one block that start at zero stay equal, so that their gate has no gradient
    "A is the identity": {"r": 3, "identity": "a", "block_entries": 8, "gate": "uniform"},
    "B is the identity": {"r": 3, "identity": "b", "zero_factor": "a", "block_entries": 8, "gate": "uniform"},
    "A starts at zero": {**_TWO, "zero_factor": "a"},
    "factored": {**_TWO, "execution": "factored"},
}

# PEFT's TEST_CASES: name, model, config class, its arguments.
CUSTOM = [
    *(
        (f"MoKA {name}, {'+'.join(targets)}", "MLP", MokaConfig, {**kind, "target_modules": list(targets)})
        for name, kind in KINDS.items()
        for targets in (("lin0",), ("lin0", "lin1"))
    ),
    ("MoKA regular expression", "MLP", MokaConfig, {**_TWO, "target_modules": "lin0"}),
    ("MoKA unlike shapes", "MLP", MokaConfig, {"r": 6, "shapes": _LIN0, "target_modules": ["lin0"]}),
    ("MoKA unlike shapes 2", "MLP", MokaConfig, {"r": 3, "shapes": _LIN1, "target_modules": ["lin1"]}),
    (
        "MoKA patterns",
        "MLP",
        MokaConfig,
        {**_TWO, "target_modules": ["lin0", "lin1"], "r_pattern": {"lin0": 4}, "scale_pattern": {"lin1": 3.0}},
    ),
    (
        "MoKA modules_to_save",
        "MLP",
        MokaConfig,
        {**_TWO, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    (
        "MoKA modules_to_save, targeted too",
        "MLP",
        MokaConfig,
        {**_TWO, "target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]},
    ),
    (
        "MoKA exclude_modules",
        "MLP",
        MokaConfig,
        {**_TWO, "target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]},
    ),
    ("MoKA Conv1D of transformers", "EmbConv1D", MokaConfig, {**_TWO, "target_modules": ["conv1d"]}),
    ("MoKA Conv1D, linear", "EmbConv1D", MokaConfig, {**_TWO, "target_modules": ["conv1d", "lin0"]}),
]

# PEFT's MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: name, method, config class, arguments of the first, of the second.
_FIRST = {**_TWO, "dropout": 0.0, "init_weights": False, "scale": 2.0}
_SECOND = {"r": 6, "num_shapes": 3, "gate": "uniform", "dropout": 0.0, "init_weights": False, "scale": 2.0}
_BLOCKS = {**_FIRST, "identity": "a", "block_entries": 8}
SEVERAL_ACTIVE = [
    (
        f"MoKA {name}",
        "moka",
        MokaConfig,
        {**first, "target_modules": ["lin0"]},
        {**second, "target_modules": [target]},
    )
    for name, first, second, target in (
        ("Same", _FIRST, _FIRST, "lin0"),
        ("Different", _FIRST, _FIRST, "lin1"),
        ("Same, unlike", _FIRST, _SECOND, "lin0"),
        ("Different, blocks", _BLOCKS, _SECOND, "lin1"),
    )
]

# PEFT's MIXED_ADAPTER_TEST_CASES, and its lists beside the tests: name, config, config. PEFT compares a mixed batch
# with one adapter's within 1e-5 of outputs near zero; W + ΔW as one product, which a mixed batch cannot use, rounds
# otherwise.
_APART = {"execution": "factored"}
MIXED_BATCHES = [
    (
        "MoKA mixed adapter",
        MokaConfig(**_FIRST, **_APART, target_modules=["lin0"]),
        MokaConfig(**_SECOND, **_APART, target_modules=["lin0"]),
    ),
    (
        "MoKA mixed adapter, blocks",
        MokaConfig(**_BLOCKS, **_APART, target_modules=["lin0"]),
        MokaConfig(**_FIRST, **_APART, target_modules=["lin0"]),
    ),
]


def like(config: Any, **changes: Any) -> MokaConfig:
    """A MokaConfig on the layers of another method's config."""
    return MokaConfig(
        **{**_FIRST, **_APART, **changes},
        target_modules=sorted(config.target_modules),
        modules_to_save=config.modules_to_save,
    )


# PEFT's ALL_CONFIGS for decoders, and TEST_CASES of test_quantization.
DECODERS = [
    (MokaConfig, {"task_type": "CAUSAL_LM", "target_modules": None, **kind})
    for kind in (
        KINDS["softmax"],
        {**KINDS["uniform"], "scaling": "stable"},
        {"r": 3, "identity": "a", "block_entries": 64},
    )
]
QUANTISED = [
    (MokaConfig, {"target_modules": ["q_proj", "v_proj"], **kind})
    for kind in (
        KINDS["softmax"],
        KINDS["stable"],
        {"r": 3, "identity": "a", "block_entries": 64},
        {"r": 3, "identity": "b", "zero_factor": "a", "block_entries": 64},
    )
]
