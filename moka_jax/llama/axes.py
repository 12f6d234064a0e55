"""The logical axes of every parameter of our LLaMA, by which it is split over a mesh."""

from __future__ import annotations

from moka_jax.sharding import Axes

# of a weight (out, in)
_LINEAR: dict[str, Axes] = {
    "q_proj": ("heads", "embed"),
    "k_proj": ("kv_heads", "embed"),
    "v_proj": ("kv_heads", "embed"),
    "o_proj": ("embed", "heads"),
    "gate_proj": ("mlp", "embed"),
    "up_proj": ("mlp", "embed"),
    "down_proj": ("embed", "mlp"),
    "lm_head": ("vocab", "embed"),
}


def weight_axes(layer: str) -> Axes:
    """The logical axes of a linear layer's weight (out, in), by the layer's name.

    >>> weight_axes("down_proj")
    ('embed', 'mlp')
    """
    return _LINEAR[layer]


def parameter_axes(path: tuple[str, ...]) -> Axes:
    """The logical axes of a dense parameter by its path in our LLaMA, without that of a stack's layers.

    >>> parameter_axes(("model", "layers", "block", "mlp", "down_proj", "kernel"))
    ('mlp', 'embed')
    """
    name = path[-1]
    if name == "embedding":
        return ("vocab", "embed")
    if name == "kernel":
        return weight_axes(path[-2])[::-1]
    if name == "bias":
        return weight_axes(path[-2])[:1]
    return (None,)  # the weight of a norm
