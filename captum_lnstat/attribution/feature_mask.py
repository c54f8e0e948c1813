"""The model's patches as features for Captum's perturbation methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.eager import eager
from captum_lnstat.rules.checks import size_not_taken
from captum_lnstat.topology import Topology, find_topology

if TYPE_CHECKING:
    from jaxtyping import Int


def patch_feature_mask(model: nn.Module, image_size: int | tuple[int, int]) -> Int[Tensor, "1 1 height width"]:
    """The patch that every pixel is in, for ``FeatureAblation``, ``ShapleyValueSampling``, ``KernelShap`` and the like.

    Given to them as ``feature_mask``, they make one value per patch and image, on the grid on which
    ``LNStatAttribution.relevance`` explains. Patches are numbered row by row from 0.

    An image that the model pads to whole patches has cropped patches at its right and lower border. Pixels past the
    last whole patch, which a model without padding never reads, are counted to the patch next to them: changing them
    changes no score, so the values of the patches stay what they are, and no feature stands for nothing.

    Args:
        model: A model of a known family, or a module that holds one and gives it the images in their own size.
        image_size: Height and width of the images in pixels; one number for square ones.

    Returns:
        A ``(1, 1, height, width)`` tensor of int64 on the model's device.

    Raises:
        ValueError: The model does not take images of this size.
        UnsupportedModelError: The family is not known, or its patches are not a grid of equal ones side by side.

    Example:
        >>> from captum_lnstat import zoo
        >>> mask = patch_feature_mask(zoo.load("swin-mini").model, 64)
        >>> mask.shape, int(mask.max())
        (torch.Size([1, 1, 64, 64]), 255)
        >>> mask[0, 0, 3:5, 2:6]
        tensor([[ 0,  0,  1,  1],
                [16, 16, 17, 17]])
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    topology = find_topology(eager(model))
    embed = _embedding(topology)
    (rows, columns), (patch_height, patch_width) = _grid(embed, (height, width)), embed.patch_size
    row = (torch.arange(height) // patch_height).clamp(max=rows - 1)
    column = (torch.arange(width) // patch_width).clamp(max=columns - 1)
    mask: Tensor = row[:, None] * columns + column
    return mask[None, None].to(embed.proj.weight.device)


def _embedding(topology: Topology) -> Any:
    embed: Any = topology.model.get_submodule(topology.entrance)
    patch, convolution = getattr(embed, "patch_size", None), getattr(embed, "proj", None)
    side_by_side = (
        isinstance(convolution, nn.Conv2d)
        and convolution.kernel_size == convolution.stride == patch
        and callable(getattr(embed, "dynamic_feat_size", None))
    )
    if not side_by_side:
        raise UnsupportedModelError(
            f"{topology.entrance} is a {type(embed).__name__} whose patches are not known to lie side by side; "
            "expected a patch embedding with a convolution proj whose kernel and stride are the patch_size"
        )
    return embed


def _grid(embed: Any, size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = embed.dynamic_feat_size(size)
    reason = size_not_taken(embed, size)
    if reason is not None:
        raise ValueError(f"image_size is {size}; {reason}")
    if rows < 1 or columns < 1:
        raise ValueError(f"image_size is {size}; expected at least one patch of {tuple(embed.patch_size)}")
    return int(rows), int(columns)
