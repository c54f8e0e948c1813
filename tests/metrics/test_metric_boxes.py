import numpy as np
import pytest
import torch
from scipy import ndimage

from captum_lnstat.metrics import box_iou, top1_localisation
from captum_lnstat.metrics.boxes import component_boxes

PEAK = torch.tensor([[[0.0, 2.0, 3.0, 0.1]]])
WHOLE = [torch.tensor([[1, 0, 3, 1]])]


def test_the_largest_component_is_scipys():
    random = torch.Generator().manual_seed(1)
    above = torch.rand(40, 9, 11, generator=random) > torch.linspace(0.1, 1, 40)[:, None, None]
    # A spiral: one component whose ends are far apart along it.
    above[0] = False
    above[0, 0], above[0, :, -1], above[0, -1], above[0, 2:, 0], above[0, 2, :-2] = True, True, True, True, True
    found = component_boxes(above)
    for mask, box in zip(above.numpy(), found.tolist(), strict=True):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        if not count:
            assert box == [0, 0, 0, 0]
            continue
        sizes = [(labels == index + 1).sum() for index in range(count)]
        rows, cols = ndimage.find_objects(labels)[int(np.argmax(sizes))]
        assert box == [cols.start, rows.start, cols.stop, rows.stop]


def test_a_component_does_not_go_around_the_edge():
    mask = torch.tensor([[[True, False, False, True], [True, False, False, False]]])
    assert component_boxes(mask).tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize(("threshold", "value"), [(0.5, 1.0), (0.7, 0.5), (1.0, 0.5), (0.01, 2 / 3)])
def test_the_threshold_is_a_share_of_the_maps_range(threshold, value):
    assert box_iou(PEAK * 7 - 3, WHOLE, threshold).tolist() == pytest.approx([value])


def test_top1_needs_the_class_and_the_box():
    far = [torch.tensor([[3, 0, 4, 1]])]
    half = [torch.tensor([[2, 0, 3, 1]])]  # IoU of exactly one half
    assert top1_localisation(PEAK, WHOLE, 3, 3).tolist() == [1]
    assert top1_localisation(PEAK, half, [3], torch.tensor([3])).tolist() == [1]
    assert top1_localisation(PEAK, far, 3, 3).tolist() == [0]
    assert top1_localisation(PEAK, WHOLE, 3, 4).tolist() == [0]


def test_boxes_are_checked():
    with pytest.raises(ValueError, match="boxes has 2 entries for 1 maps"):
        box_iou(PEAK, WHOLE * 2)
    with pytest.raises(ValueError, match="Leave out images without a box"):
        box_iou(PEAK, [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match="right > left"):
        box_iou(PEAK, [torch.tensor([[3, 0, 1, 1]])])
    with pytest.raises(ValueError, match="threshold is 0"):
        box_iou(PEAK, WHOLE, 0)
