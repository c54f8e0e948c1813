"""What a metric is computed from: images, what is on them, and the model; and what becomes of it in the summary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.evaluation.frame import Example
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.subject import Subject

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


@dataclass(frozen=True)
class Quantity:
    """A number of the summary.

    Attributes:
        name: Its column.
        higher: Whether higher is better; None if neither is.
        parts: Columns of the records whose sums are divided, ``(above, below)``, and the mean of these ratios; without
            a ``below``, the mean of ``above``.
        best_of: Of every so many parts, one after the other, the largest ratio counts.
    """

    name: str
    higher: bool | None
    parts: tuple[tuple[str, str | None], ...]
    best_of: int = 1


@dataclass(frozen=True)
class Batch:
    """Images, the class of each that is explained, and the truth.

    Attributes:
        examples: The samples as the model sees them.
        images: The model's inputs.
        targets: The class explained.
        predicted: The class predicted.
        subject: The model.
        seed: The run's.
        fill: What replaces pixels, unless a metric says otherwise; empty for what is usual for each.
        partners: So many other images, all of different classes, for the grid game; None if there are not as many.
        autocast: The dtype in which the model is asked of images with replaced pixels; None for its own.
    """

    examples: tuple[Example, ...]
    images: Float[Tensor, "batch channel height width"]
    targets: Int64[Tensor, " batch"]
    predicted: Int64[Tensor, " batch"]
    subject: Subject
    seed: int
    fill: str
    partners: Callable[[Example, int], list[Example] | None]
    autocast: torch.dtype | None = None

    @property
    def names(self) -> list[str]:
        """The samples' names."""
        return [one.sample.name for one in self.examples]

    def of(self, rows: list[int]) -> Batch:
        """Some of the images."""
        if len(rows) == len(self.examples):
            return self
        chosen = torch.tensor(rows, device=self.images.device)
        return replace(
            self,
            examples=tuple(self.examples[row] for row in rows),
            images=self.images[chosen],
            targets=self.targets[chosen],
            predicted=self.predicted[chosen],
        )

    def region(self) -> Bool[Tensor, "batch height width"]:
        """Where the object is: its mask, or the area of its boxes if there is no mask."""
        return torch.stack([_region(one) for one in self.examples]).to(self.images.device)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of images with replaced pixels."""
        kind, dtype = images.device.type, self.autocast
        with torch.no_grad(), torch.autocast(kind, dtype) if dtype else nullcontext():
            scores: Tensor = self.subject.forward(images)
        return scores

    def stack(self, values: list[Tensor | None]) -> Tensor:
        """Truth that all of them have."""
        return torch.stack([value for value in values if value is not None]).to(self.images.device)


def _region(one: Example) -> Tensor:
    if one.mask is not None:
        return one.mask
    height, width = one.image.shape[1:]
    area = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    assert one.boxes is not None
    for left, top, right, bottom in one.boxes.round().long().tolist():
        area[top:bottom, left:right] = True
    return area


Values = dict[str, Tensor]
Compute = Callable[[Batch, Tensor, Method], Values]


@dataclass(frozen=True)
class Measure:
    """A metric of a run.

    Attributes:
        name: As it was given.
        quantities: What it puts into the summary.
        applies: Whether it can be computed for a sample, given whether the true class is explained.
        compute: Columns of the record, one value an image.
    """

    name: str
    quantities: tuple[Quantity, ...]
    applies: Callable[[Example, bool], bool]
    compute: Compute
