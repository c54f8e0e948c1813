"""A block's values and its update, less what all tokens have in common.

With the affine maps of the path, an attention's update is ``d_i = M_i sum_j A_ij v_j + b``. Any vector ``m`` can be
taken out of all values: with ``w_j = v_j - m``, and ``s_i`` what row ``i`` of ``A`` sums to,

    e_i = d_i - (s_i M_i m + b) = M_i sum_j A_ij w_j.

A row of a softmax sums to one, that of a query which a mask lets see nothing to zero. With ``m`` the mean value of the
image, ``M_i m + b`` is what a token's update would be whatever it attended to: it tells no token from another, and
``e_i`` is what does. With ``m = 0``, ``e_i`` is all of the update that came from a source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.layout import PADDING, Groups, Layout
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import normalised
from captum_lnstat.trace.maps import FrozenMap, apply

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Deviations:
    """Of one block.

    Attributes:
        values: ``w_j^h = v_j^h - m^h``.
        common: ``m^h``.
        direction: ``(e_i - mean e_i) / sigma_i`` of ``e_i = d_i - (M_i m + b)``, over the channels; zero where they are
            all the same. Where an RMSNorm reads the stream, ``e_i / rms_i``.
        variance: ``sigma_i^2``, the variance of ``e_i``, or its mean square.
    """

    values: Float[Tensor, "group head key channel"]
    common: Float[Tensor, "batch head channel"]
    direction: Float[Tensor, "batch query_token out_channel"]
    variance: Float[Tensor, "batch query_token"]


def deviations(
    site: AttentionSite,
    path: Iterable[FrozenMap],
    layout: Layout,
    keys: Layout,
    update: Float[Tensor, "batch query_token out_channel"],
    *,
    from_mean: bool = True,
    centred: bool = True,
) -> Deviations:
    """An attention's values and its update, less what all tokens have in common.

    Args:
        site: The attention.
        path: From its joined heads to the update.
        layout: How tokens became queries.
        keys: How tokens became keys.
        update: What the attention added to each token.
        from_mean: ``m`` is the mean value; otherwise zero.
        centred: What reads the stream subtracts the mean over the channels; an RMSNorm does not.
    """
    batch, heads = len(update), site.shape[1]
    values = site.values(slice(0, heads))
    images = values.reshape(batch, -1, *values.shape[1:])  # (batch, group, head, key, channel)
    if not from_mean:
        common = values.new_zeros(batch, heads, values.shape[-1])
        e = update - apply(path, common.flatten(1)[:, None])
        return Deviations(values, common, *normalised(e, centred=centred))
    common = _mean(images, keys)
    joined = common.flatten(1)[:, None]
    if site.uneven:
        joined = layout.scatter(site.row_sums().repeat_interleave(common.shape[-1], -1), batch)[0] * joined
    # Head by head in memory, as they are multiplied.
    apart = torch.sub(images, common[:, None, :, None], out=images.new_empty(images.shape)).flatten(0, 1)
    return Deviations(apart, common, *normalised(update - apply(path, joined), centred=centred))


def less_the_mean(
    tokens: Float[Tensor, "batch token channel"], seen: Bool[Tensor, " token"] | None = None
) -> Float[Tensor, "batch token channel"]:
    """Tokens less the mean of those that the attention sees, all by default; a token that is alone stays as it is."""
    if tokens.shape[1] == 1:
        return tokens
    known = tokens if seen is None else tokens[:, seen]
    return tokens - known.mean(1, keepdim=True)


def _mean(values: Float[Tensor, "batch group head key channel"], keys: Layout) -> Float[Tensor, "batch head channel"]:
    """The mean value of an image, padded places left out."""
    if not isinstance(keys, Groups) or not keys.padded:
        return values.mean((1, 3))
    real = (keys.index != PADDING).to(values.dtype)
    return torch.einsum("bghkc,gk->bhc", values, real / real.sum())
