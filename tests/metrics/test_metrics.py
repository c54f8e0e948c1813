import pytest
import torch

from captum_lnstat.metrics import asked_share, energy, iou, pointing

# One 2 x 3 map whose object is its left column.
MAP = torch.tensor([[[4.0, 1.0, 0.0], [3.0, -2.0, 0.0]]])
LEFT = torch.tensor([[[True, False, False], [True, False, False]]])
RIGHT = torch.tensor([[[False, False, True], [False, False, True]]])
MIDDLE = torch.tensor([[[False, True, False], [False, True, False]]])


def test_pointing_asks_for_the_largest_value_only():
    assert pointing(MAP, LEFT).tolist() == [1.0]
    assert pointing(MAP, MIDDLE).tolist() == [0.0]


def test_pointing_shares_a_tie():
    flat = torch.ones(1, 2, 3)
    assert pointing(flat, LEFT).tolist() == pytest.approx([1 / 3])


def test_energy_is_the_positive_share():
    assert energy(MAP, LEFT).tolist() == pytest.approx([7 / 8])
    assert energy(MAP, MIDDLE).tolist() == pytest.approx([1 / 8])


def test_energy_of_a_map_without_positive_values_is_chance():
    assert energy(-MAP.abs(), LEFT).tolist() == pytest.approx([1 / 3])


def test_iou_thresholds_at_the_mean_of_each_map():
    # The mean of MAP is 1: only the left column is above it. Another image in the batch must not matter.
    both = torch.cat([MAP, MAP + 100.0])
    assert iou(both, LEFT.expand(2, -1, -1)).tolist() == [1.0, 1.0]
    assert iou(MAP, MIDDLE).tolist() == [0.0]


def test_asked_share_compares_the_two_objects_only():
    assert asked_share(MAP, LEFT, MIDDLE).tolist() == pytest.approx([7 / 8])
    assert asked_share(MAP, MIDDLE, LEFT).tolist() == pytest.approx([1 / 8])
    assert asked_share(MAP * 0, LEFT, RIGHT).tolist() == [0.5]


@pytest.mark.parametrize("measure", [pointing, energy, iou])
def test_shapes_and_dtypes_are_checked(measure):
    with pytest.raises(ValueError, match=r"expected both \(batch, height, width\)"):
        measure(MAP[0], LEFT[0])
    with pytest.raises(TypeError, match="expected bool"):
        measure(MAP, LEFT.float())
