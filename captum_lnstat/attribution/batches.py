"""A large batch explained in chunks of its images, as Captum's ``internal_batch_size`` does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from captum_lnstat.recording.forward import ForwardArgs, Target, format_additional_forward_args, validate_target
from captum_lnstat.rules.checks import check_numbers


def chunks(
    image: Tensor, target: Target, additional_forward_args: ForwardArgs, internal_batch_size: int | None
) -> Iterator[tuple[Tensor, Target, ForwardArgs]]:
    """Images with their targets and arguments, at most ``internal_batch_size`` images at a time.

    Targets, and tensors among the arguments with one row an image, are split with the images. Tensors without a batch
    (0-d, or of one row), and what is no tensor, are given to every chunk. Captum's own generator would cut those too,
    and needs images with a gradient.

    Raises:
        TypeError, ValueError: The size is not a positive int, or an argument is neither one row an image nor one for
            all, so that it cannot be told how to split it.
        AssertionError: There are not as many targets as images; Captum's own check and message.

    Example:
        >>> import torch
        >>> parts = chunks(torch.zeros(5, 3, 8, 8), [0, 1, 2, 3, 4], None, 2)
        >>> [(len(image), target) for image, target, _ in parts]
        [(2, [0, 1]), (2, [2, 3]), (1, [4])]
    """
    _check_batch_size(internal_batch_size)
    count = len(image)
    if internal_batch_size is None or count <= internal_batch_size:
        yield image, target, additional_forward_args
        return
    check_numbers(image)  # of all of them, before the first is explained
    validate_target(count, target)
    arguments = format_additional_forward_args(additional_forward_args) or ()
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) not in (1, count):
            raise ValueError(
                f"additional_forward_args[{position}] has shape {tuple(argument.shape)}, the batch {count} images; "
                f"expected a tensor of {count} rows or of one, since internal_batch_size={internal_batch_size} splits "
                "tensors with the images. Leave internal_batch_size out, or close over the tensor in forward_func"
            )
    for begin in range(0, count, internal_batch_size):
        part = slice(begin, begin + internal_batch_size)
        one_an_image = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
        yield (
            image[part],
            target[part] if one_an_image else target,  # type: ignore[index]
            tuple(_rows(argument, part, count) for argument in arguments) or None,
        )


def _check_batch_size(internal_batch_size: object) -> None:
    """Raise unless it is ``None`` or a positive int."""
    if internal_batch_size is None:
        return
    if isinstance(internal_batch_size, bool) or not isinstance(internal_batch_size, int):
        raise TypeError(
            f"internal_batch_size is {internal_batch_size!r}; expected a positive int, or None for the whole batch"
        )
    if internal_batch_size < 1:
        raise ValueError(
            f"internal_batch_size is {internal_batch_size}; expected at least 1, or None for the whole batch"
        )


def _rows(argument: Any, part: slice, count: int) -> Any:
    splits = isinstance(argument, Tensor) and argument.dim() > 0 and len(argument) == count
    return argument[part] if splits else argument
