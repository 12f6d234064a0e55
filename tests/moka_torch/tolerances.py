"""What counts as the same, for every test of this folder: relative errors ‖a - b‖ / ‖b‖."""

from __future__ import annotations

import numpy as np

# float32 against the float64 oracle. Measured over 20 seeds x all cases x every schedule, with dropout, without, and
# into a base weight: y 2.5e-7, x 2.5e-7, factors 1.1e-7, logits 5.0e-8.
FLOAT32 = 1e-6
# The same code in float64. Measured in the same way over 5 seeds: y and x 5.9e-16, factors 2.1e-15, logits 9.4e-15.
FLOAT64 = 1e-12
# float32 where the gradients of the factors are summed in float32 too, on a layer of 192x96. Measured over 20 seeds x
# every schedule: y 2.0e-7, x 2.7e-7, factors 6.5e-7, logits 1.1e-6, a sum over the whole layer that nearly cancels.
FLOAT32_LARGE = {"y": 1e-6, "x": 1e-6, "factor_a": 2e-6, "factor_b": 2e-6, "gate_logits": 5e-6}
# Products in bfloat16, of which one rounding is off by 2^-9 = 2.0e-3 at most. Measured over 20 seeds under autocast:
# y 5.8e-3, x 5.7e-3, factor_a 2.9e-3, factor_b 3.6e-3, logits 7.5e-3. A dx that is rounded once: 1.7e-3.
BFLOAT16 = {"y": 1.2e-2, "x": 1.2e-2, "factor_a": 8e-3, "factor_b": 8e-3, "gate_logits": 2e-2}
BFLOAT16_ONCE = 2.0e-3


def relative(found, expected) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; an expectation of zeros is an error of the test."""
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    assert found.shape == expected.shape
    size = np.linalg.norm(expected)
    assert size > 0, "nothing is relative to zero"
    return float(np.linalg.norm(found - expected) / size)
