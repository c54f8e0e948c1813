"""The measures of boxes as torchmetrics classes; see ``classes`` for what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.metrics import boxes as _boxes
from captum_lnstat.metrics import wsol
from captum_lnstat.metrics.classes import ImageMean

if TYPE_CHECKING:
    from jaxtyping import Float, Num

    from captum_lnstat.metrics.shapes import Maps


class _Box(ImageMean):
    """Base of the metrics of a map's box."""

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"threshold": threshold}


class BoxIoU(_Box):
    """Mean of ``box_iou``: the map's box against the best true box.

    Example:
        >>> import torch
        >>> BoxIoU()(torch.tensor([[[0.0, 2.0, 3.0]]]), [torch.tensor([[1, 0, 3, 1]])])
        tensor(1.)
    """

    measure = staticmethod(_boxes.box_iou)


class Top1Localisation(_Box):
    """Mean of ``top1_localisation``: class right and box right.

    Example:
        >>> import torch
        >>> Top1Localisation()(torch.tensor([[[0.0, 2.0, 3.0]]]), [torch.tensor([[1, 0, 3, 1]])], 4, 5)
        tensor(0.)
    """

    measure = staticmethod(_boxes.top1_localisation)


class MaxBoxAcc(ImageMean):
    """MaxBoxAcc V2: a dictionary ``mean`` over the IoUs and, for each, the accuracy and threshold, ``0.5``, ``at 0.5``.

    Args:
        ious: As for ``box_hits``.
        steps: As for ``box_hits``.
        kwargs: torchmetrics' own.

    Example:
        >>> import torch
        >>> metric = MaxBoxAcc(ious=(0.7,), steps=4)
        >>> metric(torch.tensor([[[0.0, 2.0, 3.0]]]), [torch.tensor([[1, 0, 3, 1]])])
        {'mean': tensor(1.), '0.7': tensor(1.), 'at 0.7': tensor(0.2500)}
    """

    hits: Tensor

    def __init__(self, ious: Sequence[float] = wsol.IOUS, steps: int = wsol.STEPS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"ious": tuple(ious), "steps": steps}
        sums = torch.zeros(len(self.options["ious"]), steps, dtype=torch.long, device="cpu")
        self.add_state("hits", sums, dist_reduce_fx="sum")

    def update(self, maps: Maps, boxes: Sequence[Num[Tensor, "boxes 4"]]) -> None:
        found = wsol.box_hits(maps, boxes, **self.options)
        self.hits = self.hits + found.sum(0).to(self.hits.device)
        self.images += len(found)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The figures over all images seen.

        Raises:
            ValueError: No image was seen.
        """
        mean = self.mean()
        found = wsol.of_sums(self.hits, int(self.images))
        values = {"mean": found.value}
        for iou, share, threshold in zip(self.options["ious"], found.accuracies, found.thresholds, strict=True):
            values |= {f"{iou:g}": share, f"at {iou:g}": threshold}
        return {name: mean.new_tensor(value) for name, value in values.items()}
