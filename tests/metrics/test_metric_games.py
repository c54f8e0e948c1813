import pytest
import torch

from captum_lnstat.metrics import grid_mosaic, grid_share


def test_a_cell_of_the_mosaic_is_the_cell_of_the_map():
    images = torch.rand(2, 6, 3, 4, 5)
    mosaic = grid_mosaic(images, 2, 3)
    assert mosaic.shape == (2, 3, 8, 15)
    for cell in range(6):
        row, col = divmod(cell, 3)
        assert torch.equal(mosaic[:, :, row * 4 : row * 4 + 4, col * 5 : col * 5 + 5], images[:, cell])
    only = torch.zeros(2, 6, 3, 4, 5)
    only[0, 4], only[1, 2] = 1, 1
    assert grid_share(grid_mosaic(only, 2, 3).sum(1), 2, 3, [4, 2]).tolist() == [1, 1]


def test_a_map_without_positive_values_is_at_chance():
    assert grid_share(-torch.ones(1, 4, 6), 2, 3, 0).tolist() == pytest.approx([1 / 6])


def test_grids_are_checked():
    with pytest.raises(ValueError, match=r"expected \(batch, 6"):
        grid_mosaic(torch.rand(2, 5, 3, 4, 5), 2, 3)
    with pytest.raises(ValueError, match="expected multiples"):
        grid_share(torch.rand(1, 5, 6), 2, 3, 0)
    with pytest.raises(ValueError, match="cell is 6"):
        grid_share(torch.rand(1, 4, 6), 2, 3, 6)
    with pytest.raises(ValueError, match="two cells or more"):
        grid_share(torch.rand(1, 4, 6), 1, 1, 0)
