"""RMSNorms, ``w * x / rms(x)``: those that run ``F.rms_norm``, and modules that compute it for themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.recording.constant_weights import writable
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.recording import NormCall
from captum_lnstat.recording.statistics import accumulation_dtype, mean_square

RMS_NORMS = {F.rms_norm, torch.rms_norm}
_EPSILONS = ("eps", "variance_epsilon", "epsilon")
# So many tokens are computed again, to see whether a module is what its name says.
_LOOKED_AT = 16
# A model in float64 may take its norms in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
HALF_TOLERANCE = 0.05


def rms_channels(module: nn.Module) -> int | None:
    """How many channels a module normalises together that is an RMSNorm by its name and its one weight.

    Example:
        >>> rms_channels(nn.RMSNorm(8)), rms_channels(nn.LayerNorm(8))
        (8, None)
    """
    if "rmsnorm" not in type(module).__name__.lower() or list(module.children()):
        return None
    weights = list(module.parameters(recurse=False))
    return len(weights[0]) if len(weights) == 1 and weights[0].dim() == 1 else None


def rms_norm_call(
    name: str,
    keep: Callable[[Tensor], Kept],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> NormCall:
    """The call of ``F.rms_norm`` in a module."""
    epsilon = torch.finfo(input.dtype).eps if eps is None else float(eps)
    return NormCall(name, "rms_norm", keep(input), len(tuple(normalized_shape)), weight, None, epsilon)


class FrozenScaling(torch.autograd.Function):
    """``output`` in value; in the backward pass ``factor * x`` with a constant factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return writable(output.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return (gradient * factor).to(gradient.dtype), None, None


def own_rms_norm(name: str, module: nn.Module, x: Kept, output: Tensor) -> NormCall | None:
    """The call of a module that computes an RMSNorm for itself; ``None`` if that is not what it returned.

    The weight may be stored less one.
    """
    read = x.tensor.detach()
    if output.shape != read.shape or read.shape[-1] != rms_channels(module):
        return None
    stored = next(module.parameters(recurse=False)).detach()
    epsilon = next((float(getattr(module, e)) for e in _EPSILONS if isinstance(getattr(module, e, None), float)), 0.0)
    some, seen = (t.reshape(-1, t.shape[-1])[:_LOOKED_AT].to(accumulation_dtype(t)) for t in (read, output.detach()))
    tolerance = TOLERANCE.get(output.dtype, HALF_TOLERANCE) * seen.abs().amax()
    for weight in (stored, stored + 1):
        made = weight * some / (mean_square(some) + epsilon).sqrt()[..., None]
        if bool((made - seen).abs().amax() <= tolerance):
            return NormCall(name, "rms_norm", x, 1, weight, None, epsilon)
    return None


def frozen(norm: NormCall, x: Tensor, output: Tensor) -> Tensor:
    """What such a module returned, its root mean square a constant of the backward pass."""
    assert norm.weight is not None
    root = (norm.statistics.variance + norm.eps).sqrt()[..., None]
    return FrozenScaling.apply(x, output, norm.weight / root)  # type: ignore[no-any-return]
