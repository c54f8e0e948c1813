"""What every measure asks of its arguments, so that a wrong one is refused and never measured."""

from __future__ import annotations

import torch
from torch import Tensor


def check_maps(maps: Tensor, name: str = "maps") -> None:
    """Raise unless ``maps`` is ``(batch, height, width)``, floating, finite and not empty.

    Raises:
        TypeError: Not a floating tensor.
        ValueError: Another shape, no pixels, or a value that is NaN or infinite.

    Example:
        >>> import torch
        >>> check_maps(torch.tensor([[[1.0, float("nan")]]]))
        Traceback (most recent call last):
        ValueError: maps has 1 values that are NaN or infinite (the first is in image 0); expected finite ones
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        seen = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"{name} is of {seen}; expected a floating tensor (batch, height, width)")
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected (batch, height, width)")
    wrong = ~maps.isfinite()
    if wrong.any():
        first = int(wrong.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{name} has {int(wrong.sum())} values that are NaN or infinite (the first is in image {first}); "
            "expected finite ones"
        )


def check_masks(maps: Tensor, masks: Tensor, name: str = "masks") -> None:
    """Raise unless ``maps`` are maps and ``masks`` are bool and of their shape.

    Raises:
        TypeError: ``masks`` is not bool.
        ValueError: The shapes differ or are not ``(batch, height, width)``.
    """
    if maps.shape != masks.shape or maps.dim() != 3:
        raise ValueError(
            f"maps has shape {tuple(maps.shape)} and {name} {tuple(masks.shape)}; expected both (batch, height, width)"
        )
    if masks.dtype != torch.bool:
        raise TypeError(f"{name} is of {masks.dtype}; expected bool")
    check_maps(maps)


def check_images(images: Tensor, maps: Tensor) -> None:
    """Raise unless there is one map for every image, of the image's size.

    Raises:
        TypeError: ``images`` is not floating.
        ValueError: ``images`` is not ``(batch, channel, height, width)``, or its batch or size is not the maps'.
    """
    check_maps(maps)
    if not images.is_floating_point():
        raise TypeError(f"images is of {images.dtype}; expected a floating tensor, as the model takes it")
    if images.dim() != 4 or (len(images), *images.shape[2:]) != tuple(maps.shape):
        raise ValueError(
            f"images has shape {tuple(images.shape)} and maps {tuple(maps.shape)}; expected "
            "(batch, channel, height, width) and (batch, height, width)"
        )


def result_dtype(maps: Tensor) -> torch.dtype:
    """What a measure of ``maps`` is returned in: float64 for float64 maps, else float32.

    Inside, every measure is in float64, where sums of float32 values do not depend on their order in practice: the
    numbers are the same alone and in a batch of any size.
    """
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def above_mean(values: Tensor) -> Tensor:
    """Where each map is above its own mean; nowhere on a flat map.

    The mean is kept within the map's range, which rounding can take it out of: a flat map would then be all above.

    Example:
        >>> import torch
        >>> above_mean(torch.full((1, 3, 3), 0.1, dtype=torch.float64)).any()
        tensor(False)
    """
    values = values.double()
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return values > values.mean((1, 2), keepdim=True).clamp(low, high)


def check_batch(images: Tensor) -> None:
    """Raise unless ``images`` is floating and ``(batch, channel, height, width)``.

    Raises:
        ValueError: It is not.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images has shape {tuple(images.shape)} and {images.dtype}; expected floating "
            "(batch, channel, height, width)"
        )


def share_of(part: Tensor, total: Tensor, otherwise: Tensor | float) -> Tensor:
    """``part / total`` where the total is positive, elsewhere what a map that knows nothing gets."""
    share = part / total.where(total > 0, torch.ones_like(total))
    return torch.where(total > 0, share, torch.as_tensor(otherwise, dtype=share.dtype, device=share.device))
