"""Modules that are affine once LayerNorm statistics are frozen, and how a cotangent is pulled back through them.

A strided convolution, a pooling, a patch embedding, the shortcut around a convolution block. The transpose is
autograd's: the module, a small part of the model, runs once more on what it was given, with its norms frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.freezing import LAYER_NORMS, frozen_layer_norm
from captum_lnstat.trace.cotangent import Cotangent, PullBack

# A pooling by the maximum takes the same tokens however the cotangent is, so it is a linear map of what it was given.
_AFFINE = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool2d,
    nn.Identity,
    nn.Dropout,
)
# How far a module may be from what it returned when it was recorded, in the size of that.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_TOLERANCE = 0.05

Layout = Callable[[Tensor], Tensor]


def is_affine(module: nn.Module) -> bool:
    """Whether everything in a module is affine with frozen norms, and it is more than a container without parts.

    Example:
        >>> is_affine(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
        True
        >>> is_affine(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()))
        False
    """
    children = list(module.children())
    if children:
        return all(is_affine(child) for child in children)
    return isinstance(module, _AFFINE)


class _FrozenNorms(TorchFunctionMode):
    """LayerNorms with their standard deviation a constant of the backward pass."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in LAYER_NORMS:
            return frozen_layer_norm(*args, **kwargs)
        return function(*args, **kwargs)


def pull_back_by_autograd(
    name: str,
    function: Callable[[Tensor], Any],
    given: Tensor,
    layouts: tuple[Layout, Layout],
    before: Tensor,
    after: Tensor,
    training: bool,
) -> PullBack:
    """The pull-back of a step whose ``after`` is an affine function of what it was given.

    ``<u, f(x)> = <J^T u, x> + constant`` with ``J`` the Jacobian of ``f`` at ``x``, norms frozen.

    Args:
        name: Of the step, for messages.
        function: From ``given`` to the stream after it, in the model's own layout.
        given: The stream before it, in the model's own layout.
        layouts: From what is given, and from what is returned, to ``(batch, token, channel)``.
        before: The stream before it, so laid out.
        after: The stream after it, so laid out.
        training: The function may do something else now than it did.

    Returns:
        From the cotangent after it to the cotangent before it and the constant, ``(batch, score)``.
    """

    def pull_back(u: Cotangent) -> tuple[Cotangent, Tensor]:
        leaf = given.detach().requires_grad_()
        with torch.enable_grad(), _FrozenNorms():
            returned = function(leaf)
            first = returned[0] if isinstance(returned, tuple) else returned
            made = layouts[1](first)
        if not training:
            _check_same(name, made.detach(), after, given.dtype)
        dense = u.spread(u.dense().flatten(2)).reshape(*made.shape[:2], u.scores, -1).to(made.dtype)
        slopes = [
            torch.autograd.grad(made, leaf, dense[:, :, score], retain_graph=score + 1 < u.scores)[0]
            for score in range(u.scores)
        ]
        slope = torch.stack([layouts[0](one) for one in slopes], 2)
        linear = torch.einsum("bnc,bnsc->bs", before, slope)
        return Cotangent.of(slope), u.read(after).sum(1) - linear

    return pull_back


def _check_same(name: str, made: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    if made.shape != after.shape or bool((made - after).abs().amax() > tolerance * after.abs().amax()):
        raise RecordingError(
            f"{name!r} does not return again what it returned in the recorded pass; expected convolutions, poolings "
            "and norms that always do the same"
        )
