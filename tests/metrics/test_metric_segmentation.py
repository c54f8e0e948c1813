import numpy as np
import pytest
import torch
from helpers.metric_harness import maps, truths
from sklearn import metrics as sk

from captum_lnstat.metrics import segmentation_average_precision, segmentation_counts, segmentation_summary


def test_the_sums_are_those_of_a_confusion_matrix_over_the_set():
    called = maps().double() > maps().double().mean((1, 2), keepdim=True)
    called[2] = False
    counted = truths() != -1
    table = sk.confusion_matrix(truths()[counted], called[counted].long())
    summary = segmentation_summary(segmentation_counts(maps(), truths()))
    assert summary.pixel_accuracy == pytest.approx(np.trace(table) / table.sum())
    iou = np.diag(table) / (table.sum(0) + table.sum(1) - np.diag(table))
    assert summary.iou == pytest.approx(tuple(iou))
    assert summary.mean_iou == pytest.approx(iou.mean())


def test_the_set_is_summed_before_dividing_and_any_split_is_the_same():
    counts = segmentation_counts(maps(), truths())
    parts = [segmentation_counts(maps()[a:b], truths()[a:b]) for a, b in ((0, 1), (1, 5), (5, 6))]
    assert segmentation_summary(parts) == segmentation_summary(counts)
    means = (counts.intersection.double() / counts.union.clamp(min=1)).mean(0)
    assert segmentation_summary(counts).iou != pytest.approx(tuple(means.tolist()), abs=1e-3)


def test_ignored_pixels_do_not_count():
    values, truth = maps()[:1].clone(), truths()[:1]
    counts, precision = segmentation_counts(values, truth), segmentation_average_precision(values, truth)
    hidden = (truth == -1).nonzero()
    # Not the extremes nor across the mean: those set the scale and the threshold for the whole image.
    middle = [tuple(place) for place in hidden.tolist() if 0 < float(values[tuple(place)]) < 1]
    assert len(middle) > 1
    values[middle[0]], values[middle[1]] = values[middle[1]].clone(), values[middle[0]].clone()
    again = segmentation_counts(values, truth)
    assert again.correct.equal(counts.correct)
    assert again.union.equal(counts.union)
    assert segmentation_average_precision(values, truth).equal(precision)


def test_labels_are_checked():
    with pytest.raises(ValueError, match="truth has the label 2"):
        segmentation_counts(maps(), truths().clamp(min=0) * 2)
    with pytest.raises(ValueError, match="truth has the label 255"):
        segmentation_counts(maps(), torch.full_like(truths(), 255).byte())
    with pytest.raises(TypeError, match="expected whole numbers"):
        segmentation_average_precision(maps(), truths().float())
    nothing = truths().clone()
    nothing[3] = -1
    with pytest.raises(ValueError, match="truth of image 3 has no labelled pixel"):
        segmentation_average_precision(maps(), nothing)
    with pytest.raises(ValueError, match="no image has a labelled pixel"):
        segmentation_summary(segmentation_counts(maps(), torch.full_like(truths(), -1)))


def test_a_mask_of_bool_is_a_truth():
    as_bool, as_long = segmentation_counts(maps(), truths() == 1), segmentation_counts(maps(), (truths() == 1).long())
    assert as_bool.union.equal(as_long.union)
    assert as_bool.correct.equal(as_long.correct)
