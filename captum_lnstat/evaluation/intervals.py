"""Intervals and paired tests over images: the bootstrap, and the permutation of two methods' results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jaxtyping import Float64

Matrix = NDArray[np.float64]
RESAMPLES, PERMUTATIONS = 2000, 9999
_CHUNK = 4_000_000  # numbers of a resampling matrix in memory at once


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and the two-sided p-value of a test if there was one."""

    value: float
    low: float
    high: float
    p: float | None = None


class Ratios:
    r"""A quantity of a set of images, :math:`\frac1K \sum_k \frac{\sum_i a_{ik}}{\sum_i b_{ik}}`.

    A mean over images is the case ``K = 1``, ``b = 1``; pixel accuracy over a set has correct and labelled pixels;
    mIoU is the mean of two ratios, of the background's and of the object's intersection and union; MaxBoxAcc is the
    mean over IoUs of the largest of the ratios at all thresholds.

    Args:
        above: ``(image, part)``, :math:`a`.
        below: ``(image, part)``, :math:`b`; 0 where an image has no value, and then :math:`a` is 0 too.
        best_of: Of every so many parts, one after the other, the largest ratio counts.
    """

    def __init__(
        self, above: Float64[np.ndarray, "image part"], below: Float64[np.ndarray, "image part"], best_of: int = 1
    ) -> None:
        self.above, self.below, self.best_of = above, below, best_of

    def value(self, above: Matrix | None = None, below: Matrix | None = None) -> Matrix:
        """The quantity of the sums over images that are given, or of all images."""
        above = self.above.sum(0) if above is None else above
        below = self.below.sum(0) if below is None else below
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = above / below
            return np.asarray(ratios.reshape(*ratios.shape[:-1], -1, self.best_of).max(-1).mean(-1))


def bootstrap(quantities: Sequence[Ratios], seed: int, resamples: int = RESAMPLES) -> list[Estimate]:
    """Quantities of the same images with their percentile intervals; every resample is drawn once for all of them.

    Example:
        >>> values = np.arange(100.0)[:, None]
        >>> (found,) = bootstrap([Ratios(values, np.ones_like(values))], 0)
        >>> found.value, 43 < found.low < 45, 54 < found.high < 56
        (49.5, True, True)
    """
    if not quantities:
        return []
    drawn = _resampled(np.hstack([half for one in quantities for half in (one.above, one.below)]), seed, resamples)
    found = []
    for one, (above, below) in zip(quantities, _halves(quantities, drawn), strict=True):
        found.append(Estimate(float(one.value()), *_interval(one.value(above, below))))
    return found


def differences(
    pairs: Sequence[tuple[Ratios, Ratios]], seed: int, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS
) -> list[Estimate]:
    """The first quantity of every pair minus the second, of the same images in the same order.

    The interval resamples images, each with both of its results. The p-value is that of the permutation test: the
    share of exchanges of the two results of an image, each image's with probability 1/2, that give a difference at
    least as large.

    Example:
        >>> ones = np.ones((20, 1))
        >>> differences([(Ratios(ones * 0.75, ones), Ratios(ones * 0.5, ones))], 0)
        [Estimate(value=0.25, low=0.25, high=0.25, p=0.0001)]
    """
    if not pairs:
        return []
    quantities = [one for pair in pairs for one in pair]
    columns = np.hstack([half for one in quantities for half in (one.above, one.below)])
    drawn = _halves(quantities, _resampled(columns, seed, resamples))
    moved = np.hstack([half for a, b in pairs for half in (b.above - a.above, b.below - a.below)])
    extreme = np.zeros(len(pairs), np.int64)
    rng = np.random.default_rng(seed)
    for size in _sizes(permutations, len(moved)):
        swapped = rng.integers(0, 2, (size, len(moved)), np.int8).astype(np.float64) @ moved
        for place, ((a, b), (above, below)) in enumerate(
            zip(pairs, _halves([a for a, _ in pairs], swapped), strict=True)
        ):
            gaps = a.value(a.above.sum(0) + above, a.below.sum(0) + below)
            gaps = gaps - b.value(b.above.sum(0) - above, b.below.sum(0) - below)
            # Float error must not make the observed difference itself look rare.
            extreme[place] += int((np.abs(gaps) >= abs(float(a.value() - b.value())) - 1e-12).sum())
    found = []
    for place, (a, b) in enumerate(pairs):
        low, high = _interval(a.value(*drawn[2 * place]) - b.value(*drawn[2 * place + 1]))
        p = (1 + int(extreme[place])) / (permutations + 1)
        found.append(Estimate(float(a.value() - b.value()), low, high, p))
    return found


def _halves(quantities: Sequence[Ratios], columns: Matrix) -> list[tuple[Matrix, Matrix]]:
    """The columns of every quantity, what is above and what is below."""
    found, start = [], 0
    for one in quantities:
        parts = one.above.shape[1]
        found.append((columns[:, start : start + parts], columns[:, start + parts : start + 2 * parts]))
        start += 2 * parts
    return found


def _resampled(columns: Matrix, seed: int, resamples: int) -> Matrix:
    """Sums of the columns over images drawn with replacement, one row a draw."""
    count, rng, rows = len(columns), np.random.default_rng(seed), []
    for size in _sizes(resamples, count):
        drawn = rng.integers(0, count, (size, count))
        times = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)
        rows.append(times @ columns)
    return np.vstack(rows)


def _sizes(total: int, count: int) -> list[int]:
    step = max(1, _CHUNK // max(count, 1))
    return [min(step, total - start) for start in range(0, total, step)]


def _interval(values: Matrix) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
