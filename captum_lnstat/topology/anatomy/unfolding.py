"""Attention of windows that have a dimension of their own, beside the batch and the heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.sites import AttentionSite, FusedSite, SoftmaxSite

Regroup = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Fused(FusedSite):
    regroup: Regroup

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return self.regroup(gradient)


@dataclass(frozen=True)
class _Softmax(SoftmaxSite):
    regroup: Regroup

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return self.regroup(gradient)


def _regrouped(site: FusedSite | SoftmaxSite, regroup: Regroup, mask: Kept | None = None) -> AttentionSite:
    """The same attention with the heads in the second dimension of all its tensors, and of its output's gradient."""

    def each(kept: Kept) -> Kept:
        return Kept.of(regroup(kept.read()))

    if isinstance(site, SoftmaxSite):
        value = None if site.value is None else each(site.value)
        given = None if site.given is None else each(site.given)
        return _Softmax(site.module, each(site.attention), value, site.output, regroup, given=given)
    query, key, value = each(site.query), each(site.key), each(site.value)
    return _Fused(site.module, query, key, value, mask, site.scale, site.is_causal, site.output, regroup)


def cut(site: AttentionSite) -> AttentionSite:
    """The same attention with its windows counted in the batch, image by image; one that has none is returned as it is.

    Of ``(batch, heads, windows, ...)`` and ``(batch, windows, heads, ...)`` it is the one in which heads lie closer
    together in memory than windows: a Linear's channels are cut into heads, its tokens into windows.

    Raises:
        UnsupportedModelError: The windows have masks of their own.
    """
    if not isinstance(site, FusedSite | SoftmaxSite) or site.value is None or site.value.tensor.dim() != 5:
        return site
    mask = site.mask if isinstance(site, FusedSite) else None
    if mask is not None and mask.tensor.dim() > 2:
        raise UnsupportedModelError(
            f"the attention at {site.module!r} has a mask of shape {tuple(mask.tensor.shape)} for its windows; "
            "expected windows of one image without masks"
        )
    return _regrouped(site, partial(_windows_first, heads=_heads(site.value.tensor)), mask)


def _heads(value: Tensor) -> int:
    """Which dimension of ``(batch, one, other, tokens, channels)`` has the heads."""
    return 1 if value.stride(1) < value.stride(2) else 2


def _windows_first(tensor: Tensor, heads: int) -> Tensor:
    return (tensor.transpose(1, 2) if heads == 1 else tensor).flatten(0, 1)


def unfolded(site: AttentionSite, width: int) -> AttentionSite:
    """The same attention with the heads beside the batch; one that has them there is returned as it is.

    Args:
        site: What was recorded, head fastest in the folded batch.
        width: Channels of all heads together, as the Linear after the attention reads them.

    Raises:
        UnsupportedModelError: The channels of one head do not divide those of all.
    """
    value = site.value if isinstance(site, FusedSite | SoftmaxSite) else None
    if value is None or value.tensor.dim() != 3:
        return site
    heads, rest = divmod(width, value.tensor.shape[-1])
    if rest or len(value.tensor) % heads:
        raise UnsupportedModelError(
            f"the attention at {site.module!r} has values of shape {tuple(value.tensor.shape)} and joined heads of "
            f"{width} channels; expected the heads to divide both"
        )

    def split(tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor) // heads, heads, *tensor.shape[1:])

    mask = site.mask if isinstance(site, FusedSite) else None
    if mask is not None and mask.tensor.dim() == 3 and len(mask.tensor) > 1:
        mask = Kept.of(split(mask.read()))
    assert isinstance(site, FusedSite | SoftmaxSite)
    return _regrouped(site, split, mask)
