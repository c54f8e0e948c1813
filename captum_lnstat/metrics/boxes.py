"""The box around what a map points at, against the boxes of the object: top-1 localisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from captum_lnstat.metrics.checks import check_maps, result_dtype
from captum_lnstat.metrics.targets import class_indices

if TYPE_CHECKING:
    from jaxtyping import Int, Num

    from captum_lnstat.metrics.shapes import Maps, Masks, PerImage


def _components(above: Tensor) -> Tensor:
    """For every pixel of a bool mask the first pixel, in reading order, of its component; height * width elsewhere.

    Pixels that touch at a side or a corner are one component. Every pixel takes the least label around it, then the
    label of the pixel so named, which is in the same component: the labels stop changing after few rounds.
    """
    batch, height, width = above.shape
    pixels = height * width
    nowhere = torch.full((batch, 1), float(pixels), dtype=torch.float64, device=above.device)
    outside = nowhere[:, :, None].expand_as(above)
    places = torch.arange(pixels, dtype=torch.float64, device=above.device).view(1, height, width)
    labels = torch.where(above, places, outside)
    while True:
        least = -functional.max_pool2d(-labels[:, None], 3, stride=1, padding=1)[:, 0]
        named = torch.where(above, least, outside).flatten(1)
        following = torch.cat([named, nowhere], 1).gather(1, named.long()).view_as(labels)
        if torch.equal(following, labels):
            return labels.long()
        labels = following


def component_boxes(above: Masks) -> Int[Tensor, "batch 4"]:
    """The box of the largest connected component of each mask: left, top, right, bottom; right and bottom exclusive.

    Pixels that touch at a side or a corner are connected. Of equally large components the one that begins first in
    reading order counts. Without any pixel the box is all zeros.

    Example:
        >>> import torch
        >>> component_boxes(torch.tensor([[[1, 0, 1, 1], [1, 0, 0, 1]]]).bool())
        tensor([[2, 0, 4, 2]])
    """
    batch, height, width = above.shape
    labels = _components(above).flatten(1)
    sizes = torch.zeros(batch, height * width + 1, dtype=torch.long, device=above.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    largest = sizes[:, :-1].argmax(1, keepdim=True)
    chosen = (labels == largest).view_as(above)

    def extent(line: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(line.shape[1], device=line.device).expand_as(line)
        first = places.where(line, torch.full_like(places, line.shape[1])).amin(1)
        end = (places + 1).where(line, torch.zeros_like(places)).amax(1)
        return first, end

    (top, bottom), (left, right) = extent(chosen.any(2)), extent(chosen.any(1))
    found = chosen.flatten(1).any(1, keepdim=True)
    return torch.stack([left, top, right, bottom], 1) * found


def check_boxes(boxes: Sequence[Tensor], images: int) -> None:
    """Raise unless there is a box or more with an area for every image."""
    if len(boxes) != images:
        raise ValueError(f"boxes has {len(boxes)} entries for {images} maps; expected one (n, 4) tensor a map")
    for index, one in enumerate(boxes):
        if one.dim() != 2 or one.shape[1] != 4 or len(one) == 0:
            raise ValueError(
                f"boxes[{index}] has shape {tuple(one.shape)}; expected (n, 4) with n >= 1: left, top, right, bottom. "
                "Leave out images without a box"
            )
        if not bool(((one[:, 2:] > one[:, :2]).all(1) & one.isfinite().all(1)).all()):
            raise ValueError(f"boxes[{index}] is {one.tolist()}; expected right > left and bottom > top in every row")


def box_iou(maps: Maps, boxes: Sequence[Num[Tensor, "boxes 4"]], threshold: float = 0.5) -> PerImage:
    """Intersection over union of the map's box with the best of the image's boxes.

    Each map is scaled to [0, 1] by its own minimum and maximum and cut at ``threshold``; its box is that of the largest
    connected component at or above it (``component_boxes``). A flat map has no box and gets 0.

    Args:
        maps: One map an image, of the size in which the boxes are given.
        boxes: For every image its boxes ``(n, 4)``: left, top, right, bottom in pixels, right and bottom exclusive.
        threshold: Above 0 and at most 1.

    Raises:
        ValueError: An image without boxes, or a box without area.

    Example:
        >>> import torch
        >>> box_iou(torch.tensor([[[0.0, 2.0, 3.0, 0.1]]]), [torch.tensor([[1, 0, 4, 1], [0, 0, 1, 1]])])
        tensor([0.6667])
    """
    check_maps(maps)
    check_boxes(boxes, len(maps))
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a number above 0 and at most 1")
    values = maps.double()
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    found = component_boxes((values - low >= threshold * (high - low)) & (high > low)).double()
    best = []
    for box, truth in zip(found, boxes, strict=True):
        true = truth.to(found)
        sides = (torch.minimum(box[2:], true[:, 2:]) - torch.maximum(box[:2], true[:, :2])).clamp(min=0)
        both = sides.prod(1)
        union = (box[2:] - box[:2]).prod() + (true[:, 2:] - true[:, :2]).prod(1) - both
        best.append((both / union).amax())
    return torch.stack(best).to(result_dtype(maps)) if best else maps.new_zeros(0, dtype=result_dtype(maps))


def top1_localisation(
    maps: Maps,
    boxes: Sequence[Num[Tensor, "boxes 4"]],
    predicted: int | Sequence[int] | Int[Tensor, " batch"],
    target: int | Sequence[int] | Int[Tensor, " batch"],
    threshold: float = 0.5,
) -> PerImage:
    """1 where the predicted class is the target and the map's box meets a true one with an IoU of at least 1/2.

    The localisation accuracy of ILSVRC with boxes made from maps; ``boxes`` and ``threshold`` as in ``box_iou``.

    Example:
        >>> import torch
        >>> maps, boxes = torch.tensor([[[0.0, 2.0, 3.0, 0.1]]]), [torch.tensor([[1, 0, 4, 1]])]
        >>> top1_localisation(maps, boxes, predicted=7, target=7), top1_localisation(maps, boxes, predicted=3, target=7)
        (tensor([1.]), tensor([0.]))
    """
    met = box_iou(maps.double(), boxes, threshold) >= 0.5
    right = class_indices(predicted, maps, "predicted") == class_indices(target, maps)
    return (met & right).to(result_dtype(maps))
