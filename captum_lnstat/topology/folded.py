"""Attention whose heads are folded into the batch, as SAM's: ``(batch * heads, tokens, channels)``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.sites import AttentionSite, FusedSite, Kept, SoftmaxSite


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
