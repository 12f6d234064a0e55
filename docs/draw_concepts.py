"""Draws docs/concepts.png: what updates of a layer look like. Run: python docs/draw_concepts.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIDE, MOST = 64, 16  # of the layer, and the singular values that are shown
RNG = np.random.default_rng(0)


def term(a_out: int, a_in: int) -> np.ndarray:
    """A random A ⊗ B, A being (a_out, a_in), of Frobenius norm 1."""
    a, b = RNG.standard_normal((a_out, a_in)), RNG.standard_normal((SIDE // a_out, SIDE // a_in))
    return np.kron(a / np.linalg.norm(a), b / np.linalg.norm(b))


UPDATES = {  # title: (ΔW, numbers that are learned)
    "one term\n8×8 ⊗ 8×8": (term(8, 8), 128),
    "five shapes, added\n8×8, 4×16, 16×4, 2×32, 32×2": (
        sum(term(*shape) for shape in ((8, 8), (4, 16), (16, 4), (2, 32), (32, 2))) / 5,
        5 * 128,
    ),
    "MoKA_s: I ⊗ B\none block, repeated": (np.kron(np.eye(8), RNG.standard_normal((8, 8))) / SIDE, 64),
    "a LoRA of rank 1\n1×64 ⊗ 64×1": (term(1, SIDE), 128),
}


def main() -> None:
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    pictures, curves = figure.subplots(2, len(UPDATES), gridspec_kw={"height_ratios": [2.6, 1]})
    for above, below, (title, (delta, learned)) in zip(pictures, curves, UPDATES.items(), strict=True):
        most = np.abs(delta).max()
        above.imshow(delta, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        above.set_title(f"{title}\n{learned} numbers", fontsize=10)
        above.set_xticks([])
        above.set_yticks([])
        values = np.linalg.svd(delta, compute_uv=False)
        rank = int((values > values[0] * 1e-10).sum())
        below.bar(range(1, SIDE + 1), values / values[0], width=0.8)
        below.set_title(f"rank {rank}", fontsize=9)
        below.set_xlim(0, SIDE + 1)
        below.set_xlabel("singular value, largest first", fontsize=8)
    figure.suptitle(
        f"ΔW of a {SIDE} × {SIDE} layer, its {SIDE * SIDE} entries coloured (red +, blue −), and its singular values"
    )
    figure.savefig(Path(__file__).with_name("concepts.png"), dpi=110)


if __name__ == "__main__":
    main()
