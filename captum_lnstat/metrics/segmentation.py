"""ImageNet-Segmentation's protocol: a map cut at its mean against a labelled image, summed over the data set.

The figures of published tables are pixel accuracy and mean IoU accumulated over the set, and the mean over the images
of the average precision. The protocol's other conditions, which the caller sets: image and labels resized to the
model's input size without a crop (labels: nearest), the map of the predicted class, enlarged bilinearly to the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import above_mean, check_maps, result_dtype
from captum_lnstat.metrics.overlap import ranked_precision

if TYPE_CHECKING:
    from jaxtyping import Int

    from captum_lnstat.metrics.shapes import Maps, PerImage

IGNORED = -1


@dataclass(frozen=True)
class SegmentationCounts:
    """What one image adds to the sums; whole numbers, so that their sums do not depend on order.

    Attributes:
        correct: Labelled pixels on the right side of the threshold.
        labelled: Pixels that are not ignored.
        intersection: Pixels that are of a class and called so; background, object.
        union: Pixels that are of a class or called so; background, object.
    """

    correct: Int[Tensor, " batch"]
    labelled: Int[Tensor, " batch"]
    intersection: Int[Tensor, "batch 2"]
    union: Int[Tensor, "batch 2"]


@dataclass(frozen=True)
class SegmentationSummary:
    """The figures of a set of images.

    Attributes:
        pixel_accuracy: Correct pixels of all labelled ones.
        mean_iou: Mean of the two classes' IoU.
        iou: Background's and object's intersection over union, each summed over the set before dividing.
    """

    pixel_accuracy: float
    mean_iou: float
    iou: tuple[float, float]


def _labels(maps: Tensor, truth: Tensor) -> Tensor:
    """The truth as int64, in which -1 is -1; raise where it is not what it should be."""
    check_maps(maps)
    if truth.shape != maps.shape:
        raise ValueError(
            f"maps has shape {tuple(maps.shape)} and truth {tuple(truth.shape)}; expected both (batch, height, width)"
        )
    if truth.is_floating_point() or truth.is_complex():
        raise TypeError(f"truth is of {truth.dtype}; expected whole numbers: 1 object, 0 background, -1 ignored")
    labels = truth.long()
    known = (labels >= IGNORED) & (labels <= 1)
    if not bool(known.all()):
        raise ValueError(f"truth has the label {int(labels[~known][0])}; expected 1 object, 0 background, -1 ignored")
    return labels


def segmentation_counts(maps: Maps, truth: Int[Tensor, "batch height width"]) -> SegmentationCounts:
    """Cut each map at its own mean and count; nothing is divided yet.

    A pixel is called object where the map is above its mean over the whole image, ignored pixels included, as in the
    protocol. A flat map calls everything background.

    Args:
        maps: One map an image.
        truth: 1 object, 0 background, -1 ignored; or bool.

    Example:
        >>> import torch
        >>> counts = segmentation_counts(torch.tensor([[[5.0, 4.0, 0.0, 1.0]]]), torch.tensor([[[1, 0, 0, -1]]]))
        >>> counts.correct, counts.labelled, counts.intersection, counts.union
        (tensor([2]), tensor([3]), tensor([[1, 1]]), tensor([[2, 2]]))
    """
    labels, called = _labels(maps, truth), above_mean(maps)
    counted, on = labels != IGNORED, labels == 1
    background = ~called & counted, ~on & counted
    thing = called & counted, on & counted
    correct = ((called == on) & counted).sum((1, 2))
    intersection = torch.stack([(found & true).sum((1, 2)) for found, true in (background, thing)], 1)
    union = torch.stack([(found | true).sum((1, 2)) for found, true in (background, thing)], 1)
    return SegmentationCounts(correct, counted.sum((1, 2)), intersection, union)


def segmentation_summary(counts: SegmentationCounts | Sequence[SegmentationCounts]) -> SegmentationSummary:
    """Pixel accuracy and mean IoU accumulated over all images counted; a class that never occurs has an IoU of 0.

    Raises:
        ValueError: No labelled pixel at all.

    Example:
        >>> import torch
        >>> counts = segmentation_counts(torch.tensor([[[5.0, 4.0, 0.0, 1.0]]]), torch.tensor([[[1, 0, 0, 0]]]))
        >>> segmentation_summary(counts)
        SegmentationSummary(pixel_accuracy=0.75, mean_iou=0.5833333333333333, iou=(0.6666666666666666, 0.5))
    """
    parts = [counts] if isinstance(counts, SegmentationCounts) else list(counts)
    correct = sum(int(part.correct.sum()) for part in parts)
    labelled = sum(int(part.labelled.sum()) for part in parts)
    if labelled == 0:
        raise ValueError("no image has a labelled pixel; expected truth with 0 and 1")
    shares = []
    for label in (0, 1):
        both = sum(int(part.intersection[:, label].sum()) for part in parts)
        either = sum(int(part.union[:, label].sum()) for part in parts)
        shares.append(both / max(either, 1))
    return SegmentationSummary(correct / labelled, (shares[0] + shares[1]) / 2, (shares[0], shares[1]))


def segmentation_average_precision(maps: Maps, truth: Int[Tensor, "batch height width"]) -> PerImage:
    """Average precision of [1 - R, R] against [background, object], all pixels of both flattened together.

    R is the map scaled to [0, 1] by its minimum and maximum, so 1/2 is in effect a fixed threshold between the
    classes: the value depends on the scale inside a map, not on its ranking alone. A flat map is R = 0. Ignored
    pixels do not count.

    Raises:
        ValueError: An image without a labelled pixel.

    Example:
        >>> import torch
        >>> segmentation_average_precision(torch.tensor([[[1.0, 0.0, 0.25]]]), torch.tensor([[[1, 0, 1]]]))
        tensor([0.9167])
    """
    labels, values = _labels(maps, truth).flatten(1), maps.double().flatten(1)
    counted = labels != IGNORED
    if not bool(counted.any(1).all()):
        empty = int((~counted.any(1)).nonzero()[0])
        raise ValueError(f"truth of image {empty} has no labelled pixel; leave the image out")
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scaled = (values - low) / (high - low).where(high > low, torch.ones_like(high))
    both = ranked_precision(
        torch.cat([1 - scaled, scaled], 1), torch.cat([labels == 0, labels == 1], 1), counted.repeat(1, 2)
    )
    return both.to(result_dtype(maps))
