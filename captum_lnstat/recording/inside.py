"""What blocks made inside themselves, and is read outside them: taken by a hook, an attribute, a second output.

Inside blocks nothing gets a graph, and only what they return is marked as a place that a score may read. So what was
made there is known by its identity; where a function outside is given one of these tensors, it is given it marked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_lnstat.recording.swapped import swapped


class Inside:
    """The tensors that were made inside blocks in one pass.

    Attributes:
        read: Those that were read outside, by the name of the place that a score may read.
    """

    def __init__(self) -> None:
        # By identity; a tensor that is gone gives its identity away.
        self._made: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        # What is held here keeps its identity.
        self._marked: dict[int, tuple[Tensor, Tensor]] = {}
        self.read: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the pass, but for what was read."""
        self._made.clear()
        self._marked.clear()

    def made(self, module: str, args: tuple[Any, ...], output: Any) -> Any:
        """A function has run inside a block, in a module: what it returned."""
        if type(output) is Tensor:
            # What was returned as it was given was made elsewhere, and what has a graph is marked.
            if not (args and output is args[0]) and not output.requires_grad:
                self._made[id(output)] = weakref.ref(output), module
        elif type(output) in (tuple, list):
            for one in output:
                self.made(module, args, one)
        return output

    def outside(self, value: Any, mark: Callable[[str, Tensor], Tensor]) -> Any:
        """What a function outside is given: the same, with what was made inside blocks as ``mark`` marks it."""
        return swapped(value, partial(self._seen, mark)) if self._made else value

    def _seen(self, mark: Callable[[str, Tensor], Tensor], tensor: Tensor) -> Tensor:
        reference, module = self._made.get(id(tensor), (None, ""))
        if reference is None or reference() is not tensor or not tensor.is_floating_point():
            return tensor
        if id(tensor) not in self._marked:
            if torch.is_inference_mode_enabled():
                return tensor
            name = f"the inside of {module}"
            before = sum(other.partition(" (")[0] == name for other in self.read)
            name += f" ({before + 1})" if before else ""
            self.read[name] = tensor.detach()
            self._marked[id(tensor)] = tensor, mark(name, tensor)
        return self._marked[id(tensor)][1]
