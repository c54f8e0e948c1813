"""Explicit attention: the output of a softmax, followed to its product with the values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.recording.attention_backward import ObservedProduct, product_can_be_observed
from captum_lnstat.recording.kept import Arena, Kept, edge
from captum_lnstat.recording.sites import SoftmaxSite

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
# What may stand between the softmax and the product with the values without being another quantity.
_PASSING = {F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.contiguous, Tensor.float, Tensor.half}
# An einsum that is the product of maps with values: ``...ij,...jd->...id``.
_EINSUM = re.compile(r"(\w*)(\w)(\w),\1\3(\w)->\1\2\4")


@dataclass
class SoftmaxEvent:
    """A softmax output on its way to the product with the values."""

    module: str
    attention: Kept
    value: Kept | None = None
    output: GradientEdge | None = None
    given: Kept | None = None
    multiplied: bool = False

    @property
    def site(self) -> SoftmaxSite:
        """The attention site, once the pass is over."""
        return SoftmaxSite(self.module, self.attention, self.value, self.output, given=self.given)


class Softmaxes:
    """The softmaxes of a pass whose outputs may still be multiplied with values.

    Args:
        arena: Where large tensors are copied to for the recording, if they are.
        attends_to: Is given the values of every product.
        detailed: Keep what they read, too.
    """

    def __init__(self, arena: Arena | None, attends_to: Callable[[Tensor], None], *, detailed: bool = False) -> None:
        self._arena, self._attends_to, self._detailed = arena, attends_to, detailed
        # By identity; the tensor is held, so that no other gets its identity.
        self._events: dict[int, tuple[Tensor, SoftmaxEvent]] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._events.clear()

    def reads_one(self, args: tuple[Any, ...]) -> bool:
        """Whether a function reads the output of a softmax first."""
        return bool(args) and id(args[0]) in self._events

    def begin(
        self, module: str, output: Tensor, input: Tensor, dim: int | None = None, *_: Any, **__: Any
    ) -> SoftmaxEvent | None:
        """A softmax has run: an attention's if it is over the keys, the last of at least three dimensions."""
        if input.dim() < 3 or dim not in (-1, input.dim() - 1):
            return None
        given = Kept.on(self._arena, input) if self._detailed else None
        event = SoftmaxEvent(module, Kept.on(self._arena, output), given=given)
        self._events[id(output)] = (output, event)
        return event

    def follow(self, function: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Another function has run."""
        if function is torch.einsum and len(args) == 3 and _is_product(args[0]):
            function, args = torch.matmul, args[1:]
        if not self.reads_one(args) or not isinstance(output, Tensor):
            return
        _, event = self._events[id(args[0])]
        if function in _PASSING:
            self._events[id(output)] = (output, event)
        elif function in _PRODUCTS and not event.multiplied:
            values = args[1] if len(args) > 1 else next(iter(kwargs.values()))
            self._attends_to(values)
            event.value = Kept.on(self._arena, values)
            event.output = edge(output)
            event.multiplied = True

    def product(self, function: Any, args: tuple[Any, ...]) -> Tensor | None:
        """The product of maps with values, with a backward pass that feeds its observer, if this is one."""
        if function not in _PRODUCTS or len(args) != 2 or not self.reads_one(args):
            return None
        attention, value = args
        _, event = self._events[id(attention)]
        site = SoftmaxSite(event.module, event.attention, Kept.on(self._arena, value), None)
        if event.multiplied or not product_can_be_observed(site, attention, value):
            return None
        output: Tensor = ObservedProduct.apply(attention, value, site)
        return output


def _is_product(equation: Any) -> bool:
    found = _EINSUM.fullmatch(equation.replace(" ", "")) if isinstance(equation, str) else None
    return found is not None and len({*found[1], *found.group(2, 3, 4)}) == len(found[1]) + 3
