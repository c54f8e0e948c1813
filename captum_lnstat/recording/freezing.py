"""A forward pass that is affine for autograd: norms, attention and gates in it are constants.

Values are those of the model's own functions; only the backward pass is another one. What is held constant: the
standard deviation of a LayerNorm, the root mean square of an RMSNorm, attention probabilities, the gate
``f(x) / x`` of an activation ``f``, and factors such as ``sigmoid(x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.constant_weights import writable
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.rms import RMS_NORMS
from captum_lnstat.recording.sites import FusedSite
from captum_lnstat.recording.statistics import accumulation_dtype

SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
LAYER_NORMS = {F.layer_norm, torch.layer_norm}
_ACTIVATIONS: set[Callable[..., Any]] = {
    F.gelu,
    F.silu,
    F.relu,
    torch.relu,
    Tensor.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.celu,
    F.selu,
    F.hardtanh,
    F.hardswish,
    F.mish,
    F.tanh,
    torch.tanh,
    Tensor.tanh,
    F.softsign,
}
_SIGMOIDS = {F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.hardsigmoid, F.softplus}
_ROOTS = {torch.rsqrt, Tensor.rsqrt}
_TIMES = {torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
_REFUSED = {
    F.multi_head_attention_forward: "torch.nn.MultiheadAttention",
    F.group_norm: "a GroupNorm",
    torch.group_norm: "a GroupNorm",
    F.instance_norm: "an InstanceNorm",
    F.glu: "torch.nn.GLU",
}


class FrozenGate(torch.autograd.Function):
    """``f(x)`` in value; in the backward pass ``gate * x`` with ``gate = f(x) / x`` a constant.

    Where ``x`` is 0 the gate is the mean of its two one-sided limits: 1/2 for GELU, SiLU and ReLU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        output = function(x)
        wide = x.to(accumulation_dtype(x))
        gate = output.to(wide.dtype) / wide
        step = wide.new_tensor([-(2.0**-40), 2.0**-40])
        gate = torch.where(wide == 0, (function(step) / step).mean(), gate)
        ctx.save_for_backward(gate)
        return writable(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate,) = ctx.saved_tensors
        return (gradient * gate).to(gradient.dtype), None


class FrozenRMSNorm(torch.autograd.Function):
    """``F.rms_norm`` in value; in the backward pass its root mean square is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        wide = x.to(accumulation_dtype(x))
        added = torch.finfo(x.dtype).eps if eps is None else eps
        ctx.save_for_backward((wide.square().mean(dims, keepdim=True) + added).sqrt(), weight)
        return writable(F.rms_norm(x, list(shape), weight, eps))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        root, weight = ctx.saved_tensors
        scaled = gradient if weight is None else gradient * weight
        return (scaled / root).to(gradient.dtype), None, None, None


class FrozenAttention(torch.autograd.Function):
    """``scaled_dot_product_attention`` in value; in the backward pass ``A v`` with ``A`` a constant: ``dv = A^T dO``.

    The value is the fused kernel's. The probabilities are computed again in the backward pass, some heads at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        # Detached, as without a graph: which kernel runs hangs on what requires a gradient.
        q, k, v = query.detach(), key.detach(), value.detach()
        output = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.detach(), **options)
        return writable(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        kept = None if mask is None else Kept.of(mask)
        scale, is_causal = ctx.options.get("scale"), ctx.options.get("is_causal", False)
        site = FusedSite("", Kept.of(query), Kept.of(key), Kept.of(value), kept, scale, is_causal, None)
        wide = gradient.to(accumulation_dtype(gradient))
        d_value = wide.new_zeros(*query.shape[:2], *value.shape[-2:])
        for queries, some_heads in site.chunks():
            for heads, attention in some_heads:
                d_value[:, heads] += attention.transpose(-2, -1).to(wide.dtype) @ wide[:, heads][:, :, queries]
        d_value = d_value.reshape(len(d_value), value.shape[1], -1, *d_value.shape[2:]).sum(
            2
        )  # query heads share a value head
        return None, None, d_value.to(gradient.dtype), None, None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    options |= dict(zip(("dropout_p", "is_causal", "scale", "enable_gqa"), rest, strict=False))
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or len(query) != len(value):
        raise UnsupportedModelError(
            f"attention from {tuple(query.shape)} to {tuple(key.shape)} cannot be held constant; expected queries, "
            "keys and values of (batch, heads, tokens, channels)"
        )
    return FrozenAttention.apply(query, key, value, attn_mask, options)  # type: ignore[no-any-return]


def frozen_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    """``F.layer_norm`` with its standard deviation a constant of the backward pass."""
    return FrozenLayerNorm.apply(input, tuple(normalized_shape), weight, bias, float(eps))  # type: ignore[no-any-return]


def frozen_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``F.rms_norm`` with its root mean square a constant of the backward pass."""
    return FrozenRMSNorm.apply(input, tuple(normalized_shape), weight, eps)  # type: ignore[no-any-return]


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), -1 if tensor.is_inference() else tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if version >= 0 and tensor._version != version:
        raise RecordingError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place later in the "
            "forward pass; expected a model that can be differentiated"
        )
    return tensor


class Freezer:
    """Calls a model's functions with everything frozen that is not affine."""

    def __init__(self) -> None:
        self._gates: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._gates.clear()

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of ``function``."""
        # Saved here and now, not by gradient checkpointing, which would run the model again with nothing frozen.
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return self._frozen(function, args, kwargs)

    def _frozen(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _REFUSED:
            raise UnsupportedModelError(
                f"the model runs {_REFUSED[function]}, which FrozenLayerNorm cannot hold constant; expected LayerNorm "
                "or RMSNorm, and attention by softmax or scaled_dot_product_attention"
            )
        if function in _TIMES:
            return function(*self._gated(args), **kwargs)
        frozen = self._rule(function, args[0] if args else kwargs.get("input"))
        if frozen is None:
            return function(*args, **kwargs)
        if not torch.is_grad_enabled():
            raise RecordingError(
                "a part of the model runs without a graph, so the score has no gradient at the input; expected a model "
                "and forward_func without no_grad, detach or re-entrant checkpointing"
            )
        return frozen(*args, **kwargs)

    def _rule(self, function: Callable[..., Any], input: Tensor | None) -> Callable[..., Any] | None:
        if function in LAYER_NORMS:
            return frozen_layer_norm
        if function in RMS_NORMS:
            return frozen_rms_norm
        if function is F.scaled_dot_product_attention:
            return _attention
        # Of (batch, classes) they make probabilities, as part of the score.
        factor = function in SOFTMAXES | _SIGMOIDS and input is not None and input.dim() >= 3
        if factor or function in _ROOTS:
            return lambda *args, **kwargs: function(*args, **kwargs).detach()
        if function in _ACTIVATIONS:
            return partial(self._activation, function)
        return None

    def _activation(self, function: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inplace = kwargs.pop("inplace", False)
        output: Tensor = FrozenGate.apply(input, lambda x: function(x, *args, **kwargs))
        if inplace:
            return input.copy_(output)
        self._gates[id(output)] = output
        return output

    def _gated(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """In a gated MLP, ``f(x1) * x2``, all of ``f(x1)`` is the gate."""
        if len(args) != 2 or not all(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return args
        gates = [id(arg) in self._gates for arg in args]
        if sum(gates) != 1 or args[0].shape != args[1].shape:
            return args
        return tuple(arg.detach() if gate else arg for arg, gate in zip(args, gates, strict=True))


def returns_moments(x: Tensor) -> bool:
    """Whether the kernel of a LayerNorm gives mean and ``1 / sigma`` of every token of ``x`` in full precision."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


class FrozenLayerNorm(torch.autograd.Function):
    """``F.layer_norm`` in value; in the backward pass its standard deviation is a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.dims = dims = tuple(range(-len(shape), 0))
        if returns_moments(x):
            normed, _, inverse = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        else:
            normed = F.layer_norm(x, list(shape), weight, bias, eps)
            inverse = (x.detach().to(accumulation_dtype(x)).var(dims, correction=0, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(inverse, weight)
        ctx.set_materialize_grads(False)  # no gradient, as of a quantised head, is another thing than one of zero
        return writable(normed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if gradient is None:
            return None, None, None, None, None
        inverse, weight = ctx.saved_tensors
        # With many scores at once this is large: no more copies of it than the one.
        scaled = gradient * inverse
        scaled = scaled if weight is None else scaled.mul_(weight)
        return scaled.sub_(scaled.mean(ctx.dims, keepdim=True)).to(gradient.dtype), None, None, None, None
