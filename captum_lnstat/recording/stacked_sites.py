"""The maps and values of several attention sites of one shape, side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.recording.multi_head import MultiHeadSite
from captum_lnstat.recording.sites import AttentionSite, FusedSite, less_the_least

if TYPE_CHECKING:
    from jaxtyping import Float


def stacked_probabilities(sites: Sequence[AttentionSite]) -> Float[Tensor, "site batch head query key"]:
    """The whole maps of several sites. No number is read of them, so that a device need not be waited for."""
    unpacked = [site.unpacked if isinstance(site, MultiHeadSite) else site for site in sites]
    fused = [site for site in unpacked if isinstance(site, FusedSite) and site.plain]
    if len(fused) < len(sites) or len({site.factor for site in fused}) > 1:
        return torch.stack([site.probabilities(slice(0, site.shape[1])) for site in sites])
    query, key = (torch.stack(tensors) for tensors in zip(*(site.queries_and_keys for site in fused), strict=True))
    flat = torch.baddbmm(query.new_empty(()), query.flatten(0, 2), key.flatten(0, 2).mT, beta=0, alpha=fused[0].factor)
    scores = flat.view(*query.shape[:3], *flat.shape[1:])
    nothing = [site.hide(one) for site, one in zip(fused, scores, strict=True)]
    probabilities = scores.softmax(-1)
    if any(site.mask is not None for site in fused):
        probabilities = less_the_least(probabilities)
    for one, hidden in zip(probabilities, nothing, strict=True):
        if hidden is not None:
            one.masked_fill_(hidden, 0.0)
    return probabilities


def stacked_values(sites: Sequence[AttentionSite]) -> Float[Tensor, "site batch head key channel"]:
    """The values of several sites."""
    return torch.stack([site.values(slice(0, site.shape[1])) for site in sites])
