"""A fused attention, run and recorded: ``scaled_dot_product_attention`` with the arguments that it may be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from captum_lnstat.recording.attention_backward import ObservedAttention, can_be_observed
from captum_lnstat.recording.kept import Kept, edge
from captum_lnstat.recording.sites import FusedSite


def run_fused(
    call: Callable[[], Tensor],
    module: str,
    keep: Callable[[Tensor], Kept],
    observed: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, FusedSite]:
    """What the attention returns, and its site.

    Args:
        call: The model's own call.
        module: What is running.
        keep: Keeps a tensor.
        observed: Its backward pass is ours, and is run with an observer where that can be.
        query: As of torch's function, and so are the others.
        key: As of torch's function.
        value: As of torch's function.
        attn_mask: As of torch's function.
        dropout_p: As of torch's function.
        is_causal: As of torch's function.
        scale: As of torch's function.
        enable_gqa: As of torch's function.
    """
    mask = None if attn_mask is None else keep(attn_mask)
    site = FusedSite(module, keep(query), keep(key), keep(value), mask, scale, is_causal, None)
    if observed and can_be_observed(site, dropout_p, attn_mask):
        output: Tensor = ObservedAttention.apply(query, key, value, attn_mask, site)
    else:
        output = call()
    return output, replace(site, output=edge(output))
