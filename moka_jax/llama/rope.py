"""Rotary position embedding: the frequencies of a checkpoint's config, and their use on queries and keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from moka_jax.llama.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """The angle per position of every pair of channels, (head_dim / 2,), float32, as transformers computes them.

    θ_k = theta^(-2k / head_dim) is the default, and the others change it so:

    - "linear": θ_k / factor;
    - "llama3": θ_k / factor where the wavelength is longer than original/low, θ_k where it is shorter than
      original/high, and a blend between;
    - "yarn": θ_k / factor for channels that turn less than beta_slow times in the original context, θ_k for those that
      turn more than beta_fast times, and a linear ramp over the channels between;
    - "longrope": θ_k / short_factor_k, or θ_k / long_factor_k if `long`;
    - "proportional": θ_k / factor for the first part of the pairs, 0 for the others;
    - "dynamic": θ_k, in texts no longer than the original context; see `frequencies_at` for longer ones.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float32(rope.theta), exponents)
    if rope.kind == "longrope":
        factors = np.asarray(rope.long_factor if long else rope.short_factor, np.float32)
        return np.float32(1) / (factors * powers)
    frequencies = (np.float32(1) / powers).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "proportional":
        turned = np.arange(head_dim // 2) < int(rope.partial * head_dim // 2)
        return np.where(turned, frequencies, np.float32(0)) / np.float32(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = (rope.original_max_position / f for f in (rope.low_freq_factor, rope.high_freq_factor))
        scaled = np.where(wavelengths > low, frequencies / rope.factor, frequencies)
        smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        return np.where((wavelengths <= low) & (wavelengths >= high), blended, scaled).astype(np.float32)
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope, head_dim)
        return np.float32(1) / (np.float32(rope.factor) * powers) * (1 - kept) + frequencies * kept
    return frequencies


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """0 for pairs that keep their frequency, 1 for those that are slowed down by the whole factor."""

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context, if not scaled."""
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    return np.clip(ramp, 0, 1)


def frequencies_at(rope: RopeConfig, head_dim: int, lengths: jax.Array) -> jax.Array:
    """The frequencies in texts of a length, (…, head_dim / 2), float32.

    Only "dynamic" and "longrope" depend on the length n. Where n exceeds the original context, "longrope" has its long
    factors, and "dynamic" the base theta · g^(d / (d - 2)), with g = 1 + factor · (n / original - 1) and d = head_dim.

    Args:
        lengths: (…), int.
    """
    usual = jnp.asarray(rope_frequencies(rope, head_dim))
    lengths = lengths[..., None]
    if rope.kind == "longrope":
        long = jnp.asarray(rope_frequencies(rope, head_dim, long=True))
        return jnp.where(lengths > rope.original_max_position, long, usual)
    if rope.kind == "dynamic":
        beyond = jnp.maximum(lengths, rope.original_max_position).astype(jnp.float32)
        growth = 1 + rope.factor * (beyond / rope.original_max_position - 1)
        # g alone is raised to a power on the device, where powers of theta would lose digits
        return usual * growth ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2))
    return usual


def turns(
    rope: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `rotate`, each (batch or 1, time, 1, head_dim).

    Args:
        positions: (batch or 1, time), int.
        lengths: () or (batch,), int: how long the texts are, of which these are positions.
        dtype: of the result; angles, cosines and sines are computed in float32.
    """
    frequencies = frequencies_at(rope, head_dim, lengths)
    if frequencies.ndim == 2:
        frequencies = frequencies[:, None]
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    cosines, sines = jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    return cosines.astype(dtype), sines.astype(dtype)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotary embedding of x (batch, time, heads, head_dim), the two halves of the channels being the pairs."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cosines + turned * sines
