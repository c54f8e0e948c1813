"""What the model says while pixels are taken away in the order of a map: perturbation, insertion and deletion.

Pixels of equal relevance are ordered by one fixed permutation of the image's pixels, the same for every image and every
run. The first in reading order would do as well, but then a flat map would remove the image from its top, which is an
answer of its own; so it removes pixels spread over the image. Nothing depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import check_images, check_maps
from captum_lnstat.metrics.targets import Classes, class_indices, scores_of_each

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from captum_lnstat.metrics.shapes import Images, Maps, PerImage

Order = Literal["positive", "negative"]
NINE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Curve:
    """A measure along the steps of a path.

    Attributes:
        steps: Share of the pixels that were changed at every step, rising.
        values: The measure at every step, for every image.
    """

    steps: Float[Tensor, " step"]
    values: Float[Tensor, "batch step"]

    @property
    def area(self) -> PerImage:
        """Trapezoid area under the curve; at most .8 for the nine steps from .1 to .9."""
        return torch.trapezoid(self.values, self.steps, dim=1)

    @property
    def auc(self) -> PerImage:
        """Mean height of the curve, between 0 and 1: the area by the width of the steps.

        Example:
            >>> import torch
            >>> curve = Curve(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([[1.0, 1.0, 0.0]]))
            >>> curve.auc, curve.area
            (tensor([0.7500]), tensor([0.6000]))
        """
        if len(self.steps) == 1:
            return self.values[:, 0]
        return self.area / (self.steps[-1] - self.steps[0])


def removal_ranks(maps: Maps, order: Order) -> Int[Tensor, "batch height width"]:
    """For every pixel the place at which it is removed: 0 is first. Ties as said at the top of this file.

    Args:
        maps: One map an image.
        order: ``"positive"``: the most relevant pixel first; ``"negative"``: the least relevant one.

    Example:
        >>> import torch
        >>> removal_ranks(torch.tensor([[[0.5, 2.0, -1.0]]]), "positive")
        tensor([[[1, 0, 2]]])
    """
    check_maps(maps)
    if order not in ("positive", "negative"):
        raise ValueError(f"order is {order!r}; expected 'positive' or 'negative'")
    values = maps.flatten(1)
    ties = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(maps.device)
    # Widened before the sort, which is not on offer for every half type everywhere.
    found = values[:, ties].double().argsort(stable=True, dim=1, descending=order == "positive")
    sequence = ties[found]
    places = torch.arange(values.shape[1], device=maps.device).expand_as(sequence)
    return torch.empty_like(sequence).scatter_(1, sequence, places).view_as(maps)


def _check_steps(steps: Sequence[float]) -> tuple[float, ...]:
    chosen = tuple(float(step) for step in steps)
    rising = all(a < b for a, b in pairwise(chosen))
    if not chosen or not rising or not (chosen[0] >= 0 and chosen[-1] <= 1):
        raise ValueError(f"steps is {chosen}; expected shares of the pixels between 0 and 1, rising")
    return chosen


def fill_images(fill: Tensor, images: Tensor) -> Tensor:
    """``fill`` as images; raise where it is not one for every image or for all."""
    try:
        whole = fill.to(images).broadcast_to(images.shape)
    except RuntimeError as error:
        raise ValueError(
            f"fill has shape {tuple(fill.shape)}; expected one that broadcasts to the images' {tuple(images.shape)}, "
            "as black(mean, std), mean_colour(images) or blurred(images) give"
        ) from error
    if not bool(whole.isfinite().all()):
        raise ValueError("fill has values that are NaN or infinite; expected finite ones")
    return whole


def _path(begin: Tensor, end: Tensor, ranks: Tensor, steps: tuple[float, ...]) -> Iterator[Tensor]:
    """The images at every step: ``end``'s pixels where the rank is below the step's share of all."""
    pixels = ranks[0].numel() if len(ranks) else 0
    for step in steps:
        count = int(step * pixels + 1e-6)  # .29 * 100 is 28.999999999999996
        yield torch.where((ranks < count)[:, None], end, begin)


def perturbation_curve(
    forward: Callable[[Tensor], Any],
    images: Images,
    maps: Maps,
    target: Classes,
    *,
    order: Order = "positive",
    fill: Float[Tensor, "..."],
    steps: Sequence[float] = NINE,
) -> Curve:
    """Whether the model's first class is still ``target`` while pixels are replaced in the order of a map.

    The perturbation test of Chefer et al. 2021: 10 % to 90 % of the pixels are made black, most relevant first
    (positive, a good map gives a low curve) or least relevant first (negative, a good map gives a high one). With
    ``fill`` from ``black`` it is that protocol; a published table says whether ``target`` was the predicted or the
    true class. Black pixels are unlike anything a model was trained on, so ``blurred`` and ``mean_colour`` fills
    belong beside it.

    Args:
        forward: The model, or a function from images to scores ``(batch, classes)``; in eval mode.
        images: As the model takes them, normalised.
        maps: One map an image, of the image's size.
        target: The predicted or the true class, for all or for every image.
        order: ``"positive"`` or ``"negative"``, see above.
        fill: What removed pixels become, in the model's input space; broadcast to the images.
        steps: Shares of the pixels that are replaced, rising. The number of pixels is rounded down.

    Returns:
        A ``Curve`` of 0 and 1, float32. Every step is a forward pass; those of small batches are made together.

    Example:
        >>> import torch
        >>> def forward(images):  # class 1 while the left pixel is bright
        ...     return torch.stack([torch.full((len(images),), 0.5), images[:, 0, 0, 0]], 1)
        >>> images, maps = torch.ones(1, 3, 1, 4), torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
        >>> nothing = torch.zeros(1, 3, 1, 1)
        >>> perturbation_curve(forward, images, maps, 1, fill=nothing, steps=(0, 0.25, 0.5)).values
        tensor([[1., 0., 0.]])
        >>> perturbation_curve(forward, images, maps, 1, order="negative", fill=nothing, steps=(0, 0.25, 0.5)).values
        tensor([[1., 1., 1.]])
    """
    check_images(images, maps)
    chosen, classes = _check_steps(steps), class_indices(target, images)
    path = _path(images, fill_images(fill, images), removal_ranks(maps, order), chosen)
    right = [scores.argmax(1) == classes for scores in scores_of_each(forward, path, classes)]
    return _curve(chosen, right, images)


def deletion(
    forward: Callable[[Tensor], Any],
    images: Images,
    maps: Maps,
    target: Classes,
    *,
    fill: Float[Tensor, "..."],
    steps: int = 50,
) -> Curve:
    """The target's probability as the image turns into ``fill``, most relevant pixels first; lower is better.

    The deletion game of RISE (Petsiuk et al. 2018). Probabilities are the softmax of what ``forward`` gives.

    Args:
        forward: As in ``perturbation_curve``.
        images: The same.
        maps: The same.
        target: The same.
        fill: The same; RISE deletes to a plain colour.
        steps: Into how many parts of equal size the pixels are split: ``steps + 1`` forward passes.

    Returns:
        A ``Curve`` of probabilities, float32, at the shares 0 to 1.

    Example:
        >>> import torch
        >>> def forward(images):
        ...     return torch.stack([torch.zeros(len(images)), 20 * images.mean((1, 2, 3)) - 10], 1)
        >>> images, maps = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[1.0, 0.0]]])
        >>> deletion(forward, images, maps, 1, fill=torch.zeros(1, 1, 1, 1), steps=2).values.round(decimals=2)
        tensor([[0.5000, 0.0000, 0.0000]])
    """
    return _probability(forward, images, maps, target, fill, steps, insert=False)


def insertion(
    forward: Callable[[Tensor], Any],
    images: Images,
    maps: Maps,
    target: Classes,
    *,
    fill: Float[Tensor, "..."],
    steps: int = 50,
) -> Curve:
    """The target's probability as ``fill`` turns into the image, most relevant pixels first; higher is better.

    The insertion game of RISE (Petsiuk et al. 2018), where ``fill`` is the blurred image. Arguments as in ``deletion``.

    Example:
        >>> import torch
        >>> def forward(images):
        ...     return torch.stack([torch.zeros(len(images)), 20 * images.mean((1, 2, 3)) - 10], 1)
        >>> images, maps = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[1.0, 0.0]]])
        >>> insertion(forward, images, maps, 1, fill=torch.zeros(1, 1, 1, 1), steps=2).values.round(decimals=2)
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    return _probability(forward, images, maps, target, fill, steps, insert=True)


def _probability(
    forward: Callable[[Tensor], Any],
    images: Tensor,
    maps: Tensor,
    target: Classes,
    fill: Tensor,
    steps: int,
    *,
    insert: bool,
) -> Curve:
    check_images(images, maps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; expected a whole number, 1 or above")
    chosen = tuple(index / steps for index in range(steps + 1))
    classes, other = class_indices(target, images), fill_images(fill, images)
    begin, end = (other, images) if insert else (images, other)
    path = _path(begin, end, removal_ranks(maps, "positive"), chosen)
    found = scores_of_each(forward, path, classes)
    shares = [scores.softmax(1).gather(1, classes[:, None])[:, 0] for scores in found]
    return _curve(chosen, shares, images)


def _curve(steps: tuple[float, ...], values: list[Tensor], images: Tensor) -> Curve:
    return Curve(torch.tensor(steps, device=images.device), torch.stack(values, 1).float())
