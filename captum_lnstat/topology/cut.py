"""Attention of windows that have a dimension of their own, beside the batch and the heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.sites import AttentionSite, FusedSite, Kept, SoftmaxSite


@dataclass(frozen=True)
class _FusedCut(FusedSite):
    heads: int

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return _windows_first(gradient, self.heads)


@dataclass(frozen=True)
class _SoftmaxCut(SoftmaxSite):
    heads: int

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return _windows_first(gradient, self.heads)


def cut(site: AttentionSite) -> AttentionSite:
    """The same attention with its windows counted in the batch, image by image; one that has none is returned as it is.

    Of ``(batch, heads, windows, ...)`` and ``(batch, windows, heads, ...)`` it is the one in which heads lie closer
    together in memory than windows: a Linear's channels are cut into heads, its tokens into windows.

    Raises:
        UnsupportedModelError: The windows have masks of their own.
    """
    if isinstance(site, SoftmaxSite) and site.value is not None and site.attention.tensor.dim() == 5:
        heads = _heads(site.value.tensor)
        return _SoftmaxCut(site.module, _cut(site.attention, heads), _cut(site.value, heads), site.output, heads)
    if isinstance(site, FusedSite) and site.value.tensor.dim() == 5:
        heads = _heads(site.value.tensor)
        if site.mask is not None and site.mask.tensor.dim() > 2:
            raise UnsupportedModelError(
                f"the attention at {site.module!r} has a mask of shape {tuple(site.mask.tensor.shape)} for its "
                "windows; expected windows of one image without masks"
            )
        q, k, v = (_cut(kept, heads) for kept in (site.query, site.key, site.value))
        return _FusedCut(site.module, q, k, v, site.mask, site.scale, site.is_causal, site.output, heads)
    return site


def _heads(value: Tensor) -> int:
    """Which dimension of ``(batch, one, other, tokens, channels)`` has the heads."""
    return 1 if value.stride(1) < value.stride(2) else 2


def _cut(kept: Kept, heads: int) -> Kept:
    return Kept.of(_windows_first(kept.read(), heads))


def _windows_first(tensor: Tensor, heads: int) -> Tensor:
    return (tensor.transpose(1, 2) if heads == 1 else tensor).flatten(0, 1)
