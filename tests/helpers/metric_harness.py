"""The measures of maps, each with an independent reference that knows one image at a time, in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage, stats
from sklearn import metrics as sk
from torch import Tensor

from captum_lnstat import metrics

HEIGHT, WIDTH = 6, 8


def maps() -> Tensor:
    """Distinct values, many ties, a flat map, nothing positive, nothing negative, two values only."""
    random = torch.Generator().manual_seed(3)
    values = torch.randn(6, HEIGHT, WIDTH, generator=random)
    values[1] = values[1].round()
    values[2] = 0.3
    values[3] = -values[3].abs() - 0.1
    values[4] = values[4].abs()
    values[5] = (values[5] > 0.4).float() * 0.7
    # As few digits as a half type keeps, so that the same maps can be given in every type.
    return values.bfloat16().float()


def masks(shift: int = 0) -> Tensor:
    """A box, noise, a box, a full mask, an empty mask, one pixel."""
    random = torch.Generator().manual_seed(7 + shift)
    found = torch.zeros(6, HEIGHT, WIDTH, dtype=torch.bool)
    found[0, 1:4, 2 + shift : 5 + shift] = True
    found[1] = torch.rand(HEIGHT, WIDTH, generator=random) > 0.6
    found[2, :2] = True
    found[3] = True
    found[5, 3, 4 + shift] = True
    return found


def truths() -> Tensor:
    """Labels 1, 0 and -1; one image without an object, one without background."""
    random = torch.Generator().manual_seed(11)
    found = torch.randint(-1, 2, (6, HEIGHT, WIDTH), generator=random)
    found[3] = 1
    found[4] = found[4].clamp(max=0)
    return found


def annotations() -> Tensor:
    random = torch.Generator().manual_seed(13)
    graded = torch.randint(0, 6, (6, HEIGHT, WIDTH), generator=random).float() / 5
    graded[4] = torch.randn(HEIGHT, WIDTH, generator=random)
    return graded


def boxes() -> list[Tensor]:
    two = torch.tensor([[0, 0, 3, 3], [4, 2, 8, 6]])
    return [two, two[1:], two, two[:1] + 1, torch.tensor([[0.5, 0.25, 7.0, 5.5]]), two]


def _mean(values: np.ndarray) -> float:
    return math.fsum(values.ravel()) / values.size


def pointing(values: np.ndarray, mask: np.ndarray) -> float:
    best = [place for place in np.ndindex(values.shape) if values[place] == values.max()]
    return sum(bool(mask[place]) for place in best) / len(best)


def energy(values: np.ndarray, mask: np.ndarray) -> float:
    on = math.fsum(max(v, 0.0) for v, m in zip(values.flat, mask.flat, strict=True) if m)
    everywhere = math.fsum(max(v, 0.0) for v in values.flat)
    return on / everywhere if everywhere else mask.mean()


def asked_share(values: np.ndarray, asked: np.ndarray, other: np.ndarray) -> float:
    first, second = (math.fsum(max(v, 0.0) for v in values[mask]) for mask in (asked, other))
    return first / (first + second) if first + second else 0.5


def two_object(values: np.ndarray, asked: np.ndarray, other: np.ndarray) -> float:
    first, second = (math.fsum(max(v, 0.0) for v in values[mask]) for mask in (asked, other))
    return 1.0 if first > second else 0.5 if first == second else 0.0


def cut(score: Callable[..., float], threshold: str, values: np.ndarray, mask: np.ndarray) -> float:
    """Scikit-learn's score at the mean, or the best of it at every value and above them all."""
    if threshold == "mean":
        return float(score(mask.ravel(), values.ravel() > _mean(values)))
    candidates = [values >= level for level in np.unique(values)] + [np.zeros(values.shape, bool)]
    return max(float(score(mask.ravel(), candidate.ravel())) for candidate in candidates)


def average_precision(values: np.ndarray, mask: np.ndarray) -> float:
    with warnings.catch_warnings():  # it says that there is no positive, and gives 0
        warnings.filterwarnings("ignore", "No positive class found")
        return float(sk.average_precision_score(mask.ravel(), values.ravel()))


def box_iou(values: np.ndarray, truth: np.ndarray) -> float:
    """By scipy's labels, and by counting quarter pixels."""
    if values.max() == values.min():
        return 0.0
    scaled = (values - values.min()) / (values.max() - values.min())
    labels, count = ndimage.label(scaled >= 0.5, structure=np.ones((3, 3)))
    sizes = [(labels == index + 1).sum() for index in range(count)]
    rows, cols = ndimage.find_objects(labels)[int(np.argmax(sizes))]

    def area(box: tuple[float, float, float, float]) -> np.ndarray:
        x, y = (np.arange(WIDTH * 4) + 0.5) / 4, (np.arange(HEIGHT * 4) + 0.5) / 4
        left, top, right, bottom = box
        return ((x > left) & (x < right))[None] & ((y > top) & (y < bottom))[:, None]

    mine = area((cols.start, rows.start, cols.stop, rows.stop))
    return max((mine & area(tuple(box))).sum() / (mine | area(tuple(box))).sum() for box in truth)


def segmentation_ap(values: np.ndarray, truth: np.ndarray) -> float:
    span = values.max() - values.min()
    scaled = (values - values.min()) / span if span else values * 0
    scores, labels = np.stack([1 - scaled, scaled]), np.stack([truth == 0, truth == 1])
    counted = np.stack([truth != -1] * 2)
    return float(sk.average_precision_score(labels[counted], scores[counted]))


def spearman(a: np.ndarray, b: np.ndarray, absolute: bool = False) -> float:
    if absolute:
        a, b = abs(a), abs(b)
    if a.max() == a.min():
        return 0.0  # scipy gives NaN
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)


def grid_share(values: np.ndarray, cell: int) -> float:
    row, col = divmod(cell, 2)
    positive = np.maximum(values, 0)
    part = positive[row * 2 : row * 2 + 2, col * 4 : col * 4 + 4].sum()
    return part / positive.sum() if positive.sum() else 1 / 6


@dataclass(frozen=True, eq=False)
class Case:
    """A measure, its class, what it takes beside the maps, and its reference."""

    function: Callable[..., Tensor]
    reference: Callable[..., float]
    others: tuple[Any, ...]
    name: str  # of the class
    options: dict[str, Any] = field(default_factory=dict)
    key: str | None = None  # in what the class computes

    def chosen(self, places: list[int]) -> tuple[Any, ...]:
        """The arguments for some of the images."""
        return tuple(
            [other[i] for i in places] if isinstance(other, list) else other[places] for other in (maps(), *self.others)
        )

    def metric(self) -> Any:
        return getattr(metrics, self.name)(**self.options)


def _thresholded(function: Callable[..., Tensor], score: Callable[..., float], name: str, threshold: Any) -> Case:
    reference = partial(cut, score, threshold)
    return Case(partial(function, threshold=threshold), reference, (masks(),), name, {"threshold": threshold})


_jaccard = partial(sk.jaccard_score, zero_division=0)
_f1 = partial(sk.f1_score, zero_division=0)

CASES = {
    "pointing": Case(metrics.pointing, pointing, (masks(),), "Pointing"),
    "energy": Case(metrics.energy, energy, (masks(),), "Energy"),
    "asked_share": Case(metrics.asked_share, asked_share, (masks(), masks(1)), "AskedShare"),
    "two_object": Case(metrics.two_object, two_object, (masks(), masks(1)), "TwoObject"),
    "iou, mean": _thresholded(metrics.iou, _jaccard, "IoU", "mean"),
    "iou, best": _thresholded(metrics.iou, _jaccard, "IoU", "best"),
    "f1, mean": _thresholded(metrics.f1, _f1, "F1", "mean"),
    "f1, best": _thresholded(metrics.f1, _f1, "F1", "best"),
    "accuracy, mean": _thresholded(metrics.pixel_accuracy, sk.accuracy_score, "PixelAccuracy", "mean"),
    "accuracy, best": _thresholded(metrics.pixel_accuracy, sk.accuracy_score, "PixelAccuracy", "best"),
    "average_precision": Case(metrics.average_precision, average_precision, (masks(),), "AveragePrecision"),
    "box_iou": Case(metrics.box_iou, box_iou, (boxes(),), "BoxIoU"),
    "segmentation": Case(
        metrics.segmentation_average_precision, segmentation_ap, (truths(),), "Segmentation", key="average_precision"
    ),
    "spearman": Case(metrics.spearman, spearman, (annotations(),), "Spearman", key="spearman"),
    "map_correlation": Case(metrics.map_correlation, spearman, (annotations(),), "MapCorrelation"),
    "map_correlation, absolute": Case(
        partial(metrics.map_correlation, absolute=True),
        partial(spearman, absolute=True),
        (annotations() - 0.5,),
        "MapCorrelation",
        {"absolute": True},
    ),
    "grid_share": Case(
        lambda maps, cell: metrics.grid_share(maps, 3, 2, cell),
        lambda values, cell: grid_share(values, int(cell)),
        (torch.tensor([0, 1, 2, 3, 4, 5]),),
        "GridShare",
        {"rows": 3, "cols": 2},
    ),
}


@cache
def expected(case: Case) -> list[float]:
    """The reference, image by image."""
    found = []
    for arguments in zip(maps(), *case.others, strict=True):
        one = [np.asarray(argument) for argument in arguments]
        found.append(case.reference(one[0].astype(np.float64), *one[1:]))
    return found
