"""Rotary position embedding: the frequencies of a checkpoint's config, and their use on queries and keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moka_jax.llama.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """The angle per position of every pair of channels, (head_dim / 2,), float32.

    θ_k = theta^(-2k / head_dim); "linear" divides by factor; "llama3" divides wavelengths longer than
    original/low by factor, keeps those shorter than original/high, and blends between.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1) / np.power(np.float32(rope.theta), exponents)).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = (rope.original_max_position / f for f in (rope.low_freq_factor, rope.high_freq_factor))
        scaled = np.where(wavelengths > low, frequencies / rope.factor, frequencies)
        smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        return np.where((wavelengths <= low) & (wavelengths >= high), blended, scaled).astype(np.float32)
    return frequencies


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotary embedding of x (batch, time, heads, head_dim), the two halves of the channels being the pairs."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cosines + turned * sines
