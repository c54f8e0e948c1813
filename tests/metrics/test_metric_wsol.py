"""MaxBoxAcc against a loop over thresholds, pixels and boxes, and as a metric of a run."""

import itertools

import numpy as np
import pytest
import torch
from helpers.metric_harness import boxes, maps

from captum_lnstat.evaluation.intervals import Ratios, bootstrap
from captum_lnstat.evaluation.measures import build
from captum_lnstat.metrics import box_hits, max_box_accuracy


def components(above):
    """Sets of pixels that touch, by growing each from one pixel."""
    left = {tuple(place) for place in np.argwhere(above)}
    while left:
        found, edge = set(), {left.pop()}
        while edge:
            found |= edge
            near = {(y + a, x + b) for (y, x), a, b in itertools.product(edge, (-1, 0, 1), (-1, 0, 1))}
            edge = near & left
            left -= edge
        yield found


def best_iou(values, threshold, truth):
    if values.max() == values.min():
        return 0.0
    scaled = (values - values.min()) / (values.max() - values.min())
    best = 0.0
    for pixels in components(scaled >= threshold):
        ys, xs = zip(*pixels, strict=True)
        mine = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        for other in truth.tolist():
            wide = max(0, min(mine[2], other[2]) - max(mine[0], other[0]))
            tall = max(0, min(mine[3], other[3]) - max(mine[1], other[1]))
            areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (mine, other))
            best = max(best, wide * tall / (areas - wide * tall))
    return best


def lumpy():
    """Maps with several parts, and one that is flat."""
    rng = np.random.default_rng(3)
    values = rng.random((12, 9, 11)) ** 3
    values[5] = 0.25
    found = [torch.tensor([[1, 1, 5, 6], [6, 2, 10, 8]])[: 1 + index % 2] for index in range(12)]
    return torch.from_numpy(values), found


def test_hits_and_their_best_threshold_are_the_loops():
    values, truth = lumpy()
    hits = box_hits(values, truth, steps=25)
    assert hits.shape == (12, 3, 25)
    expected = np.array(
        [[best_iou(v, k / 25, t) for k in range(25)] for v, t in zip(values.numpy(), truth, strict=True)]
    )
    for place, iou in enumerate((0.3, 0.5, 0.7)):
        assert (hits[:, place].numpy() == (expected >= iou)).all()
    assert not hits[5].any()  # the flat map
    found = max_box_accuracy(hits)
    accuracies = [(expected >= iou).mean(0).max() for iou in (0.3, 0.5, 0.7)]
    assert found.accuracies == pytest.approx(tuple(accuracies))
    assert found.value == pytest.approx(np.mean(accuracies))
    for place, (iou, threshold) in enumerate(zip((0.3, 0.5, 0.7), found.thresholds, strict=True)):
        assert (expected >= iou).mean(0)[round(threshold * 25)] == pytest.approx(accuracies[place])
    assert 0 < found.value < 1
    assert len({round(one, 6) for one in found.accuracies}) > 1


def test_a_method_is_not_better_for_its_scale():
    values, truth = lumpy()
    assert torch.equal(box_hits(values * 7 - 3, truth, steps=10), box_hits(values, truth, steps=10))


def test_a_part_that_is_not_the_largest_counts_too():
    values = torch.tensor([[[1.0, 0, 1, 1, 1]]])
    assert box_hits(values, [torch.tensor([[0, 0, 1, 1]])], ious=(1.0,), steps=2)[0, 0].tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ious": (0.5, 0)}, "ious is"),
        ({"ious": ()}, "ious is"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.0}, "steps is 2.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        box_hits(maps(), boxes(), **options)


def test_no_image_and_no_box_are_refused():
    with pytest.raises(ValueError, match="one image or more"):
        max_box_accuracy(torch.zeros(0, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="Leave out images without a box"):
        box_hits(maps()[:1], [torch.zeros(0, 4)])


def test_the_best_threshold_is_chosen_anew_in_every_resample():
    values, truth = lumpy()
    hits = box_hits(values, truth, steps=6).double().flatten(1).numpy()
    (found,) = bootstrap([Ratios(hits, np.ones_like(hits), 6)], 5, 200)
    assert found.value == pytest.approx(max_box_accuracy(box_hits(values, truth, steps=6)).value)
    drawn = np.random.default_rng(5).integers(0, 12, (200, 12))
    every = [np.mean([hits[row].mean(0)[6 * k : 6 * k + 6].max() for k in range(3)]) for row in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])))


def test_the_metric_of_a_run_has_a_column_for_every_iou_and_threshold():
    (measure,) = build("maxbox(steps=4)")
    (quantity,) = measure.quantities
    assert len(quantity.parts) == 12
    assert quantity.best_of == 4
    assert quantity.parts[5] == ("maxbox(steps=4).0.5.1", None)
