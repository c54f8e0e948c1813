"""Norm calls of one pass: LayerNorms and RMSNorms, with frozen statistics where the head is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.recording.constant_weights import with_constant_weights
from captum_lnstat.recording.freezing import FrozenLayerNorm, frozen_rms_norm, returns_moments
from captum_lnstat.recording.kept import Arena, Kept
from captum_lnstat.recording.recording import NormCall
from captum_lnstat.recording.rms import frozen as frozen_as
from captum_lnstat.recording.rms import own_rms_norm, rms_norm_call


class Norms:
    """Runs norms as the model would, and notes what they read.

    Args:
        keep: Keeps what is to outlive the pass.
        call: Calls a function of the model's as the pass is to be differentiated.
        arena: Where what is copied is copied to.
        differentiable: What of the model gets a graph, as of ``Recorder``.

    Attributes:
        calls: What was noted, first to last.
    """

    def __init__(
        self,
        keep: Callable[[Tensor], Kept],
        call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
        arena: Arena | None,
        differentiable: str,
    ) -> None:
        self.keep, self.call = keep, call
        self._arena, self._differentiable = arena, differentiable
        self.calls: list[NormCall] = []

    def layer_norm(
        self,
        name: str,
        function: Any,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *rest: Any,
        frozen: bool,
        **kwargs: Any,
    ) -> Tensor:
        """A LayerNorm in the module of this name; ``frozen``: its statistics are constants."""
        shape, moments = tuple(normalized_shape), None
        kept = self.keep(input)
        if frozen:
            output = FrozenLayerNorm.apply(input, shape, weight, bias, float(eps))
        elif self._differentiable != "affine" and returns_moments(input):
            # What layer_norm itself calls. Reading the statistics here saves reading the tokens again for them.
            arguments = (input, shape, weight, bias, float(eps))
            if self._differentiable == "model":
                arguments, _ = with_constant_weights(function, arguments, {})
            output, *pair = torch.native_layer_norm(*arguments)
            if self._arena is not None and kept.original is not None:
                pair = [self._arena.put(moment, least=0)[0] for moment in pair]
            moments = (pair[0], pair[1])
        else:
            output = self.call(function, (input, normalized_shape, weight, bias, eps, *rest), kwargs)
        self.calls.append(NormCall(name, "layer_norm", kept, len(shape), weight, bias, float(eps), moments))
        return output  # type: ignore[no-any-return]

    def rms_norm(
        self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, frozen: bool
    ) -> Callable[..., Any]:
        """An RMSNorm in the module of this name: the function that is to be called for it."""
        self.calls.append(rms_norm_call(name, self.keep, *args, **kwargs))
        return frozen_rms_norm if frozen else function

    def own_rms_norm(self, name: str, module: nn.Module, x: Tensor, output: Tensor, *, frozen: bool) -> Tensor:
        """What a module returned that computes an RMSNorm for itself: frozen in the head, else as it is."""
        if self._differentiable == "affine" or (self.calls and self.calls[-1].module == name):
            return output
        norm = own_rms_norm(name, module, self.keep(x), output)
        if norm is None:
            return output
        self.calls.append(norm)
        return frozen_as(norm, x, output) if frozen else output
