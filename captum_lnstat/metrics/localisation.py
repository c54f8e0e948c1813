"""Where a map has its relevance: on the object it should be on, or elsewhere. Higher is better for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from captum_lnstat.metrics.checks import check_masks, result_dtype, share_of

if TYPE_CHECKING:
    from captum_lnstat.metrics.shapes import Maps, Masks, PerImage


def pointing(maps: Maps, masks: Masks) -> PerImage:
    """1 where the largest value of a map lies on the mask, else 0. Several equal largest values count by their share.

    The pointing game of Zhang et al. 2016, without a tolerance around the mask.

    Example:
        >>> import torch
        >>> pointing(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.])
    """
    check_masks(maps, masks)
    peak = maps == maps.amax((1, 2), keepdim=True)
    share = (peak & masks).sum((1, 2)).double() / peak.sum((1, 2))
    return share.to(result_dtype(maps))


def energy(maps: Maps, masks: Masks) -> PerImage:
    """Share of a map's positive relevance on the mask; the mask's share of the image if there is none.

    The energy-based pointing game of Wang et al. 2020 (Score-CAM), section 4.3. A map that knows nothing gets the
    mask's share of the image.

    Example:
        >>> import torch
        >>> energy(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.2500])
    """
    check_masks(maps, masks)
    positive = maps.double().clamp(min=0)
    chance = masks.double().mean((1, 2))
    return share_of((positive * masks).sum((1, 2)), positive.sum((1, 2)), chance).to(result_dtype(maps))


def _on_both(maps: Tensor, asked: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Positive relevance on each of two objects."""
    check_masks(maps, asked, "asked")
    check_masks(maps, other, "other")
    positive = maps.double().clamp(min=0)
    return (positive * asked).sum((1, 2)), (positive * other).sum((1, 2))


def asked_share(maps: Maps, asked: Masks, other: Masks) -> PerImage:
    """Of the positive relevance on two objects, the share on the one whose class was asked for; 1/2 if there is none.

    Example:
        >>> import torch
        >>> on, off = torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])
        >>> asked_share(torch.tensor([[[1.0, 3.0]]]), on, off)
        tensor([0.2500])
    """
    first, second = _on_both(maps, asked, other)
    return share_of(first, first + second, 0.5).to(result_dtype(maps))


def two_object(maps: Maps, asked: Masks, other: Masks) -> PerImage:
    """1 where the asked object has more positive relevance than the other one, 1/2 where both have as much, else 0.

    A map that is the same for every class gets 1/2 on average when each object is asked for in turn.

    Example:
        >>> import torch
        >>> on, off = torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])
        >>> two_object(torch.tensor([[[1.0, 3.0]]]), on, off), two_object(torch.tensor([[[1.0, 3.0]]]), off, on)
        (tensor([0.]), tensor([1.]))
    """
    first, second = _on_both(maps, asked, other)
    return ((first > second).double() + 0.5 * (first == second).double()).to(result_dtype(maps))
