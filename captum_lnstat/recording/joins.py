"""Tokens that were joined before the head, and what of them are parameters: class token, registers, prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}


class Joins:
    """What was joined along the tokens in a pass.

    Args:
        tokens_first: Whether a stream has its tokens before its batch.

    Attributes:
        sizes: How many tokens each part had, for each such call.
        constants: Those parts that are parameters, or views of one, and parameters that were repeated.
    """

    def __init__(self, tokens_first: Callable[[Tensor], bool] | None = None) -> None:
        self._tokens_first = tokens_first
        self.sizes: list[tuple[int, ...]] = []
        self.constants: list[Tensor] = []

    def note(self, function: Callable[..., Any], output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of a function; of most there is nothing to note."""
        if function in CONCATENATIONS:
            self._join(*args, **kwargs)
        elif function is Tensor.repeat and _is_parameter(args[0]):
            self.constants.append(output.detach())

    def _join(self, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
        if not all(isinstance(part, Tensor) and part.dim() == 3 for part in tensors):
            return
        first = self._tokens_first is not None and dim in (0, -3) and all(map(self._tokens_first, tensors))
        if first or dim in (1, -2):
            self.sizes.append(tuple(part.shape[dim] for part in tensors))
            self.constants += [part.detach() for part in tensors if _is_parameter(part)]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
