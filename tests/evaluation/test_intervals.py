"""Intervals and tests against what theory and slow loops say."""

import itertools

import numpy as np
import pytest

from captum_lnstat.evaluation.intervals import Ratios, bootstrap, differences


def mean_of(values):
    column = np.asarray(values, np.float64)[:, None]
    return Ratios(column, np.ones_like(column))


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(3, 2, 500)
    (found,) = bootstrap([mean_of(values)], 0, 4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_ratios_are_resampled_as_ratios():
    """Against a loop: the mean of two ratios of sums over the images of a draw, never a mean of ratios."""
    rng = np.random.default_rng(2)
    below = rng.integers(1, 100, (40, 2)).astype(float)
    above = np.floor(below * rng.random((40, 2)))
    (found,) = bootstrap([Ratios(above, below)], 5, 300)
    drawn = np.random.default_rng(5).integers(0, 40, (300, 40))
    values = [
        (above[row, 0].sum() / below[row, 0].sum() + above[row, 1].sum() / below[row, 1].sum()) / 2 for row in drawn
    ]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert found.value == pytest.approx(np.mean(above.sum(0) / below.sum(0)))
    assert abs(found.value - (above / below).mean()) > 1e-3


def test_images_without_a_value_do_not_count():
    full = mean_of([1.0, 2.0, 6.0])
    holed = Ratios(np.array([[1.0], [0.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [1.0], [1.0]]))
    assert holed.value() == full.value() == 3


def test_the_p_value_is_that_of_all_exchanges():
    rng = np.random.default_rng(3)
    one, two = rng.normal(0.6, 1, 10), rng.normal(0, 1, 10)
    gaps = one - two
    every = [abs(np.dot(signs, gaps)) for signs in itertools.product((1, -1), repeat=10)]
    exact = np.mean(np.array(every) >= abs(gaps.sum()) - 1e-12)
    assert 0.01 < exact < 0.6
    (found,) = differences([(mean_of(one), mean_of(two))], 0)
    assert found.value == pytest.approx(gaps.mean())
    assert found.p == pytest.approx(exact, abs=0.02)


def test_the_p_value_of_ratios_is_that_of_all_exchanges():
    rng = np.random.default_rng(4)
    below = rng.integers(5, 50, (8, 1)).astype(float)
    one, two = (np.floor(below * rng.random((8, 1))) for _ in range(2))
    observed = abs(one.sum() - two.sum()) / below.sum()
    every = []
    for swap in itertools.product((False, True), repeat=8):
        kept = np.array(swap)[:, None]
        every.append(abs(np.where(kept, two, one).sum() - np.where(kept, one, two).sum()) / below.sum())
    (found,) = differences([(Ratios(one, below), Ratios(two, below))], 0)
    assert found.p == pytest.approx(np.mean(np.array(every) >= observed - 1e-12), abs=0.02)


def test_pairing_counts():
    """A small difference that every image has is sure; the two intervals alone would overlap."""
    values = np.random.default_rng(0).normal(0, 5, 60)
    above, below = mean_of(values + 0.1), mean_of(values)
    (found,) = differences([(above, below)], 0)
    assert found.p == 0.0001
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    alone = bootstrap([above, below], 0)
    assert alone[0].low < alone[1].high


def test_quantities_do_not_disturb_each_other():
    a, b = mean_of(range(20)), mean_of(np.arange(20.0) ** 2)
    assert bootstrap([a, b], 1) == [*bootstrap([a], 1), *bootstrap([b], 1)]
    assert differences([(a, b), (b, a)], 1)[1] == differences([(b, a)], 1)[0]
    assert bootstrap([a], 1) != bootstrap([a], 2)
