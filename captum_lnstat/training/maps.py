"""Explanations as pictures in an experiment logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from captum_lnstat.explanation.explanation import Explanation, unique_names


def takes_images(writer: object) -> bool:
    """Whether ``log_maps`` can write to it."""
    return hasattr(writer, "add_image") or hasattr(writer, "log")


def log_maps(
    writer: Any, explanations: Explanation | Sequence[Explanation], *, tag: str = "lnstat", step: int | None = None
) -> None:
    """Write the overlays of explanations to an experiment logger.

    Args:
        writer: A ``SummaryWriter`` of TensorBoard, or what else has ``add_image(tag, image, step, dataformats=)``; a
            run of Weights & Biases, or what else has ``log({tag: images})`` and takes ``wandb.Image``.
        explanations: What ``explain`` returned.
        tag: The heading; in TensorBoard ``tag/NAME`` for each image.
        step: Of the training; by default the writer's own count.

    Raises:
        TypeError: The writer takes no images.

    Example:
        >>> from captum_lnstat import explain, zoo
        >>> class Writer:
        ...     def add_image(self, tag, image, step, dataformats):
        ...         print(tag, image.shape, image.dtype, step, dataformats)
        >>> log_maps(Writer(), explain("vit-mini", zoo.scenes()[0].image), step=7)
        lnstat/image (64, 64, 3) uint8 7 HWC
    """
    found = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    if not takes_images(writer):
        raise TypeError(f"the writer is a {type(writer).__name__}; expected one with add_image or log")
    if hasattr(writer, "add_image"):
        for name, each in zip(unique_names([each.name for each in found]), found, strict=True):
            writer.add_image(f"{tag}/{name}", np.asarray(each.overlay), step, dataformats="HWC")
        return
    import wandb

    images = [wandb.Image(each.overlay, caption=str(each)) for each in found]
    writer.log({tag: images}, **({} if step is None else {"step": step}))
