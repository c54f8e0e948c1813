"""SaCo: whether pixels of more relevance matter more to the model, pair by pair of groups of pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import check_images, result_dtype
from captum_lnstat.metrics.perturbation import fill_images, removal_ranks
from captum_lnstat.metrics.targets import Classes, class_indices, scores_of_each

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.metrics.shapes import Images, Maps, PerImage


def saco(
    forward: Callable[[Tensor], Any],
    images: Images,
    maps: Maps,
    target: Classes,
    *,
    fill: Float[Tensor, "..."],
    groups: int = 10,
) -> PerImage:
    r"""Salience-guided faithfulness coefficient (Wu et al., CVPR 2024), between -1 and 1; higher is better.

    The pixels are put into ``groups`` groups of equal size by their relevance, :math:`G_1` the most relevant. With
    :math:`s_i` the mean relevance of a group (the paper's sum would tell groups of another size apart, too) and
    :math:`d_i` by how much the probability of the class falls when only this group is replaced,

    .. math:: F = \frac{\sum_{i<j} \pm (s_i - s_j)}{\sum_{i<j} |s_i - s_j|}, \qquad + \text{ if } d_i \ge d_j,
        \text{ else } -.

    A flat map has 0, and a random one 0 in the mean. Few pixels are replaced at a time, so the images stay closer to
    the data than on a path to nothing. The original fills with the mean colour of the image, ``mean_colour``.

    Args:
        forward: The model, or a function from images to scores ``(batch, classes)``; in eval mode.
        images: As the model takes them, normalised.
        maps: One map an image, of the image's size.
        target: The class, for all or for every image.
        fill: What replaced pixels become, in the model's input space; broadcast to the images.
        groups: How many groups: ``groups + 1`` forward passes.

    Raises:
        ValueError: Fewer than two groups, or fewer pixels than groups.

    Example:
        >>> import torch
        >>> def forward(images):  # class 1 is the brightness of the first pixel
        ...     return torch.stack([torch.zeros(len(images)), images[:, 0, 0, 0]], 1)
        >>> images, nothing = torch.ones(1, 3, 1, 4), torch.zeros(1, 3, 1, 1)
        >>> [float(saco(forward, images, torch.tensor([[row]]), 1, fill=nothing, groups=2)) for row in
        ...     ([3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0])]
        [1.0, -1.0, 0.0]
    """
    check_images(images, maps)
    pixels = maps.shape[1] * maps.shape[2]
    if isinstance(groups, bool) or not isinstance(groups, int) or not 2 <= groups <= pixels:
        raise ValueError(f"groups is {groups!r}; expected a whole number from 2 to the {pixels} pixels")
    classes, other = class_indices(target, images), fill_images(fill, images)
    group = removal_ranks(maps, "positive") * groups // pixels

    chosen = [group == index for index in range(groups)]
    changed = itertools.chain([images], (torch.where(some[:, None], other, images) for some in chosen))
    found = scores_of_each(forward, changed, classes)
    before, *after = (scores.softmax(1).gather(1, classes[:, None])[:, 0] for scores in found)
    d = before[:, None] - torch.stack(after, 1)
    s = torch.stack([(maps.double() * some).sum((1, 2)) / some.sum((1, 2)) for some in chosen], 1)
    first, second = torch.triu_indices(groups, groups, 1, device=maps.device)
    gap = s[:, first] - s[:, second]
    signed = torch.where(d[:, first] >= d[:, second], gap, -gap).sum(1)
    total = gap.abs().sum(1)
    flat = total <= 1e-12 * s.abs().sum(1)  # rounding is no difference
    return torch.where(flat, 0.0, signed / total.where(~flat, 1.0)).to(result_dtype(maps))
