"""From an image to the model's input, and the truth along with it, pixel for pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_lnstat.evaluation.datasets.base import Sample

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Fit = Literal["center", "squash"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Framed:
    """A sample as the model sees it: all of it ``size`` large, what was cut off gone.

    Attributes:
        sample: As the data set gave it.
        image: The model's input.
        mask: The mask, or None if the data have none or nothing of it is left in the frame.
        other_mask: The other object's, in the same way.
        boxes: Those of which something is left, cut at the frame.
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


@dataclass(frozen=True)
class Frame:
    """Resize, cut and normalise.

    Attributes:
        size: Height and width of the model's input.
        scale: Height and width that the image is resized to cover (``"center"``) or to have (``"squash"``).
        fit: ``"center"`` keeps the proportions and cuts; ``"squash"`` does not.
        mean: Taken from the channels, which are 0 to 1.
        std: What they are then divided by.
        interpolation: Pillow's filter for images. Masks are resized by the nearest pixel.
    """

    size: tuple[int, int]
    scale: tuple[int, int]
    fit: Fit = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Image.Resampling = Image.Resampling.BILINEAR

    def squashed(self) -> Frame:
        """The whole image, resized to the input's size whatever its proportions."""
        return replace(self, scale=self.size, fit="squash")

    def cut(self, width: int, height: int) -> tuple[tuple[int, int], int, int]:
        """Height and width to resize an image of a size to, and the top and left of what is cut out of it.

        Example:
            >>> Frame((224, 224), (256, 256)).cut(500, 375)
            ((256, 341), 16, 58)
        """
        if self.fit == "squash":
            resized = self.scale
        elif self.scale[0] == self.scale[1]:  # as torchvision's Resize, which rounds down
            short = self.scale[0]
            resized = (int(short * height / width), short) if height > width else (short, int(short * width / height))
        else:  # as timm's ResizeKeepRatio, which rounds
            ratio = min(height / self.scale[0], width / self.scale[1])
            resized = (round(height / ratio), round(width / ratio))
        if resized[0] < self.size[0] or resized[1] < self.size[1]:
            raise ValueError(
                f"an image of {width} x {height} becomes {resized[1]} x {resized[0]}, smaller than the model's input "
                f"of {self.size[1]} x {self.size[0]}; take --fit squash"
            )
        return resized, round((resized[0] - self.size[0]) / 2.0), round((resized[1] - self.size[1]) / 2.0)

    def image(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        """The model's input, float32."""
        pixels = torch.from_numpy(np.array(self._cut(image, self.interpolation))).permute(2, 0, 1).float() / 255
        return (pixels - self._column(self.mean)) / self._column(self.std)

    def truth(self, values: Tensor) -> Tensor:
        """A mask of the image, by the nearest pixel, or a graded map, bilinear with the filter's support."""
        if values.dtype == torch.bool:
            return torch.from_numpy(
                np.array(self._cut(Image.fromarray(values.numpy().astype(np.uint8)), Image.Resampling.NEAREST)) > 0
            )
        grey = Image.fromarray(values.numpy().astype(np.float32))
        return torch.from_numpy(np.array(self._cut(grey, Image.Resampling.BILINEAR)))

    def boxes(self, boxes: Tensor, width: int, height: int) -> Tensor:
        """Boxes of an image of a size, cut at the frame; those of which less than a pixel is left are gone."""
        (tall, wide), top, left = self.cut(width, height)
        scale = torch.tensor([wide / width, tall / height] * 2)
        moved = boxes * scale - torch.tensor([left, top] * 2, dtype=torch.float32)
        limit = torch.tensor([self.size[1], self.size[0]] * 2, dtype=torch.float32)
        moved = torch.minimum(moved.clamp(min=0), limit)
        return moved[((moved[:, 2:] - moved[:, :2]) >= 1).all(1)]

    def framed(self, sample: Sample) -> Framed:
        """A sample as the model sees it."""
        mask, other = (self._left(mask) for mask in (sample.mask, sample.other_mask))
        boxes = None if sample.boxes is None else self.boxes(sample.boxes, *sample.image.size)
        return Framed(
            sample,
            self.image(sample.image),
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

    def _cut(self, image: Image.Image, interpolation: Image.Resampling) -> Image.Image:
        (tall, wide), top, left = self.cut(*image.size)
        if image.size != (wide, tall):
            image = image.resize((wide, tall), interpolation)
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def _column(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values).reshape(-1, 1, 1)


def timm_frame(config: Mapping[str, Any]) -> Frame:
    """The frame of a timm data configuration, equal to ``timm.data.create_transform``'s.

    Raises:
        ValueError: A crop mode other than ``"center"`` and ``"squash"``.
    """
    given = config.get("crop_mode") or "center"
    mode: Fit | None = next((fit for fit in get_args(Fit) if fit == given), None)
    if mode is None:
        raise ValueError(f"crop_mode {given!r} puts borders around images; take --fit squash")
    size = (int(config["input_size"][1]), int(config["input_size"][2]))
    percent = config.get("crop_pct") or 0.875
    scale = (math.floor(size[0] / percent), math.floor(size[1] / percent))
    return Frame(
        size,
        scale,
        mode,
        tuple(map(float, config["mean"])),
        tuple(map(float, config["std"])),
        Image.Resampling[str(config["interpolation"]).upper()],
    )
