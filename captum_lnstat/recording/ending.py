"""The end of the residual stream: where it is cut for a head that is differentiated by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.following import Following
from captum_lnstat.recording.kept import Kept


class Passed(torch.autograd.Function):
    """A tensor in place of the leaf that a gradient is taken at: the same numbers, but the model's own to change."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # no gradient is another thing than one of zero
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return gradient, None


@dataclass
class StreamEnd:
    """The end of the stream of one pass, once the model has reached it.

    Attributes:
        model: Name of the model's class, for errors.
        channels_first: Whether a map there has its channels before its rows.
        width: How many channels it has, where they may be first or last.
        tokens_first: Whether a stream has its tokens before its batch.
        cut: The head is to have a graph of its own, which begins here.
        keep: Keeps what is to outlive the pass.
        following: Follows rows from here on.
        tensor: The stream, batch first and channels last.
        passed_on: What the model goes on with.
        moved: The dimensions of what it is given that were moved for ``tensor``.
        passes: How often the model has begun to run.
        refused: An error was raised here.
    """

    model: str
    channels_first: bool
    width: int | None
    tokens_first: Callable[[Tensor], bool] | None
    cut: bool
    keep: Callable[[Tensor], Kept]
    following: Following
    tensor: Tensor | None = None
    passed_on: Tensor | None = None
    moved: tuple[int, int] | None = None
    passes: int = 0
    refused: bool = False

    def begin_head(self, name: str, given: Tensor) -> Tensor:
        """The head begins at what a module is given or returned: what the model goes on with."""
        self.refused = True
        self._check(name)
        self.refused = False
        moved = None
        if given.dim() == 4 and (self.channels_first or given.shape[1] == self.width != given.shape[3]):
            moved = 1, -1
        elif self.tokens_first is not None and self.tokens_first(given):
            moved = 1, 0
        self.moved = moved
        passed = self.tensor = given if moved is None else given.movedim(*moved)
        if self.cut:
            torch.set_grad_enabled(True)  # until the recorder is left
            # Where it lies is where what was kept of it lies.
            self.tensor = self.keep(passed.detach()).tensor.detach().requires_grad_()
            passed = Passed.apply(self.tensor, passed.detach())
        begun = passed if moved is None else passed.movedim(*moved[::-1])
        # Of tokens before the batch, the rows that are followed are still the images.
        self.following.head_begins(passed if moved == (1, 0) else begun)
        self.passed_on = begun
        return begun

    def of_one_token(self, token: Tensor) -> Tensor:
        """What the model would go on with if every token were the one of its image, ``(batch, channel)``."""
        assert self.tensor is not None
        one = token.to(self.tensor.dtype).reshape(len(token), *[1] * (self.tensor.dim() - 2), -1)
        tokens = one.expand_as(self.tensor)
        return (tokens if self.moved is None else tokens.movedim(*self.moved[::-1])).clone()

    def _check(self, name: str) -> None:
        if torch.is_inference_mode_enabled():
            raise RecordingError(
                "forward_func runs the model under torch.inference_mode, where nothing can be differentiated, not even "
                "its head; use torch.no_grad there, or nothing"
            )
        if self.tensor is not None and self.passes > 1:
            raise RecordingError("the model ran more than once in one forward_func call; expected exactly one pass")
        if self.tensor is not None:
            raise RecordingError(
                f"{name!r}, where the head of {self.model} begins, ran more than once in one pass; "
                "expected it to read the whole stream once. A head that reads the stream in parts, or layers that "
                "share their weights, are not known of this family"
            )
