"""Where a map has its relevance: on the object it should be on, or elsewhere. Higher is better for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import check_maps, check_masks, result_dtype, share_of

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


def corners(maps: Maps, part: float = 1 / 14) -> Masks:
    """The four corners of every map, each a rectangle with ``part`` of both sides, rounded, at least a pixel.

    ViTs keep notes about the whole image on patches in the background, often on those in the corners; a map that
    follows attention there is bright where nothing is. ``energy`` and ``pointing`` on this mask say how much: a map
    that is the same everywhere has 2 % of its relevance on the corner patches of a 14 x 14 grid.

    Args:
        maps: One map an image, for its size.
        part: Part of a side, above 0 and at most a half; 1/14 is a patch of 16 px in an image of 224.

    Example:
        >>> import torch
        >>> corners(torch.zeros(1, 3, 4), part=0.3).int()
        tensor([[[1, 0, 0, 1],
                 [0, 0, 0, 0],
                 [1, 0, 0, 1]]], dtype=torch.int32)
    """
    check_maps(maps)
    if not 0 < part <= 0.5:
        raise ValueError(f"part is {part}; expected a number above 0 and at most 0.5")
    edges = []
    for side in maps.shape[1:]:
        wide = max(1, round(part * side))
        places = torch.arange(side, device=maps.device)
        edges.append((places < wide) | (places >= side - wide))
    return (edges[0][:, None] & edges[1]).expand(maps.shape)


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
