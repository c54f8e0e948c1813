"""The model's patches as features for Captum's perturbation methods."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError, one_line
from captum_lnstat.layout import Grid
from captum_lnstat.recording.eager import eager, run_eagerly
from captum_lnstat.recording.modes import in_eval_mode
from captum_lnstat.rules.checks import check_seen, size_not_taken
from captum_lnstat.topology import Topology, find_topology
from captum_lnstat.topology.anatomy.images import channels
from captum_lnstat.trace.placing import placed
from captum_lnstat.trace.trace import Trace

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
        RecordingError: As for ``LNStatAttribution.attribute``, of a model that is not timm's.

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
    if topology.axes == 3:
        raise UnsupportedModelError(f"{type(model).__name__} takes videos; a mask of patches is made for images only")
    embed = _known_embedding(topology)
    if embed is not None:
        grid, patch = _grid(embed, (height, width)), embed.patch_size
        return _mask(grid, patch, (height, width)).to(embed.proj.weight.device)
    return _seen_mask(model, (height, width))


def _mask(grid: Grid, patch: Grid, size: tuple[int, int]) -> Int[Tensor, "1 1 height width"]:
    row = (torch.arange(size[0], device="cpu") // patch[0]).clamp(max=grid[0] - 1)
    column = (torch.arange(size[1], device="cpu") // patch[1]).clamp(max=grid[1] - 1)
    mask: Tensor = row[:, None] * grid[1] + column
    return mask[None, None]


def _known_embedding(topology: Topology) -> Any:
    """The patch embedding, if it is timm's, which says what it makes of images of a size."""
    embed: Any = topology.model.get_submodule(topology.entrance)
    patch, convolution = getattr(embed, "patch_size", None), getattr(embed, "proj", None)
    side_by_side = (
        isinstance(convolution, nn.Conv2d)
        and convolution.kernel_size == convolution.stride == patch
        and (convolution.padding, convolution.dilation) == ((0, 0), (1, 1))
        and callable(getattr(embed, "dynamic_feat_size", None))
    )
    return embed if side_by_side else None


def _seen_mask(model: nn.Module, size: tuple[int, int]) -> Int[Tensor, "1 1 height width"]:
    """The mask from a recorded pass of two images that differ in every other patch, as on a chessboard.

    Whatever made the patches, they lie where the mask says if exactly the tokens of these patches differ.

    Raises:
        ValueError: The model does not take images of this size.
        UnsupportedModelError: Other tokens differ as well, or some of these do not.
    """
    parameter = next(model.parameters(), torch.zeros((), device="cpu"))
    random = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels(model), *size, generator=random, device="cpu").to(parameter)
    # Where the patches are has to be known before the images can differ there.
    trace = _trace(model, image.repeat(2, 1, 1, 1))
    mask = _mask(trace.grid, trace.patch, size).to(parameter.device)
    row, column = mask // trace.grid[1], mask % trace.grid[1]
    white = (row + column) % 2 == 0
    other = torch.where(white, torch.randn(image.shape, generator=random, device="cpu").to(image), image)
    trace = _trace(model, torch.cat([image, other]))
    one, two = trace.on_grid(trace.tokens)
    apart = (one - two).float().abs().amax(-1)
    rows, columns = (torch.arange(count, device=apart.device) for count in trace.grid)
    differs = (rows[:, None] + columns) % 2 == 0
    # Float error of a token, for kernels that do not give the same for the same patch at two places.
    noise = 16 * torch.finfo(trace.tokens.dtype).eps * float(one.abs().max())
    wrong = (apart > noise) != differs
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise UnsupportedModelError(
            f"{type(model).__name__} makes {trace.grid[0]} x {trace.grid[1]} tokens of {size[0]} x {size[1]} px, and "
            f"that in row {at[0]}, column {at[1]} {'does not change' if differs[tuple(at)] else 'changes'} when "
            f"{'the' if differs[tuple(at)] else 'only pixels outside the'} {trace.patch[0]} x {trace.patch[1]} px that "
            "would be its patch are changed; expected patches that lie side by side, each read by one token"
        )
    return mask


def _trace(model: nn.Module, images: Tensor) -> Trace:
    """The trace of a pass in eval mode, whatever the head makes of it; the modes of all modules are put back."""
    topology = find_topology(eager(model))
    try:
        with in_eval_mode(model), torch.inference_mode(False), torch.no_grad():
            recorder = topology.recorder(images)
            with run_eagerly, recorder:
                eager(model)(recorder.marked(images))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UnsupportedModelError | RecordingError):
            raise
        size = (images.shape[-2], images.shape[-1])
        raise ValueError(
            f"image_size is {size}; {type(model).__name__} does not run on images of that size: {one_line(error)}"
        ) from error
    end = recorder.recording.stream_end
    if end is None:
        raise RecordingError(f"{type(model).__name__} never ran the {type(topology.model).__name__} inside it")
    with torch.inference_mode(False), torch.enable_grad():
        # A score that reads every token: which of them the head reads is no matter of patches.
        recording = replace(recorder.recording, scores=end.flatten(1).mean(1, keepdim=True))
    with torch.inference_mode(False), torch.no_grad():
        check_seen(recording.call(topology.entrance).input.tensor, images)
        return placed(topology.trace(recording, (images.shape[-2], images.shape[-1])), recording)


def _grid(embed: Any, size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = embed.dynamic_feat_size(size)
    reason = size_not_taken(embed, size)
    if reason is not None:
        raise ValueError(f"image_size is {size}; {reason}")
    if rows < 1 or columns < 1:
        raise ValueError(f"image_size is {size}; expected at least one patch of {tuple(embed.patch_size)}")
    return int(rows), int(columns)
