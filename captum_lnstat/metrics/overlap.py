"""A map cut at a threshold, or ranked pixel by pixel, against a mask. Higher is better for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import above_mean, check_masks, result_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from captum_lnstat.metrics.shapes import Maps, Masks, PerImage

Threshold = Literal["mean", "best"]
# hits, chosen, positives and pixels, each (batch, threshold) or broadcast to it, to a score of the same shape.
_Score = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _best_score(maps: Tensor, masks: Tensor, threshold: Threshold, score: _Score) -> Tensor:
    """The score at the mean of each map, or the largest over all its thresholds."""
    check_masks(maps, masks)
    values, on = maps.double().flatten(1), masks.flatten(1)
    pixels, positives = values.shape[1], on.sum(1, keepdim=True).double()
    if threshold == "mean":
        above = above_mean(maps).flatten(1)
        hits = (above & on).sum(1, keepdim=True).double()
        scores = score(hits, above.sum(1, keepdim=True).double(), positives, pixels)
    elif threshold == "best":
        # The k largest values for every k, of which those k are thresholds that do not part equal values; k = 0 is a
        # threshold above them all.
        values, order = values.sort(1, descending=True)
        hits = on.gather(1, order).cumsum(1).double()
        hits = torch.cat([torch.zeros_like(positives), hits], 1)
        chosen = torch.arange(pixels + 1, device=values.device).double()
        whole = torch.ones_like(positives, dtype=torch.bool)
        parts = torch.cat([whole, values[:, 1:] != values[:, :-1], whole], 1)
        scores = score(hits, chosen, positives, pixels).where(parts, torch.full_like(positives, -1.0))
    else:
        raise ValueError(f"threshold is {threshold!r}; expected 'mean' or 'best'")
    return scores.amax(1).to(result_dtype(maps))


def iou(maps: Maps, masks: Masks, threshold: Threshold = "mean") -> PerImage:
    """Intersection over union of the mask and of where a map is above a threshold; 0 if neither has a pixel.

    Args:
        maps: One map an image, floating and finite.
        masks: Where the object is.
        threshold: ``"mean"``: above the map's own mean, as in ImageNet-Segmentation's protocol. ``"best"``: the largest
            value over all thresholds of each map; equal values are always on the same side. It uses the mask to
            choose, so it says what a map holds, not what a user gets without the mask.

    Example:
        >>> import torch
        >>> maps, mask = torch.tensor([[[1.0, 3.0, 3.0, 4.0]]]), torch.tensor([[[False, True, True, True]]])
        >>> iou(maps, mask), iou(maps, mask, "best")
        (tensor([1.]), tensor([1.]))
        >>> iou(torch.tensor([[[1.0, 3.0, 3.0, 0.0]]]), torch.tensor([[[False, True, False, False]]]))
        tensor([0.5000])
    """
    return _best_score(maps, masks, threshold, lambda hit, chosen, on, _: hit / (chosen + on - hit).clamp(min=1))


def f1(maps: Maps, masks: Masks, threshold: Threshold = "mean") -> PerImage:
    """F1, the harmonic mean of precision and recall, of where a map is above a threshold; 0 if neither has a pixel.

    ``2 hits / (chosen + positives)``; ``threshold`` as in ``iou``.

    Example:
        >>> import torch
        >>> f1(torch.tensor([[[1.0, 3.0, 3.0, 0.0]]]), torch.tensor([[[False, True, False, False]]]))
        tensor([0.6667])
    """
    return _best_score(maps, masks, threshold, lambda hit, chosen, on, _: 2 * hit / (chosen + on).clamp(min=1))


def pixel_accuracy(maps: Maps, masks: Masks, threshold: Threshold = "mean") -> PerImage:
    """Share of pixels that are on the right side of a threshold; ``threshold`` as in ``iou``.

    The best threshold may lie above all values: choosing nothing is right on every pixel beside the object.

    Example:
        >>> import torch
        >>> pixel_accuracy(torch.tensor([[[1.0, 3.0, 3.0, 0.0]]]), torch.tensor([[[False, True, False, False]]]))
        tensor([0.7500])
    """
    return _best_score(
        maps, masks, threshold, lambda hit, chosen, on, pixels: (pixels - chosen - on + 2 * hit) / pixels
    )


def ranked_precision(
    scores: Float[Tensor, "batch item"],
    positive: Bool[Tensor, "batch item"],
    counted: Bool[Tensor, "batch item"] | None = None,
) -> PerImage:
    """Average precision, ``sum over thresholds of (recall's step) * precision``, in float64; 0 without positives.

    Equal scores are one threshold, so their order does not matter: scikit-learn's ``average_precision_score``.

    Args:
        scores: Finite.
        positive: Which items should come first.
        counted: Which items count at all; all of them by default.

    Example:
        >>> import torch
        >>> ranked_precision(torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([[False, True, False]]))
        tensor([0.3333], dtype=torch.float64)
    """
    counted = torch.ones_like(positive) if counted is None else counted
    values, order = scores.double().sort(1, descending=True)
    on = (positive & counted).gather(1, order)
    hits, chosen = on.cumsum(1), counted.gather(1, order).cumsum(1)
    # The last of the items that are equal to this one: the nearest place at or after it where the value changes.
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    changes = torch.cat([values[:, 1:] != values[:, :-1], torch.ones_like(on[:, :1])], 1)
    last = places.where(changes, torch.full_like(places, values.shape[1])).flip(1).cummin(1).values.flip(1)
    precision = hits.gather(1, last).double() / chosen.gather(1, last).clamp(min=1)
    return (precision * on).sum(1) / on.sum(1).clamp(min=1)


def average_precision(maps: Maps, masks: Masks) -> PerImage:
    """Area under precision against recall, as a step function, of a map's pixels ranked by relevance.

    Scikit-learn's ``average_precision_score`` of each image's pixels. A map that ranks at random gets about the
    mask's share of the image, a flat map exactly that; without a pixel on the mask it is 0.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[True, False, True, False]]])
        >>> average_precision(torch.tensor([[[4.0, 3.0, 2.0, 1.0]]]), mask)
        tensor([0.8333])
        >>> average_precision(torch.ones(1, 1, 4), mask)
        tensor([0.5000])
    """
    check_masks(maps, masks)
    return ranked_precision(maps.flatten(1), masks.flatten(1)).to(result_dtype(maps))
