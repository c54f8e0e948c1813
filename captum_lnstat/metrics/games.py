"""The grid pointing game: several images in one, and whether the map of a class lies on its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from captum_lnstat.metrics.checks import check_maps, result_dtype, share_of
from captum_lnstat.metrics.targets import Classes, class_indices

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.metrics.shapes import Maps, PerImage


def _check_grid(rows: int, cols: int) -> None:
    if rows < 1 or cols < 1 or rows * cols < 2:
        raise ValueError(f"the grid is {rows} x {cols}; expected two cells or more")


def grid_mosaic(
    images: Float[Tensor, "batch cell channel height width"], rows: int, cols: int
) -> Float[Tensor, "batch channel mosaic_height mosaic_width"]:
    """Images put side by side, row by row: cell ``r * cols + c`` is in row r and column c.

    The cells keep their size, so the mosaic is larger than the model's usual input: shrink the images first for a
    model that takes one size only.

    Args:
        images: ``rows * cols`` images for every mosaic, usually of different classes.
        rows: Rows of cells.
        cols: Columns of cells.

    Example:
        >>> import torch
        >>> grid_mosaic(torch.arange(4.0).view(1, 4, 1, 1, 1), 2, 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    _check_grid(rows, cols)
    if images.dim() != 5 or images.shape[1] != rows * cols:
        raise ValueError(
            f"images has shape {tuple(images.shape)} for a grid of {rows} x {cols}; expected "
            f"(batch, {rows * cols}, channel, height, width)"
        )
    batch, _, channels, height, width = images.shape
    cells = images.reshape(batch, rows, cols, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * height, cols * width)


def grid_share(maps: Maps, rows: int, cols: int, cell: Classes) -> PerImage:
    """Share of a map's positive relevance in the cell whose class was asked for; 1 / cells if there is none.

    The grid pointing game (Boehle et al. 2021), as a share. Higher is better, chance is 1 / cells.

    Args:
        maps: One map a mosaic; its sides must be multiples of ``rows`` and ``cols``.
        rows: Rows of cells.
        cols: Columns of cells.
        cell: Index of the cell, as in ``grid_mosaic``; one for all or for every map.

    Example:
        >>> import torch
        >>> grid_share(torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]]), 2, 2, cell=0)
        tensor([0.7500])
    """
    check_maps(maps)
    _check_grid(rows, cols)
    batch, height, width = maps.shape
    if height % rows or width % cols:
        raise ValueError(f"maps are {height} x {width}; expected multiples of the grid's {rows} x {cols}")
    cells = class_indices(cell, maps, "cell")
    if batch and int(cells.max()) >= rows * cols:
        raise ValueError(f"cell is {int(cells.max())}; expected below {rows * cols} in a grid of {rows} x {cols}")
    positive = maps.double().clamp(min=0).reshape(batch, rows, height // rows, cols, width // cols)
    shares = positive.sum((2, 4)).flatten(1)
    own = shares.gather(1, cells[:, None])[:, 0]
    return share_of(own, shares.sum(1), 1 / (rows * cols)).to(result_dtype(maps))
