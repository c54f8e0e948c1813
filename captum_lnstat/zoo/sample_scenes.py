"""Held-out sample scenes: photographs with one or two pasted items, whose masks and boxes are exact."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_lnstat.zoo.models import IMAGE_SIZE

if TYPE_CHECKING:
    from jaxtyping import Bool

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """One scene; object ``i`` has ``labels[i]``, ``masks[i]`` and ``boxes[i]``.

    Attributes:
        image: RGB, 64 x 64.
        labels: Class of every object, one or two.
        masks: Where each object is.
    """

    image: Image.Image
    labels: tuple[int, ...]
    masks: Bool[Tensor, "object 64 64"]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Left, top, right and bottom of every object in pixels, right and bottom exclusive."""
        return tuple(_box(mask) for mask in self.masks)


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
    with files(__package__).joinpath("scenes.npz").open("rb") as file, np.load(file) as data:
        images, labels, packed = data["images"], data["labels"], data["masks"]
    bits = np.unpackbits(packed, axis=-1).astype(bool)
    masks = torch.from_numpy(bits).reshape(len(images), -1, IMAGE_SIZE, IMAGE_SIZE)
    return tuple(
        Scene(Image.fromarray(image), tuple(int(label) for label in row if label >= 0), mask[: int((row >= 0).sum())])
        for image, row, mask in zip(images, labels, masks, strict=True)
    )
