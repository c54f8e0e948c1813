"""Places of the residual stream that a score may read: what blocks, and modules before them, return.

A head need not read the end of the stream alone: it may read earlier blocks as well, a network beside the transformer,
or the image. So every such place is marked in the head's graph, and the score's gradient at it says whether, and how,
it is read there. Inside the modules nothing gets a graph: only what lies between and beside them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.inside import Inside

# The name of the images among the places: that of no module.
IMAGE = "the image"


class Marked(torch.autograd.Function):
    """The same numbers in the same memory, at the beginning of a graph: its node knows the gradient there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Places:
    """Marks what each of some modules returns, and runs them without a graph.

    So it does with modules beside them that run before the first of them, such as the patch embedding. What is marked
    takes no memory, and is the model's to change.

    Args:
        model: What the modules are in.
        modules: The blocks and all else that the residual stream leaves by.
        same: Is told of every tensor that is marked, and what it is passed on as.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], same: Callable[[Tensor, Tensor], None]) -> None:
        self._modules, self._same = set(modules), same
        around = _around(model, self._modules)
        beside = {child for part in around - self._modules for child in part.children()}
        self._before = beside - around
        self._anchor = torch.zeros(0, requires_grad=True, device="cpu")  # what a graph needs to begin at
        self._entered: list[tuple[nn.Module, bool]] = []
        self.any_left = False  # the first of the modules has run: what comes now may be the head's
        self.edges: dict[str, GradientEdge] = {}
        self.within = Inside()

    def __bool__(self) -> bool:
        return bool(self._modules)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._modules or module in self._before

    @property
    def inside(self) -> bool:
        """One of the modules is running."""
        return bool(self._entered)

    def mark(self, name: str, x: Tensor) -> Tensor:
        """The same tensor, marked."""
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise UnsupportedModelError(
                f"forward_func runs the model inside a transform of torch.func (vmap, grad, jvp), seen at {name!r}; "
                "expected a plain call: the model takes a whole batch as it is"
            )
        with torch.enable_grad():
            marked: Tensor = Marked.apply(self._anchor, x)
        self.edges[name] = get_gradient_edge(marked)
        self._same(x, marked)
        return marked

    def enter(self, module: nn.Module) -> None:
        """A module is about to run."""
        if module in self._modules or (module in self._before and not self.any_left):
            self._entered.append((module, torch.is_grad_enabled()))
            torch.set_grad_enabled(False)

    def leave(self, name: str, module: nn.Module, output: Any) -> Any:
        """A module has run, or failed: what is passed on in place of its output, ``None`` for the output itself."""
        if not self._entered or self._entered[-1][0] is not module:
            return None
        torch.set_grad_enabled(self._entered.pop()[1])
        self.any_left = self.any_left or module in self._modules
        first = output[0] if type(output) is tuple and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point() or torch.is_inference_mode_enabled():
            return None
        marked = self.mark(name, first)
        return marked if first is output else (marked, *output[1:])


def _around(model: nn.Module, modules: set[nn.Module]) -> set[nn.Module]:
    """The modules that hold one of some modules, these among them; every one is looked at once."""
    holds: dict[nn.Module, bool] = {}

    def look(part: nn.Module) -> bool:
        if part not in holds:
            below = [look(child) for child in part._modules.values() if child is not None]
            holds[part] = part in modules or any(below)
        return holds[part]

    look(model)
    return {part for part, one in holds.items() if one}
