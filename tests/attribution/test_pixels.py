"""From grids to pixels: the sum stays, and bilinear is bilinear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from captum_lnstat.attribution.pixels import check_interpolation, to_pixels

SIZES = [
    # grid, patch, image
    ((4, 4), (8, 8), (32, 32)),
    ((3, 5), (4, 2), (12, 10)),
    ((5, 4), (8, 8), (37, 26)),
    ((5, 4), (8, 8), (33, 32)),
    ((1, 1), (16, 16), (9, 16)),
    ((1, 3), (14, 14), (14, 42)),
    ((2, 2), (1, 1), (2, 2)),
]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("grid", "patch", "image"), SIZES)
def test_the_sum_stays(grid, patch, image, mode):
    relevance = torch.randn(3, *grid, dtype=torch.float64)
    pixels = to_pixels(relevance, image, patch, mode)
    assert pixels.shape == (3, *image)
    assert torch.allclose(pixels.sum((1, 2)), relevance.sum((1, 2)), atol=1e-12)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("grid", "patch", "image"), SIZES)
def test_the_sum_of_each_patch_stays(grid, patch, image, mode):
    for cell in range(grid[0] * grid[1]):
        relevance = torch.zeros(1, grid[0] * grid[1], dtype=torch.float64)
        relevance[0, cell] = 1
        pixels = to_pixels(relevance.reshape(1, *grid), image, patch, mode)
        assert float(pixels.sum()) == pytest.approx(1, abs=1e-12)
        assert float(pixels.min()) >= 0


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_pixels_that_no_patch_covers_get_nothing(mode):
    # A 70 px image in patches of 16: the patch embedding never reads the last 6 rows and columns.
    relevance = torch.rand(2, 4, 4, dtype=torch.float64)
    pixels = to_pixels(relevance, (70, 67), (16, 16), mode)
    assert pixels.shape == (2, 70, 67)
    assert torch.allclose(pixels[:, :64, :64], to_pixels(relevance, (64, 64), (16, 16), mode))
    assert float(pixels[:, 64:].abs().sum()) == float(pixels[:, :, 64:].abs().sum()) == 0


@pytest.mark.parametrize(("grid", "patch"), [((4, 4), (8, 8)), ((3, 5), (4, 2)), ((7, 7), (14, 14)), ((1, 3), (5, 5))])
def test_bilinear_is_torchs_for_whole_patches(grid, patch):
    relevance = torch.randn(2, *grid, dtype=torch.float64)
    image = (grid[0] * patch[0], grid[1] * patch[1])
    expected = F.interpolate(relevance[:, None], image, mode="bilinear", align_corners=False)[:, 0]
    found = to_pixels(relevance, image, patch) * patch[0] * patch[1]
    assert torch.allclose(found, expected, atol=1e-12)


def test_nearest_spreads_evenly_over_the_patch():
    relevance = torch.tensor([[[6.0, 12.0], [18.0, 24.0]]])
    expected = relevance.repeat_interleave(2, 1).repeat_interleave(3, 2) / 6
    assert torch.allclose(to_pixels(relevance, (4, 6), (2, 3), "nearest"), expected)


def test_nearest_leaves_a_cut_patch_on_the_pixels_that_exist():
    found = to_pixels(torch.tensor([[[4.0, 8.0]]]), (2, 3), (2, 2), "nearest")
    assert torch.allclose(found, torch.tensor([[[1.0, 1.0, 4.0], [1.0, 1.0, 4.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    assert to_pixels(torch.rand(1, 2, 2, dtype=dtype), (4, 4), (2, 2)).dtype == dtype


def test_unknown_interpolation_is_refused():
    check_interpolation("bilinear")
    with pytest.raises(ValueError, match="bicubic"):
        check_interpolation("bicubic")
