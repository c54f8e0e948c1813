"""Every measure of maps against its reference, whatever the batch, the type and the degenerate maps and masks."""

import pytest
import torch
from helpers.metric_harness import CASES, expected, maps

EVERY = [0, 1, 2, 3, 4, 5]
case_of = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@case_of
def test_it_equals_its_reference(case):
    values = case.function(*case.chosen(EVERY))
    assert values.shape == (6,)
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx(expected(case), abs=1e-6)


@case_of
def test_maps_in_float64_are_measured_in_float64(case):
    first, *others = case.chosen(EVERY)
    values = case.function(first.double(), *others)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected(case), abs=1e-12)


@case_of
def test_a_batch_is_its_images(case):
    alone = torch.cat([case.function(*case.chosen([place])) for place in EVERY])
    assert torch.equal(case.function(*case.chosen(EVERY)), alone)
    assert torch.equal(case.function(*case.chosen([4, 0])), alone[[4, 0]])
    assert case.function(*case.chosen([])).shape == (0,)


@case_of
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_nothing_more(case, dtype):
    first, *others = case.chosen(EVERY)
    narrow = first.to(dtype)
    values = case.function(narrow, *others)
    assert values.dtype == torch.float32
    assert torch.equal(values, case.function(narrow.float(), *others))


@case_of
def test_neither_order_nor_place_of_the_map_in_memory_counts(case):
    first, *others = case.chosen(EVERY)
    strided = first.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    before = strided.clone()
    assert torch.equal(case.function(strided, *others), case.function(first, *others))
    assert torch.equal(strided, before)


@case_of
def test_what_is_no_map_is_refused(case):
    first, *others = case.chosen(EVERY)
    for bad in (float("nan"), float("inf")):
        broken = first.clone()
        broken[4, 1, 1] = bad
        with pytest.raises(ValueError, match=r"NaN or infinite \(the first is in image 4\)"):
            case.function(broken, *others)
    with pytest.raises(ValueError, match="expected"):
        case.function(first[:, None], *others)
    with pytest.raises(TypeError, match="expected a floating tensor"):
        case.function(first.long(), *others)
    with pytest.raises(ValueError, match="expected"):
        case.function(first[:5], *others)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("box_iou", "grid_share")])
def test_another_size_is_refused(name):
    first, *others = CASES[name].chosen(EVERY)
    with pytest.raises(ValueError, match="expected both"):
        CASES[name].function(first[:, :-1], *others)


@pytest.mark.parametrize("name", CASES)
def test_scale_does_not_count(name):
    first, *others = CASES[name].chosen(EVERY)
    assert torch.equal(CASES[name].function(first * 4, *others), CASES[name].function(first, *others))


def test_a_flat_map_has_nothing_above_its_mean_in_any_type():
    # The sum of nine times .1 is rounded, and the mean of a flat float64 map falls below its value.
    from captum_lnstat.metrics import iou, segmentation_counts

    flat, on = torch.full((1, 3, 3), 0.1, dtype=torch.float64), torch.ones(1, 3, 3, dtype=torch.bool)
    assert (flat > flat.mean()).any()
    for values in (flat, flat * 7, flat.float(), flat.half(), maps()[2:3, :3, :3]):
        assert iou(values, on).item() == 0
        assert segmentation_counts(values, on).intersection.tolist() == [[0, 0]]
