"""The measures of maps as torchmetrics classes: fed batch by batch, on any number of processes, one figure at the end.

Each takes in ``update`` what its function in ``captum_lnstat.metrics`` takes, and keeps sums only. Sums of values are
float64 and returned as float32, so a figure is the same for any split of the images into batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.metrics import agreement, games, localisation, overlap, segmentation
from captum_lnstat.metrics.overlap import Threshold
from captum_lnstat.metrics.targets import Classes

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise ImportError(
        'the metric classes need torchmetrics: pip install "captum-lnstat[evaluate]". The functions of '
        "captum_lnstat.metrics do not"
    ) from error

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

    from captum_lnstat.metrics.shapes import Maps, PerImage


class ImageMean(Metric):  # type: ignore[misc]
    """Base of all these metrics: the mean of one value an image, kept as a sum and a count.

    A subclass says which function gives the values, ``measure``, and the ``options`` that it is called with.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    measure: Callable[..., Any]
    total: Tensor
    images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options: dict[str, Any] = {}
        self.add_state("total", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long, device="cpu"), dist_reduce_fx="sum")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch: what ``measure`` takes before its options."""
        self.add(self.measure(*args, **kwargs, **self.options))

    def add(self, values: PerImage) -> None:
        """Count one value for every image of a batch."""
        self.total += values.double().sum().to(self.total.device)
        self.images += len(values)

    def mean(self, total: Tensor | None = None) -> Float[Tensor, "..."]:
        """``total``, by default that of the values, by the number of images.

        Raises:
            ValueError: No image was seen; a figure of nothing would be NaN.
        """
        if not self.images:
            raise ValueError(f"{type(self).__name__} has seen no image; call update first")
        return ((self.total if total is None else total) / self.images).float()

    def compute(self) -> Any:
        """The mean over all images seen, on all processes.

        Raises:
            ValueError: No image was seen.
        """
        return self.mean()


class Pointing(ImageMean):
    """Mean of ``pointing``: how often the largest value lies on the mask.

    Example:
        >>> import torch
        >>> metric = Pointing()
        >>> metric.update(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[False, True]]]))
        >>> metric.update(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[True, False]]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    measure = staticmethod(localisation.pointing)


class Energy(ImageMean):
    """Mean of ``energy``: share of the positive relevance on the mask.

    Example:
        >>> import torch
        >>> Energy()(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[False, True]]]))
        tensor(0.7500)
    """

    measure = staticmethod(localisation.energy)


class _Cut(ImageMean):
    """Base of the metrics of a map cut at a threshold."""

    def __init__(self, threshold: Threshold = "mean", **kwargs: Any) -> None:
        if threshold not in ("mean", "best"):
            raise ValueError(f"threshold is {threshold!r}; expected 'mean' or 'best'")
        super().__init__(**kwargs)
        self.options = {"threshold": threshold}


class IoU(_Cut):
    """Mean of ``iou``; ``threshold`` is ``"mean"`` or ``"best"``.

    Example:
        >>> import torch
        >>> IoU("best")(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[False, True, True]]]))
        tensor(1.)
    """

    measure = staticmethod(overlap.iou)


class F1(_Cut):
    """Mean of ``f1``; ``threshold`` is ``"mean"`` or ``"best"``.

    Example:
        >>> import torch
        >>> F1()(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[False, True, True]]]))
        tensor(0.6667)
    """

    measure = staticmethod(overlap.f1)


class PixelAccuracy(_Cut):
    """Mean of ``pixel_accuracy``; ``threshold`` is ``"mean"`` or ``"best"``.

    Example:
        >>> import torch
        >>> PixelAccuracy()(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[False, True, True]]]))
        tensor(0.6667)
    """

    measure = staticmethod(overlap.pixel_accuracy)


class AveragePrecision(ImageMean):
    """Mean over the images of ``average_precision``.

    Example:
        >>> import torch
        >>> AveragePrecision()(torch.tensor([[[1.0, 3.0, 2.0]]]), torch.tensor([[[False, False, True]]]))
        tensor(0.5000)
    """

    measure = staticmethod(overlap.average_precision)


class AskedShare(ImageMean):
    """Mean of ``asked_share``: of the relevance on two objects, the share on the asked one.

    Example:
        >>> import torch
        >>> on, off = torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])
        >>> AskedShare()(torch.tensor([[[1.0, 3.0]]]), on, off)
        tensor(0.2500)
    """

    measure = staticmethod(localisation.asked_share)


class TwoObject(ImageMean):
    """Mean of ``two_object``: how often the asked object has more of the relevance than the other one.

    Example:
        >>> import torch
        >>> on, off = torch.tensor([[[True, False]]]), torch.tensor([[[False, True]]])
        >>> TwoObject()(torch.tensor([[[1.0, 1.0]]]), on, off)
        tensor(0.5000)
    """

    measure = staticmethod(localisation.two_object)


class GridShare(ImageMean):
    """Mean of ``grid_share``: the grid pointing game.

    Example:
        >>> import torch
        >>> GridShare(1, 2)(torch.tensor([[[3.0, 1.0]]]), 0)
        tensor(0.7500)
    """

    def __init__(self, rows: int, cols: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.cols = rows, cols

    def update(self, maps: Maps, cell: Classes) -> None:
        self.add(games.grid_share(maps, self.rows, self.cols, cell))


class MapCorrelation(ImageMean):
    """Mean of ``map_correlation``, for the randomisation check; lower is better.

    Example:
        >>> import torch
        >>> MapCorrelation(absolute=True)(torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[1.0, 2.0]]]))
        tensor(1.)
    """

    measure = staticmethod(agreement.map_correlation)
    higher_is_better = False
    plot_lower_bound = -1.0

    def __init__(self, absolute: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"absolute": absolute}


class Spearman(ImageMean):
    """Means of ``spearman`` and, beside it, of ``spearman_ceiling``: a dictionary ``spearman``, ``ceiling``.

    Example:
        >>> import torch
        >>> Spearman()(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[False, False, True, True]]]))
        {'spearman': tensor(0.8944), 'ceiling': tensor(0.8944)}
    """

    plot_lower_bound = -1.0
    ceilings: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("ceilings", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, maps: Maps, human: Shaped[Tensor, "batch height width"]) -> None:
        self.add(agreement.spearman(maps, human))
        self.ceilings += agreement.spearman_ceiling(human).double().sum().to(self.ceilings.device)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Both means over all images seen.

        Raises:
            ValueError: No image was seen.
        """
        return {"spearman": self.mean(), "ceiling": self.mean(self.ceilings)}


class Segmentation(ImageMean):
    """ImageNet-Segmentation's three figures: a dictionary ``pixel_accuracy``, ``mean_iou``, ``average_precision``.

    Pixel accuracy and mean IoU are accumulated over the set, average precision is the mean over the images.

    Example:
        >>> import torch
        >>> metric = Segmentation()
        >>> metric.update(torch.tensor([[[5.0, 4.0, 0.0, 1.0]]]), torch.tensor([[[1, 0, 0, 0]]]))
        >>> metric.compute()
        {'pixel_accuracy': tensor(0.7500), 'mean_iou': tensor(0.5833), 'average_precision': tensor(0.8542)}
    """

    correct: Tensor
    labelled: Tensor
    intersection: Tensor
    union: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, shape in (("correct", ()), ("labelled", ()), ("intersection", (2,)), ("union", (2,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.long, device="cpu"), dist_reduce_fx="sum")

    def update(self, maps: Maps, truth: Int[Tensor, "batch height width"]) -> None:
        counts = segmentation.segmentation_counts(maps, truth)
        self.add(segmentation.segmentation_average_precision(maps, truth))
        for name in ("correct", "labelled", "intersection", "union"):
            so_far: Tensor = getattr(self, name)
            setattr(self, name, so_far + getattr(counts, name).sum(0).to(so_far.device))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The three figures over all images seen.

        Raises:
            ValueError: No image was seen.
        """
        counts = segmentation.SegmentationCounts(self.correct, self.labelled, self.intersection[None], self.union[None])
        precision, summary = self.mean(), segmentation.segmentation_summary(counts)
        figures = {"pixel_accuracy": summary.pixel_accuracy, "mean_iou": summary.mean_iou}
        return {name: precision.new_tensor(value) for name, value in figures.items()} | {"average_precision": precision}
