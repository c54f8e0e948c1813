"""A model's weights as constants of its graph: what only their gradients would need is not kept.

For the gradient of a weight, autograd keeps what the weight was multiplied with: the input of every Linear, about half
of what a transformer's graph holds. No rule takes such a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.recording.devices import has_a_queue

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_WEIGHTED: set[Callable[..., Any]] = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.layer_norm,
    torch.layer_norm,
    F.rms_norm,
    F.batch_norm,
    F.group_norm,
    F.multi_head_attention_forward,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.mul_,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__imul__,
    Tensor.__rmul__,
}
# A table of relative positions is looked up: attention with a mask that has a gradient takes the slow kernel.
_LOOKED_UP: set[Callable[..., Any]] = {Tensor.__getitem__}


def constant(value: Any) -> Any:
    """A parameter without its gradient; anything else as it is.

    Example:
        >>> constant(nn.Linear(2, 1).weight).requires_grad
        False
    """
    return value.detach() if isinstance(value, nn.Parameter) and value.requires_grad else value


def with_constant_weights(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with parameters that have no gradient, if the function is one that multiplies by them."""
    if function not in _WEIGHTED | _LOOKED_UP or _watched():
        return args, kwargs
    if function in _LOOKED_UP:
        return (*map(constant, args[:1]), *args[1:]), kwargs
    # What is written into stays itself.
    return (args[:1] + tuple(map(constant, args[1:]))), {name: constant(value) for name, value in kwargs.items()}


def writable(output: Tensor) -> Tensor:
    """What a forward pass of one's own returns, as a tensor that the model may go on to change in place.

    Some kernels, by version and device, return a view of a tensor that nobody else holds (``F.linear`` from torch 2.14
    on). Autograd forbids writing into a view that an ``autograd.Function`` returned; without its base it is no view.

    Example:
        >>> writable(torch.zeros(4).view(2, 2))._is_view()
        False
    """
    return output.data


class ConstantLinear(torch.autograd.Function):
    """``F.linear`` with constant weights; only rows of the gradient that are not zero are multiplied, if they are few.

    The head of a model that reads its class token leaves all other tokens of the last block without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return writable(F.linear(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        few = few_rows(rows)
        if few is None:
            return gradient @ weight, None, None
        slope = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        slope.flatten(0, -2)[few] = rows[few] @ weight
        return slope, None, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, as ``ConstantLinear`` if the weights are constants."""
    if plain(input, weight) and input.dim() > 1 and not weight.requires_grad and not getattr(bias, "requires_grad", 0):
        output: Tensor = ConstantLinear.apply(input, weight, bias)
        return output
    return F.linear(input, weight, bias)


def plain(*tensors: Tensor) -> bool:
    """Whether a call with these, whose gradient is wanted, may be given a backward pass of another kind.

    They are tensors of no other type, on a device without a queue (the CPU), without autocast, in a graph whose saved
    tensors nobody looks after.
    """
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(type(tensor) in (Tensor, nn.Parameter) and not has_a_queue(tensor.device) for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not _watched()
    )


def _watched() -> bool:
    """Whether somebody else looks after what is saved for the backward pass.

    Gradient checkpointing runs the calls again, where nobody replaces their weights, and counts what was saved.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("nothing is saved here"):
            return False
    except RuntimeError:
        return True


# Rows are picked out where they are fewer than one in so many.
FEW = 4
# So many of them are looked at first.
SAMPLE = 64


def few_rows(gradient: Float[Tensor, "row *rest"]) -> Int[Tensor, " row"] | None:
    """The rows that are not zero, ascending, if they are few; ``None`` if not, and off the CPU.

    One entry of some rows is looked at first: a gradient at every token shows in them, and is not read. On another
    device, the answer would have to be waited for.

    Example:
        >>> gradient = torch.zeros(8, 2)
        >>> gradient[3] = 1
        >>> few_rows(gradient), few_rows(gradient + 1)
        (tensor([3]), None)
    """
    if has_a_queue(gradient.device) or gradient.numel() == 0:
        return None
    sample = gradient[:: -(-len(gradient) // SAMPLE)].flatten(1)[:, 0]
    if FEW * int(sample.count_nonzero()) > len(sample):
        return None
    found = gradient.ne(0).flatten(1).any(1).nonzero()[:, 0]
    return found if FEW * len(found) <= len(gradient) else None


def either(one: Int[Tensor, " row"] | None, other: Int[Tensor, " row"] | None) -> Int[Tensor, " row"] | None:
    """The rows of both, ascending; ``None`` is all of them."""
    return None if one is None or other is None else torch.unique(torch.cat([one, other]))
