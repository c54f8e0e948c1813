"""Checks of what the public classes are given."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.verdicts import expect
from captum_lnstat.rules.checks import check_image


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_switch(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False; a string such as ``"no"`` would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")


def check_memory(value: object) -> int | None:
    """The bytes, if they are a positive number of them; ``None`` is no bound."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"max_memory is {value!r}; expected a number of bytes, or None for as many as fit")
    return value


def check_finite(grid: Tensor) -> Tensor:
    """The relevance, if it is finite."""
    expect(
        grid - grid == 0,
        lambda: RecordingError(
            "the relevance is not finite: something in the forward pass overflowed. Expected activations whose "
            "variance fits the model's dtype"
        ),
    )
    return grid


def the_image(inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The image batch in either of Captum's forms, or an error that says what is wrong with it."""
    if isinstance(inputs, tuple) and len(inputs) != 1:
        raise ValueError(
            f"inputs is a tuple of {len(inputs)}; expected one image batch. Pass what else the model takes as "
            "additional_forward_args"
        )
    return check_image(inputs[0] if isinstance(inputs, tuple) else inputs)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts of a batch in one; a single part as it is."""
    with torch.inference_mode(False), torch.no_grad():
        return parts[0] if len(parts) == 1 else torch.cat(parts)
