"""Held-out sample scenes: photographs with one or two pasted items, whose masks and boxes are exact."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_lnstat.zoo.models import CLASS_NAMES

if TYPE_CHECKING:
    from jaxtyping import Bool

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One scene; object ``i`` has ``labels[i]``, ``masks[i]`` and ``boxes[i]``.

    Attributes:
        image: RGB, 64 x 64 for those of the package.
        labels: Class of every object, one or two.
        masks: Where each object is.
    """

    image: Image.Image
    labels: tuple[int, ...]
    masks: Bool[Tensor, "object height width"]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Left, top, right and bottom of every object in pixels, right and bottom exclusive."""
        return tuple(_box(mask) for mask in self.masks)

    @property
    def title(self) -> str:
        """What it shows in words."""
        return " and ".join(CLASS_NAMES[label] for label in self.labels)


def _box(mask: Tensor) -> Box:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def scenes() -> tuple[Scene, ...]:
    """The sample scenes, single-object ones first. No item or photograph of them was seen in training.

    Example:
        >>> samples = scenes()
        >>> len(samples) >= 200, sorted({len(scene.labels) for scene in samples})
        (True, [1, 2])
    """
    with as_file(files(__package__).joinpath("scenes.npz")) as path:
        return read_scenes(path)


def read_scenes(path: Path) -> tuple[Scene, ...]:
    """The scenes of a file.

    Args:
        path: An ``.npz`` with ``images`` (scene, height, width, 3) uint8, ``labels`` (scene, object) with -1 for no
            object, and ``masks``, (scene, object, height * width) bool packed along the last axis by
            ``numpy.packbits``.
    """
    with np.load(path) as data:
        images, labels, packed = data["images"], data["labels"], data["masks"]
    count, height, width = images.shape[:3]
    bits = np.unpackbits(packed, axis=-1, count=height * width).astype(bool)
    masks = torch.from_numpy(bits).reshape(count, -1, height, width)
    return tuple(
        Scene(Image.fromarray(image), tuple(int(label) for label in row if label >= 0), mask[: int((row >= 0).sum())])
        for image, row, mask in zip(images, labels, masks, strict=True)
    )
