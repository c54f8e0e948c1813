"""Rank correlation of a map with a person's annotation or with another map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import check_maps, result_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.metrics.shapes import Maps, Masks, PerImage


def average_ranks(values: Float[Tensor, "batch item"]) -> Float[Tensor, "batch item"]:
    """Ranks from 1, equal values sharing the mean of theirs, in float64.

    Example:
        >>> import torch
        >>> average_ranks(torch.tensor([[5.0, 1.0, 5.0]]))
        tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    ordered, order = values.double().sort(1)
    count = values.shape[1]
    places = torch.arange(count, device=values.device).expand_as(order)
    changes, edge = ordered[:, 1:] != ordered[:, :-1], torch.ones_like(ordered[:, :1], dtype=torch.bool)
    first = places.where(torch.cat([edge, changes], 1), torch.zeros_like(places)).cummax(1).values
    last = places.where(torch.cat([changes, edge], 1), torch.full_like(places, count)).flip(1).cummin(1).values.flip(1)
    return torch.zeros_like(ordered).scatter_(1, order, (first + last).double() / 2 + 1)


def _rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's coefficient per row, float64; 0 where either row is constant."""
    middle = (a.shape[1] + 1) / 2
    x, y = average_ranks(a) - middle, average_ranks(b) - middle
    spread = (x.square().sum(1) * y.square().sum(1)).sqrt()
    value = (x * y).sum(1) / spread.where(spread > 0, torch.ones_like(spread))
    return value.clamp(-1, 1)


def _annotation(human: Tensor) -> Tensor:
    """The annotation as numbers; raise where there is nothing in it to agree with."""
    graded = human.double() if human.dtype == torch.bool else human
    check_maps(graded, "human")
    flat = graded.flatten(1).amax(1) == graded.flatten(1).amin(1)
    if bool(flat.any()):
        raise ValueError(
            f"human of image {int(flat.nonzero()[0])} has one value everywhere: no map can agree with it. "
            "Leave the image out"
        )
    return graded


def spearman(maps: Maps, human: Maps | Masks) -> PerImage:
    """Spearman's rank correlation of each map's pixels with an annotation, graded or binary; ties share a rank.

    Read it beside ``spearman_ceiling``: a binary annotation has two ranks only, and no map without ties gets to 1. A
    flat map gets 0, which is also what it has on average when its ties are broken at random.

    Args:
        maps: One map an image.
        human: How much each pixel was marked, any scale; or where, as bool.

    Raises:
        ValueError: An annotation with one value everywhere.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[False, False, True, True]]]))
        tensor([0.8944])
    """
    graded = _annotation(human)
    check_maps(maps)
    if maps.shape != human.shape:
        raise ValueError(
            f"maps has shape {tuple(maps.shape)} and human {tuple(human.shape)}; expected both (batch, height, width)"
        )
    return _rank_correlation(maps.flatten(1), graded.flatten(1)).to(result_dtype(maps))


def spearman_ceiling(human: Maps | Masks) -> PerImage:
    """The largest ``spearman`` that a map without ties can have with this annotation.

    A map without ties has the ranks 1 to n, whose variance is (n^2 - 1) / 12. With the annotation's average ranks h its
    covariance is largest when it sorts the pixels as the annotation does; the order within equal values is of no
    account, and as their ranks have h for their mean, that covariance is var(h). So the largest correlation is
    ``sqrt(12 var(h) / (n^2 - 1)) = sqrt(1 - sum(t^3 - t) / (n^3 - n))``, t over the sizes of the groups of equal
    values. For a mask on a share p of many pixels it is about ``sqrt(3 p (1 - p))``, at most .866. A map with ties,
    such as the mask itself, can have more.

    Example:
        >>> import torch
        >>> spearman_ceiling(torch.tensor([[[False, False, True, True]]]))
        tensor([0.8944])
        >>> spearman_ceiling(torch.tensor([[[0.5, 0.1, 0.2, 0.9]]]))
        tensor([1.])
    """
    graded = _annotation(human)
    ranks = average_ranks(graded.flatten(1))
    count = ranks.shape[1]
    variance = (ranks - (count + 1) / 2).square().sum(1) / count
    ceiling = (12 * variance / (count**2 - 1)).sqrt()
    return ceiling.to(torch.float32 if human.dtype == torch.bool else result_dtype(human))


def map_correlation(a: Maps, b: Maps, *, absolute: bool = False) -> PerImage:
    """Spearman's rank correlation of two maps of the same image; 0 where either is flat.

    For the parameter-randomisation check: ``a`` of the trained model, ``b`` of ``randomised(model, ...)``. A method
    that depends on the model has a low one.

    Args:
        a: One map an image.
        b: The same.
        absolute: Rank by magnitude, so that a map and its negative are alike, as the check is often reported for signed
            maps.

    Example:
        >>> import torch
        >>> a = torch.tensor([[[1.0, -2.0, 3.0]]])
        >>> map_correlation(a, -a), map_correlation(a, -a, absolute=True)
        (tensor([-1.]), tensor([1.]))
    """
    check_maps(a, "a")
    check_maps(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected both (batch, height, width)")
    x, y = (a.abs(), b.abs()) if absolute else (a, b)
    dtype = torch.promote_types(result_dtype(a), result_dtype(b))
    return _rank_correlation(x.flatten(1), y.flatten(1)).to(dtype)
