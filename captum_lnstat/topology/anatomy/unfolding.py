"""Attention of windows that have a dimension of their own, beside the batch and the heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.sites import AttentionSite, FusedSite, SoftmaxSite


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


@dataclass(frozen=True)
class _FusedFolded(FusedSite):
    def output_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(self.query.tensor.shape[:2] + gradient.shape[1:])


@dataclass(frozen=True)
class _SoftmaxFolded(SoftmaxSite):
    def output_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(self.attention.tensor.shape[:2] + gradient.shape[1:])


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

    def split(kept: Kept) -> Kept:
        tensor = kept.read()
        return Kept.of(tensor.reshape(len(tensor) // heads, heads, *tensor.shape[1:]))

    if isinstance(site, SoftmaxSite):
        return _SoftmaxFolded(site.module, split(site.attention), split(value), site.output)
    assert isinstance(site, FusedSite)
    mask = site.mask
    if mask is not None and mask.tensor.dim() == 3 and len(mask.tensor) > 1:
        mask = split(mask)
    parts = {"query": split(site.query), "key": split(site.key), "value": split(value), "mask": mask}
    return _FusedFolded(**{**{name: getattr(site, name) for name in site.__dataclass_fields__}, **parts})
