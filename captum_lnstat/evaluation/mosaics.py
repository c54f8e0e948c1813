"""Mosaics for the grid game: an image among others of different classes, and where in it each class is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from captum_lnstat.evaluation.frame import Example
from captum_lnstat.evaluation.question import Batch
from captum_lnstat.evaluation.seeds import seed_of
from captum_lnstat.metrics import grid_mosaic

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


@dataclass(frozen=True)
class Mosaic:
    """An image among others.

    Attributes:
        image: The mosaic.
        classes: The class of each cell, row by row.
        own: The cell of the image that it was made for.
    """

    image: Float[Tensor, "channel height width"]
    classes: tuple[int, ...]
    own: int


def mosaic(batch: Batch, one: Example, rows: int, cols: int, *, full: bool) -> Mosaic | None:
    """An image in a cell that hangs on its name, and its partners in the others.

    Args:
        batch: Where the partners are from.
        one: The image.
        rows: Rows of cells.
        cols: Columns of cells.
        full: Every cell is as large as an image; else the mosaic is.

    Returns:
        The mosaic, or None if there are not as many images of different classes.

    Raises:
        ValueError: The images cannot be shrunk to equal cells.
    """
    partners = batch.partners(one, rows * cols - 1)
    if partners is None:
        return None
    own = seed_of(f"{one.sample.name}/cell", batch.seed) % (rows * cols)
    members = list(partners)
    members.insert(own, one)
    cells = torch.stack([member.image for member in members])
    if not full:
        height, width = one.image.shape[1:]
        if height % rows or width % cols:
            raise ValueError(f"an input of {height} x {width} px cannot be cut into {rows} x {cols} equal cells")
        cells = interpolate(
            cells, (height // rows, width // cols), mode="bilinear", align_corners=False, antialias=True
        )
    classes = tuple(member.sample.target for member in members if member.sample.target is not None)
    return Mosaic(grid_mosaic(cells[None], rows, cols)[0], classes, own)


def cell_masks(
    maps: Float[Tensor, "batch height width"], rows: int, cols: int, cells: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch height width"]:
    """The pixels of one cell of every mosaic.

    Example:
        >>> cell_masks(torch.zeros(1, 2, 4), 1, 2, torch.tensor([1])).int()
        tensor([[[0, 0, 1, 1],
                 [0, 0, 1, 1]]], dtype=torch.int32)
    """
    height, width = maps.shape[1:]
    down = torch.arange(height, device=maps.device) * rows // height
    across = torch.arange(width, device=maps.device) * cols // width
    return (down[:, None] * cols + across) == cells.to(maps.device)[:, None, None]
