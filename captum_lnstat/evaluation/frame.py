"""From an image to the model's input by the model's own preprocessing, and the truth along with it, pixel for pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_lnstat.evaluation.datasets.base import Sample
from captum_lnstat.explanation.subject.crop import View, measure

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_PROBE = (640, 480)


@dataclass(frozen=True)
class Example:
    """A sample as the model sees it: all of it as large as the model's input, what was cut off gone.

    Attributes:
        sample: As the data set gave it.
        image: The model's input.
        mask: The mask, or None if the data have none or nothing of it is left.
        other_mask: The other object's, in the same way.
        boxes: Those of which something is left, cut at the border.
        human: The graded map.
        void: Pixels without a label.
    """

    sample: Sample
    image: Float[Tensor, "channel height width"]
    mask: Bool[Tensor, "height width"] | None
    other_mask: Bool[Tensor, "height width"] | None
    boxes: Float[Tensor, "box 4"] | None
    human: Float[Tensor, "height width"] | None
    void: Bool[Tensor, "height width"] | None


class Frame:
    """What a model sees of images: how the truth is resized and cut is measured on the model's own transform.

    Args:
        transform: From a Pillow image to the model's input: resizes, cuts out an upright rectangle, normalises.
        source: Whose transform it is, in words.

    Attributes:
        size: Height and width of the model's input.
        mean: Taken from the channels, which are 0 to 1.
        std: What they are then divided by.

    Raises:
        ValueError: The transform does more than that, such as putting borders around images.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], source: str = "a transform that was given") -> None:
        self.transform, self.source = transform, source
        self._cuts: dict[tuple[int, int], tuple[tuple[int, int], int, int]] = {}
        self._probe: View | None = None
        self._probe = probe = self._view(_PROBE)
        self.size, self.mean, self.std = probe.size, probe.mean, probe.std

    def record(self) -> dict[str, Any]:
        """Plain values, by which two of them are told apart."""
        cut = self.cut(*_PROBE)
        return {"source": self.source, "size": self.size, "mean": self.mean, "std": self.std, "cut": [_PROBE, cut]}

    def _view(self, size: tuple[int, int]) -> View:
        view = measure(self.transform, size, self._probe)
        if view.cut is None:
            raise ValueError(
                f"the preprocessing ({self.source}) does more with an image of {size[0]} x {size[1]} than resize it "
                "and cut an upright rectangle out of it, so the truth cannot go along; take --fit squash"
            )
        self._cuts[size] = view.cut
        return view

    def cut(self, width: int, height: int) -> tuple[tuple[int, int], int, int]:
        """Height and width that an image of a size is resized to, and the top and left of what is cut out of it.

        Example:
            >>> from timm.data import create_transform
            >>> Frame(create_transform(224, is_training=False)).cut(500, 375)
            ((256, 341), 16, 58)
        """
        if (width, height) not in self._cuts:
            self._view((width, height))
        return self._cuts[width, height]

    def truth(self, values: Tensor) -> Tensor:
        """A mask of the image, by the nearest pixel, or a graded map, bilinear with the filter's support."""
        mask = values.dtype == torch.bool
        picture = Image.fromarray(values.numpy().astype(np.uint8 if mask else np.float32))
        (tall, wide), top, left = self.cut(*picture.size)
        picture = picture.resize((wide, tall), Image.Resampling.NEAREST if mask else Image.Resampling.BILINEAR)
        found = torch.from_numpy(np.array(picture.crop((left, top, left + self.size[1], top + self.size[0]))))
        return found > 0 if mask else found

    def boxes(self, boxes: Tensor, width: int, height: int) -> Tensor:
        """Boxes of an image of a size, cut at the border; those of which less than a pixel is left are gone."""
        (tall, wide), top, left = self.cut(width, height)
        scale = torch.tensor([wide / width, tall / height] * 2, device="cpu")
        moved = boxes * scale - torch.tensor([left, top] * 2, dtype=torch.float32, device="cpu")
        limit = torch.tensor([self.size[1], self.size[0]] * 2, dtype=torch.float32, device="cpu")
        moved = torch.minimum(moved.clamp(min=0), limit)
        return moved[((moved[:, 2:] - moved[:, :2]) >= 1).all(1)]

    def example(self, sample: Sample) -> Example:
        """A sample as the model sees it."""
        mask, other = (self._left(mask) for mask in (sample.mask, sample.other_mask))
        boxes = None if sample.boxes is None else self.boxes(sample.boxes, *sample.image.size)
        return Example(
            sample,
            self.transform(sample.image).float(),
            mask,
            other,
            boxes if boxes is not None and len(boxes) else None,
            None if sample.human is None else self.truth(sample.human),
            None if sample.void is None else self.truth(sample.void),
        )

    def _left(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        left = self.truth(mask)
        return left if bool(left.any()) else None
