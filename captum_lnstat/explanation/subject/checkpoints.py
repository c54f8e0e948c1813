"""Weights from a file: only tensors are read, and they have to fit."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from torch import Tensor

from captum_lnstat.errors import SourceError


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in one that ``torch.save`` wrote.

    Raises:
        SourceError: There is no such file, or it holds no state dict.
    """
    if not path.is_file():
        raise SourceError(f"there is no checkpoint file {str(path)!r}")
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        raise SourceError(
            f"{str(path)!r} cannot be read as a checkpoint, {type(error).__name__}: "
            f"{textwrap.shorten(str(error), 200)}; expected safetensors, or tensors that torch.save wrote"
        ) from None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise SourceError(f"{str(path)!r} holds no state dict; expected tensors by name")
    return state


def load_checkpoint(model: Any, name: str, state: dict[str, Tensor], path: Path) -> None:
    """Load strictly; the head of one of timm's models is first made as large as the checkpoint's.

    Raises:
        SourceError: The weights are those of another model.
    """
    if hasattr(model, "get_classifier") and hasattr(model, "reset_classifier"):
        weight = state.get(f"{_classifier(model)}.weight")
        if weight is not None and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # One line for each kind of misfit, each as long as the model has parameters.
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise SourceError(
            f"the checkpoint {str(path)!r} does not fit {name}: {textwrap.shorten(lines[0], 200)}"
        ) from None


def _classifier(model: Any) -> str:
    """Dotted name of the classifier, of the first one if there are several, or nothing."""
    head = model.get_classifier()
    head = head[0] if isinstance(head, tuple | list) else head
    return next((name for name, module in model.named_modules() if module is head), "")
