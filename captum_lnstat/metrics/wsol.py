"""MaxBoxAcc: how well a map finds boxes at the best threshold for the whole set, so that no method's scale counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from captum_lnstat.metrics.boxes import check_boxes
from captum_lnstat.metrics.checks import check_maps

if TYPE_CHECKING:
    from jaxtyping import Bool, Num

    from captum_lnstat.metrics.shapes import Maps

IOUS = (0.3, 0.5, 0.7)
STEPS = 100


@dataclass(frozen=True)
class MaxBoxAccuracy:
    """MaxBoxAcc of a set of maps.

    Attributes:
        value: The mean of ``accuracies``.
        accuracies: For every IoU, the share of the maps that reach it at the best threshold for all of them.
        thresholds: For every IoU, that threshold.
    """

    value: float
    accuracies: tuple[float, ...]
    thresholds: tuple[float, ...]


def box_hits(
    maps: Maps, boxes: Sequence[Num[Tensor, "boxes 4"]], *, ious: Sequence[float] = IOUS, steps: int = STEPS
) -> Bool[Tensor, "batch iou step"]:
    """Whether a box of a map cut at a threshold meets a true box, for every IoU that is asked for and every threshold.

    Each map is scaled to [0, 1] by its own minimum and maximum and cut at ``k / steps``, ``k = 0 .. steps - 1``. Every
    connected component of what is at or above it (pixels that touch at a side or a corner) has its box; that one counts
    which meets a true box best. A flat map has no box.

    Args:
        maps: One map an image, of the size in which the boxes are given.
        boxes: For every image its boxes ``(n, 4)``: left, top, right, bottom in pixels, right and bottom exclusive.
        ious: Intersections over union that count as found.
        steps: How many thresholds.

    Raises:
        ValueError: An image without boxes, a box without area, an IoU outside of (0, 1], or no step.
        ImportError: SciPy is not installed.

    Example:
        >>> import torch
        >>> maps, boxes = torch.tensor([[[0.0, 2.0, 3.0, 0.1]]]), [torch.tensor([[1, 0, 4, 1]])]
        >>> box_hits(maps, boxes, ious=(0.6,), steps=4)
        tensor([[[ True,  True,  True, False]]])
    """
    check_maps(maps)
    check_boxes(boxes, len(maps))
    wanted = np.array([float(iou) for iou in ious])
    if not len(wanted) or not ((wanted > 0) & (wanted <= 1)).all():
        raise ValueError(f"ious is {tuple(ious)}; expected numbers above 0 and at most 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; expected a whole number, 1 or above")
    best = np.zeros((len(maps), steps))
    for row, (values, truth) in enumerate(zip(maps.double().cpu().numpy(), boxes, strict=True)):
        low, high = values.min(), values.max()
        for step in range(steps) if high > low else ():
            best[row, step] = _best_iou(values - low >= step / steps * (high - low), truth.double().cpu().numpy())
    return torch.from_numpy(best[:, None] >= wanted[:, None]).to(maps.device)


def _best_iou(above: np.ndarray, truth: np.ndarray) -> float:
    """The best intersection over union of a component's box with a true one."""
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise ImportError('MaxBoxAcc needs SciPy: pip install "captum-lnstat[evaluate]"') from error
    labels, _ = ndimage.label(above, structure=np.ones((3, 3)))
    slices = ndimage.find_objects(labels)
    found = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], dtype=float)[:, None]
    sides = np.minimum(found[..., 2:], truth[:, 2:]) - np.maximum(found[..., :2], truth[:, :2])
    both = sides.clip(min=0).prod(-1)
    areas = (found[..., 2:] - found[..., :2]).prod(-1) + (truth[:, 2:] - truth[:, :2]).prod(-1)
    return float((both / (areas - both)).max())


def max_box_accuracy(hits: Bool[Tensor, "image iou step"]) -> MaxBoxAccuracy:
    r"""MaxBoxAcc V2 (Choe et al., CVPR 2020, and PAMI 2022) of all images of a set.

    .. math:: \frac1K \sum_{k=1}^{K} \max_\tau \frac1N \sum_n \text{hit}_{n, \delta_k}(\tau)

    with the IoUs :math:`\delta_k` of ``box_hits``, by default .3, .5 and .7. The original goes through 1,000
    thresholds. The best threshold is chosen on the images that are measured, as there.

    Args:
        hits: Of ``box_hits``, images of several calls one after the other.

    Raises:
        ValueError: There is no image.

    Example:
        >>> import torch
        >>> maps = torch.tensor([[[0.0, 2.0, 3.0, 0.1]], [[0.0, 1.0, 3.0, 2.0]]])
        >>> boxes = [torch.tensor([[1, 0, 3, 1]]), torch.tensor([[2, 0, 3, 1]])]
        >>> max_box_accuracy(box_hits(maps, boxes, ious=(0.5, 0.9), steps=4))
        MaxBoxAccuracy(value=0.75, accuracies=(1.0, 0.5), thresholds=(0.5, 0.25))
    """
    if hits.dim() != 3 or not len(hits):
        raise ValueError(f"hits has shape {tuple(hits.shape)}; expected (image, iou, step) of one image or more")
    return of_sums(hits.double().sum(0), len(hits))


def of_sums(sums: Tensor, images: int) -> MaxBoxAccuracy:
    """The same from the number of hits at every IoU and threshold."""
    best, place = (sums.double() / images).max(1)
    steps = sums.shape[1]
    return MaxBoxAccuracy(float(best.mean()), tuple(best.tolist()), tuple((place.double() / steps).tolist()))
