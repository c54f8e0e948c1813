"""Classes of a batch, given in any of the usual ways, and the scores that a model gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import warn_caller

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Classes = int | Sequence[int] | Tensor
# Numbers of images given to a model in one pass: on a CPU ten images of 64 px, and some 200 of 224 px on a device.
AT_ONCE = 1 << 17
AT_ONCE_ON_DEVICE = 1 << 25


def class_indices(target: Classes, batch: Tensor, name: str = "target") -> Int[Tensor, " batch"]:
    """One class index for every example of ``batch``, on its device.

    Args:
        target: One class for all, or one for every example.
        batch: What there are as many of; only its length and device count.
        name: Of the argument, for the messages.

    Raises:
        TypeError: Not whole numbers.
        ValueError: Another number of them, or a negative one.

    Example:
        >>> import torch
        >>> class_indices(3, torch.zeros(2, 1)), class_indices([0, 1], torch.zeros(2, 1))
        (tensor([3, 3]), tensor([0, 1]))
    """
    given = target if isinstance(target, Tensor) else torch.as_tensor(target, device="cpu")
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if not whole and (given.numel() or isinstance(target, Tensor)):  # an empty list has no dtype of its own
        raise TypeError(f"{name} is of {given.dtype}; expected whole numbers: one class, or one for every image")
    given = given.to(batch.device, torch.long)
    indices = given.expand(len(batch)) if given.dim() == 0 else given
    if indices.shape != (len(batch),):
        raise ValueError(
            f"{name} has shape {tuple(given.shape)} for {len(batch)} images; expected one class, or one for every image"
        )
    if bool((indices < 0).any()):
        raise ValueError(f"{name} has the class {int(indices.min())}; expected 0 or above")
    return indices


def class_scores(forward: Callable[[Tensor], Any], images: Tensor, target: Tensor) -> Float[Tensor, "batch classes"]:
    """What ``forward`` gives for the images, without a graph, in float64; every target must be one of its classes.

    A model in train mode is warned about.

    Raises:
        TypeError: ``forward`` returned something other than a tensor.
        IndexError: A target is not one of the classes.
        ValueError: Another shape than ``(batch, classes)``, or scores that are NaN.
    """
    if isinstance(forward, nn.Module) and forward.training:
        warn_caller(
            f"{type(forward).__name__} is in train mode: dropout and stochastic depth make its scores random. Call "
            "model.eval() first"
        )
    with torch.no_grad():
        scores = forward(images)
    if not isinstance(scores, Tensor):
        raise TypeError(
            f"forward returned a {type(scores).__name__}; expected a tensor (batch, classes). Wrap the model: "
            "lambda x: model(x).logits"
        )
    if scores.dim() != 2 or len(scores) != len(images):
        raise ValueError(
            f"forward returned shape {tuple(scores.shape)} for {len(images)} images; expected (batch, classes)"
        )
    if len(target) and int(target.max()) >= scores.shape[1]:
        raise IndexError(f"target has the class {int(target.max())}; forward gives {scores.shape[1]} classes")
    if bool(scores.isnan().any()):
        raise ValueError("forward returned scores that are NaN; no class can be read off them")
    return scores.double()


def scores_of_each(
    forward: Callable[[Tensor], Any], batches: Iterable[Tensor], target: Tensor
) -> Iterator[Float[Tensor, "batch classes"]]:
    """``class_scores`` of several changes of one batch, as many of them in one pass as ``AT_ONCE`` numbers hold.

    A device is idle while few small images go through a model.

    Example:
        >>> images, passes = torch.rand(2, 3, 4, 4), []
        >>> def forward(given):
        ...     passes.append(len(given))
        ...     return given.mean((2, 3))
        >>> found = list(scores_of_each(forward, [images, 2 * images, 3 * images], torch.tensor([0, 1])))
        >>> len(found), found[0].shape, passes
        (3, torch.Size([2, 3]), [6])
    """
    waiting: list[Tensor] = []

    def asked() -> Iterator[Tensor]:
        if waiting:
            together = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            scores = class_scores(forward, together, target.repeat(len(waiting)))
            yield from torch.split(scores, len(target)) if len(target) else [scores] * len(waiting)
        waiting.clear()

    for batch in batches:
        waiting.append(batch)
        room = AT_ONCE if batch.device.type == "cpu" else AT_ONCE_ON_DEVICE
        if (len(waiting) + 1) * batch.numel() > room:
            yield from asked()
    yield from asked()
