"""The head as a function: what was called since it began, to be called again with other tokens in their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.ending import StreamEnd
from captum_lnstat.recording.swapped import swapped

if TYPE_CHECKING:
    from jaxtyping import Float

# Function, arguments, and what it returned.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


def caller_autocast(device: str) -> torch.autocast:
    """Autocast as it is here, to run something as it would run here."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


@dataclass
class Tape:
    """The calls of torch's functions in one pass since its head began.

    Attributes:
        end: The end of the residual stream.
        keeps: Whether they are kept.
        calls: First to last.
        autocast: The head ran so.
    """

    end: StreamEnd
    keeps: bool = True
    calls: list[Call] = field(default_factory=list)
    autocast: torch.autocast | None = None

    def ran(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A function has run."""
        if self.keeps and self.end.passed_on is not None:
            self.autocast = self.autocast or caller_autocast(self.end.passed_on.device.type)
            self.calls.append((function, args, kwargs, output))

    def of_one_token(self, token: Float[Tensor, "batch channel"], wanted: Tensor) -> Tensor:
        """What the head would have returned if every token at the end of the stream were this one.

        Args:
            token: The token of every image.
            wanted: What the head returned.

        Raises:
            RecordingError: It was not made by functions of torch alone.
        """
        known = {id(self.end.passed_on): self.end.of_one_token(token)}

        def known_of(tensor: Tensor) -> Tensor:
            return known.get(id(tensor), tensor)

        with self.autocast or nullcontext():
            for function, args, kwargs, output in self.calls:
                others, named = swapped(args, known_of), swapped(kwargs, known_of)
                if others is not args or named is not kwargs:
                    _note(output, function(*others, **named), known)
        if id(wanted) not in known:
            raise RecordingError(
                "the scores of one token cannot be made, since not all of the head is functions of torch; expected a "
                "forward_func that returns what they return"
            )
        return known[id(wanted)]


def _note(output: Any, again: Any, known: dict[int, Tensor]) -> None:
    """What a function returned is known from now on."""
    if isinstance(output, Tensor):
        known[id(output)] = again
    elif isinstance(output, tuple | list):
        for one, other in zip(output, again, strict=True):
            _note(one, other, known)
