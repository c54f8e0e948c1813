"""What is put in the place of removed pixels, in the model's input space, that is after normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.metrics.checks import check_batch

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.metrics.shapes import Images


def black(mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "1 channel 1 1"]:
    """Black, which is 0 in RGB **before** the model's normalisation: ``(0 - mean) / std``.

    The fill of Chefer et al.'s perturbation test. It is not 0 in the model's input space, which is the mean colour of
    the training images.

    Args:
        mean: Of the model's normalisation, one a channel.
        std: The same.

    Example:
        >>> black((0.5, 0.5, 0.5), (0.5, 0.5, 0.25)).flatten()
        tensor([-1., -1., -2.])
    """
    if len(mean) != len(std) or not len(mean):
        raise ValueError(f"mean has {len(mean)} values and std {len(std)}; expected one a channel in both")
    if any(not value > 0 for value in std):
        raise ValueError(f"std is {tuple(std)}; expected values above 0")
    colour = -torch.tensor(tuple(mean), dtype=torch.float64, device="cpu") / torch.tensor(
        tuple(std), dtype=torch.float64, device="cpu"
    )
    return colour.float()[None, :, None, None]


def mean_colour(images: Images) -> Float[Tensor, "batch channel 1 1"]:
    """Each image's own mean colour.

    Example:
        >>> import torch
        >>> mean_colour(torch.tensor([[[[1.0, 3.0]]]])).item()
        2.0
    """
    check_batch(images)
    return images.double().mean((2, 3), keepdim=True).to(images.dtype)


def blurred(images: Images, kernel_size: int = 11, sigma: float = 5.0) -> Images:
    """Each image under a Gaussian blur; by default RISE's, 11 pixels and a deviation of 5 at 224 pixels.

    Args:
        images: Height and width above half of ``kernel_size``: the border is mirrored.
        kernel_size: Odd, in pixels.
        sigma: Deviation in pixels.

    Example:
        >>> import torch
        >>> images = torch.zeros(1, 1, 16, 16)
        >>> images[..., 8, 8] = 121.0
        >>> round(float(blurred(images).amax()), 1) < 2.0
        True
    """
    from torchvision.transforms.functional import gaussian_blur  # type: ignore[import-untyped]

    check_batch(images)
    if min(images.shape[2:]) <= kernel_size // 2:
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]} px; a kernel of {kernel_size} needs more than "
            f"{kernel_size // 2} on each side"
        )
    # One image at a time and in float64, so that an image's blur does not depend on those it is blurred with.
    rows = [gaussian_blur(image.double(), [kernel_size, kernel_size], [sigma, sigma]) for image in images]
    return torch.stack(rows).to(images.dtype) if rows else images
