"""A model for larger images than its usual ones: the same weights, on more patches."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from captum_lnstat.errors import one_line
from captum_lnstat.evaluation.subject import Scores, Subject


def enlarged(subject: Subject, height: int, width: int) -> Subject:
    """The model for images of another size; the given one stays as it is.

    timm's models are told by their ``set_input_size``: position embeddings are resampled, and a Swin's windows stay as
    wide as they are, so that there are more of them. Other models are taken if they take such images as they are.

    Args:
        subject: The model for its usual images.
        height: Of the larger images.
        width: The same.

    Raises:
        ValueError: The model cannot take such images; the message says why.

    Example:
        >>> from captum_lnstat.evaluation.subject import read
        >>> twice = enlarged(read("swin-mini"), 128, 128)
        >>> twice.forward(torch.zeros(1, 3, 128, 128)).shape[0], twice.model.layers[0].blocks[0].window_size
        (1, (4, 4))
    """
    model = deepcopy(subject.model)
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    forward = Scores(model) if isinstance(subject.forward, Scores) else model
    try:
        resize: Any = getattr(model, "set_input_size", None)
        if callable(resize):
            resize((height, width), **_windows(model, resize))
        model.eval().to(subject.device)
        with torch.no_grad():
            forward(torch.zeros(1, 3, height, width, device=subject.device))
    except Exception as error:  # whatever a model may raise on images that it does not know
        usual = " x ".join(map(str, subject.frame.size))
        raise ValueError(
            f"{type(model).__name__} takes images of {usual} px and cannot be made to take {height} x {width}: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    if frozen:
        model.requires_grad_(False)  # a resampled position embedding is a new parameter
    return replace(subject, model=model, forward=forward)


def _windows(model: nn.Module, resize: Any) -> dict[str, tuple[int, int]]:
    """The windows of a Swin, for a ``set_input_size`` that would widen them with the image."""
    if "window_size" not in inspect.signature(resize).parameters:
        return {}
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "shift_size")]
    windows: list[tuple[int, int]] = [one.window_size for one in blocks if isinstance(one.window_size, tuple)]
    return {"window_size": max(windows)} if windows else {}
