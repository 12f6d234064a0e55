"""Linear layers that a model never calls, so that an adapter around them would do nothing."""

from __future__ import annotations

import torch
from torch import nn

# Linear layers that models of transformers 5.23 do not call, in every forward or in that of fused kernels: their
# weight is handed to a function. PEFT refuses Mamba's out_proj to LoRA for the same reason; the rest is read off the
# models' code (`grep -E "self\.\w+\.weight" modeling_*.py`).
_UNCALLED = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h", "bamba", "zamba2", "granitemoehybrid"), ("out_proj",)),
    "jamba": ("dt_proj",),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def uncalled_layers(model: nn.Module) -> dict[str, str]:
    """Why an adapter on a layer would do nothing, by the layer's path: what holds the layer reads its weight itself.

    Such are the output projections of `nn.MultiheadAttention`; both linear layers of an `nn.TransformerEncoderLayer`
    with batch_first, as long as torch's fast path is enabled; and those of some models of transformers, by type of
    model: Mamba and its relatives, Jamba, WavLM.

    >>> uncalled_layers(nn.MultiheadAttention(4, 2))
    {'out_proj': 'nn.MultiheadAttention reads its weight and does not call it'}
    """
    found, fast = {}, torch.backends.mha.get_fastpath_enabled()
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{inside}out_proj"] = "nn.MultiheadAttention reads its weight and does not call it"
        elif isinstance(module, nn.TransformerEncoderLayer) and fast and module.self_attn.batch_first:
            for name in ("linear1", "linear2"):
                found[f"{inside}{name}"] = (
                    "the fast path of nn.TransformerEncoderLayer in eval mode reads its weight and does not call it; "
                    "torch.backends.mha.set_fastpath_enabled(False) makes it be called"
                )
        kind = getattr(getattr(module, "config", None), "model_type", None)
        leaves = _UNCALLED.get(kind, ()) if isinstance(kind, str) else ()
        for name, _ in module.named_modules() if leaves else ():
            if name.rpartition(".")[2] in leaves:
                found[f"{inside}{name}"] = f"models of type {kind!r} read its weight and need not call it"
    return found
