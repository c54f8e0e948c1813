"""How well a map lies on the object it should be on; higher is better for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def _check(maps: Tensor, masks: Tensor) -> None:
    if maps.shape != masks.shape or maps.dim() != 3:
        raise ValueError(
            f"maps has shape {tuple(maps.shape)} and masks {tuple(masks.shape)}; expected both (batch, height, width)"
        )
    if masks.dtype != torch.bool:
        raise TypeError(f"masks is of {masks.dtype}; expected bool")


def pointing(
    maps: Float[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """1 where the largest value of a map lies on the mask, else 0. Several equal largest values count by their share.

    Example:
        >>> import torch
        >>> pointing(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.])
    """
    _check(maps, masks)
    peak = maps == maps.amax((1, 2), keepdim=True)
    return (peak & masks).sum((1, 2)) / peak.sum((1, 2))


def energy(
    maps: Float[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Share of a map's positive relevance on the mask; the mask's share of the image if there is none.

    Example:
        >>> import torch
        >>> energy(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.2500])
    """
    _check(maps, masks)
    positive = maps.clamp(min=0)
    total = positive.sum((1, 2))
    chance = masks.to(maps.dtype).mean((1, 2))
    return torch.where(total > 0, (positive * masks).sum((1, 2)) / total, chance)


def iou(
    maps: Float[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Intersection over union of the mask and of where a map is above its own mean.

    Example:
        >>> import torch
        >>> iou(torch.tensor([[[1.0, 3.0, 3.0, 0.0]]]), torch.tensor([[[False, True, False, False]]]))
        tensor([0.5000])
    """
    _check(maps, masks)
    above = maps > maps.mean((1, 2), keepdim=True)
    union = (above | masks).sum((1, 2))
    return (above & masks).sum((1, 2)) / union.clamp(min=1)


def asked_share(
    maps: Float[Tensor, "batch height width"],
    asked: Bool[Tensor, "batch height width"],
    other: Bool[Tensor, "batch height width"],
) -> Float[Tensor, " batch"]:
    """Of the positive relevance on two objects, the share on the one whose class was asked for; 1/2 if there is none.

    Example:
        >>> import torch
        >>> on, off = torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])
        >>> asked_share(torch.tensor([[[1.0, 3.0]]]), on, off)
        tensor([0.2500])
    """
    _check(maps, asked)
    _check(maps, other)
    positive = maps.clamp(min=0)
    first, second = (positive * asked).sum((1, 2)), (positive * other).sum((1, 2))
    total = first + second
    return torch.where(total > 0, first / total, torch.full_like(total, 0.5))
