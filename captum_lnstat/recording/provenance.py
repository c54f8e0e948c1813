"""Where on the image the numbers of a tensor come from, followed from the images to the first attention.

A convolution makes a lattice: cells at equal distances. What moves tokens about (a view, an index, a flip, a shuffle)
is done to the places as it was done to the tokens; what works on each number or token by itself leaves them where they
are. The places live on the CPU, whatever the tokens live on, and channels share theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int

# Of a number that comes from no place (a class token, padding), and of one that comes from several.
NOWHERE, SEVERAL = -1, -2
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lattice:
    """Cells at equal distances on the images of a batch; cells are numbered image by image, row by row.

    Attributes:
        shape: How many images, and how many cells along each axis.
        origin: Where the middle of the first cell is, in pixels from the middle of the first.
        pitch: From one cell to the next, in pixels; negative on a flipped image.
        images: Which image each row of the batch is, if they are not in order.
        reaches: Some convolution read beyond its cell.
        border: Cells before the first and after the last of each axis that were padded for what comes next.
    """

    shape: tuple[int, ...]
    origin: tuple[float, ...]
    pitch: tuple[float, ...]
    images: tuple[int, ...] | None = None
    reaches: bool = False
    border: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, images: Tensor, *, rows: bool = False) -> Lattice:
        """The pixels of a batch of images, ``(batch, channel, *axes)``; or its rows alone."""
        axes = images.shape[len(images.shape) if rows else 2 :]
        return cls((len(images), *axes), (0.0,) * len(axes), (1.0,) * len(axes))

    @property
    def cells(self) -> int:
        """How many cells an image has."""
        return math.prod(self.shape[1:])

    def numbers(self, shape: torch.Size) -> Int[Tensor, "batch channel *axes"]:
        """The number of every cell, for a map of this shape."""
        ids = torch.arange(math.prod(self.shape), device=_CPU)
        axes = self.shape[1:] or (1,) * (len(shape) - 2)
        return ids.reshape(self.shape[0], *[1] * (len(shape) > 1), *axes).expand(shape)

    def where(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image and pixel of each of some cells."""
        image, *cells = torch.unravel_index(ids.clamp(min=0), self.shape)
        if self.images is not None:
            image = torch.tensor(self.images, device=_CPU)[image]
        axes = zip(cells, self.origin, self.pitch, strict=True)
        return image, [origin + pitch * cell.double() for cell, origin, pitch in axes]

    def strided(
        self, shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
    ) -> Lattice:
        """What a convolution or pooling makes of it.

        Around a cell, with padding for what lies beyond the border, it counts as that cell: what overlapping kernels
        read beyond is left out. Anywhere else it is where it reads.
        """
        origin, reaches = list[float](), self.reaches
        borders = self.border or ((0, 0),) * len(kernel)
        axes = zip(self.origin, self.pitch, kernel, stride, padding, dilation, borders, strict=True)
        for start, pitch, k, s, p, d, (before, after) in axes:
            wide = d * (k - 1) + 1
            middle, own = (wide - 1) / 2 - p, (s - 1) / 2 + before
            reaches |= wide > s
            padded = p + before + after > 0 and wide > s and abs(middle - own) <= s / 2
            origin.append(start + pitch * (own if padded else middle))
        shape = torch.Size((shape[0], *shape[2:]))
        pitches = tuple(pitch * s for pitch, s in zip(self.pitch, stride, strict=True))
        return replace(self, shape=shape, origin=tuple(origin), pitch=pitches, reaches=reaches, border=())

    def padded(self, shape: torch.Size, border: list[tuple[int, int]]) -> Lattice:
        """With so many cells before the first and after the last of each axis."""
        starts = zip(self.origin, self.pitch, border, strict=True)
        origin = tuple(start - pitch * before for start, pitch, (before, _) in starts)
        return replace(self, shape=(shape[0], *shape[2:]), origin=origin, border=tuple(border))

    def resized(self, shape: torch.Size) -> Lattice:
        """What an interpolation or an adaptive pooling makes of it."""
        scale = [old / new for old, new in zip(self.shape[1:], shape[2:], strict=True)]
        axes = list(zip(self.origin, self.pitch, scale, strict=True))
        origin = tuple(start + pitch * (factor - 1) / 2 for start, pitch, factor in axes)
        pitch = tuple(pitch * factor for _, pitch, factor in axes)
        return replace(self, shape=(shape[0], *shape[2:]), origin=origin, pitch=pitch, border=())


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of one tensor come from.

    Attributes:
        lattice: What their cells are of.
        ids: The number of the cell that each comes from, ``NOWHERE`` or ``SEVERAL``; of the tensor's shape.
            ``None`` for a map ``(batch, channel, *axes)`` that is the lattice itself.
        shape: The tensor's shape.
        mixed: What made one number of several, in words.
    """

    lattice: Lattice
    ids: Tensor | None
    shape: torch.Size
    mixed: str = ""

    def read(self) -> Int[Tensor, "..."]:
        """The number of every cell, whatever is known of them."""
        return self.lattice.numbers(self.shape) if self.ids is None else self.ids

    def mixed_by(self, name: str, shape: torch.Size) -> Provenance:
        """What a function made of it that reads several places for each number."""
        return self.to(torch.tensor(SEVERAL, device="cpu").expand(shape), name)

    def to(self, ids: Tensor, mixed: str = "") -> Provenance:
        """The same lattice's cells in other places."""
        return Provenance(self.lattice, ids, ids.shape, self.mixed or mixed)


def alone(ids: Tensor, dim: int) -> Tensor:
    """The numbers along a dimension as one: themselves if they are the same, else ``SEVERAL``.

    Example:
        >>> alone(torch.tensor([[3, 3], [1, 2]]), 1)
        tensor([ 3, -2])
    """
    first = ids.select(dim, 0)
    if ids.stride(dim) == 0 or ids.shape[dim] == 1:
        return first
    return torch.where((ids == first.unsqueeze(dim)).all(dim), first, SEVERAL)


def one_a_row(ids: Tensor) -> Int[Tensor, " row"]:
    """The number of each row as one, ``SEVERAL`` if it has more; numbers from nowhere do not count."""
    flat = ids.reshape(len(ids), -1)
    last = flat.amax(1)
    first = flat.masked_fill(flat == NOWHERE, torch.iinfo(flat.dtype).max).amin(1)
    return torch.where((first == last) | (flat == NOWHERE).all(1), last, SEVERAL)


def on_lattice(images: Tensor, axes: list[Tensor], reaches: bool) -> tuple[Lattice, Tensor] | None:
    """Points that lie on a lattice, each of its cells once an image, and the number of the cell that each is.

    Args:
        images: Of which image each point is, ``(batch, point)``; the same for all of a row.
        axes: Where it is on each axis.
        reaches: Of the lattice.
    """
    rows = images[:, 0]
    if bool((images != rows[:, None]).any()):
        return None
    cells, sizes, origin, pitch = torch.zeros_like(images), list[int](), list[float](), list[float]()
    for axis in axes:
        known = torch.unique(axis)
        step = float(known[1] - known[0]) if len(known) > 1 else 1.0
        if not torch.allclose(known, known[0] + step * torch.arange(len(known), device=_CPU, dtype=known.dtype)):
            return None
        cells = cells * len(known) + ((axis - known[0]) / step).round().long()
        sizes.append(len(known))
        origin.append(float(known[0]))
        pitch.append(step)
    count = math.prod(sizes)
    if count != images.shape[1] or not torch.equal(
        cells.sort(1).values, torch.arange(count, device="cpu").expand_as(cells)
    ):
        return None
    lattice = Lattice((len(rows), *sizes), tuple(origin), tuple(pitch), _unless_in_order(rows), reaches)
    return lattice, cells + count * torch.arange(len(rows), device=_CPU)[:, None]


def as_map(places: Provenance) -> Lattice | None:
    """The lattice that a map ``(batch, channel, *axes)`` is, if its cells lie at equal distances."""
    if places.ids is None:
        return places.lattice
    ids = alone(places.ids, 1)
    if ids.dim() != len(places.lattice.shape):
        return None
    known = ids[0] >= 0
    if not bool(known.any()):
        return None
    image, axes = places.lattice.where(ids)
    some = (ids >= 0).flatten(1)
    first = some.int().argmax(1)
    rows = image.flatten(1).gather(1, first[:, None])[:, 0]
    origin, pitch = list[float](), list[float]()
    for dim, axis in enumerate(axes):
        step = axis.narrow(dim + 1, 1, axis.shape[dim + 1] - 1) - axis.narrow(dim + 1, 0, axis.shape[dim + 1] - 1)
        both = (ids >= 0).narrow(dim + 1, 1, ids.shape[dim + 1] - 1) & (ids >= 0).narrow(
            dim + 1, 0, ids.shape[dim + 1] - 1
        )
        pitch.append(float(step[both][0]) if bool(both.any()) else 1.0)
        cell = torch.arange(ids.shape[dim + 1], device=_CPU).reshape(-1, *[1] * (len(axes) - dim - 1))
        starts = (axis - pitch[-1] * cell)[ids >= 0]
        origin.append(float(starts[0]))
        if not torch.allclose(starts, starts[0]):
            return None
    of_row = image == rows.reshape(-1, *[1] * len(axes))
    if not bool((of_row | (ids < 0)).all()) or bool((ids == SEVERAL).any()) or not bool(some.any(1).all()):
        return None
    shape = tuple(ids.shape)
    images = _unless_in_order(rows)
    return replace(places.lattice, shape=shape, origin=tuple(origin), pitch=tuple(pitch), images=images, border=())


def _unless_in_order(rows: Tensor) -> tuple[int, ...] | None:
    return None if torch.equal(rows, torch.arange(len(rows), device="cpu")) else tuple(rows.tolist())
