"""A function of tensors as one graph of operations, for other numbers of the same shapes.

What the function decides by a number is decided once, where it is captured. Every such decision is part of the graph as
a condition: whether the function would decide so again for the numbers that the graph is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.devices import as_if_queued

if TYPE_CHECKING:
    from torch.fx import GraphModule

_READ = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Whether two tensors are the same.
_ALIKE: dict[str, Callable[..., Tensor]] = {"equal": torch.eq, "allclose": torch.isclose}
# What leaves torch, where nothing can be followed.
_LEAVES = {"numpy", "__array__", "__dlpack__", "__cuda_array_interface__", "__array_interface__"}


def capture(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> GraphModule:
    """The operations of ``function``, which returns tensors, and at last whether all it decided holds: ``()`` of bool.

    Args:
        function: Runs on ``inputs``, once.
        inputs: Tensors of the shapes that the graph will be given.

    Raises:
        UnsupportedModelError: A number of the inputs that is no decision is read, or the tensors leave torch.

    Example:
        >>> graph = capture(lambda x: (x * 2 if bool(x.sum() > 0) else x,), (torch.ones(2),))
        >>> graph(torch.ones(2))
        (tensor([2., 2.]), tensor(True))
        >>> graph(-torch.ones(2))[1]  # the other way would have been gone
        tensor(False)
    """
    decisions: list[Tensor] = []

    def decided(*tensors: Tensor) -> tuple[Tensor, ...]:
        with _Decides(decisions), _Reads(decisions):
            returned = function(*tensors)
        always = torch.ones((), dtype=torch.bool, device=inputs[0].device)
        return (*returned, torch.stack([always, *(holds.reshape(()) for holds in decisions)]).all())

    with ExitStack() as stack:
        stack.enter_context(as_if_queued())
        # A backward pass in threads of its own would be out of sight.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        return make_fx(decided, tracing_mode="real")(*inputs)


def for_a_compiler(graph: GraphModule, inputs: tuple[Tensor, ...]) -> GraphModule:
    """The same graph, in which nothing is written into and nothing has to be a view.

    A compiler may lay tensors out in memory otherwise, where a view is not to be had. If nothing writes, a copy does.
    """
    graph = make_fx(functionalize(graph, remove="mutations"), tracing_mode="real")(*inputs)
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


class _Decides(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What an operation tells the host is found outside the graph; that it is so again is a condition of the graph."""

    def __init__(self, decisions: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decisions = decisions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        if name == "index":
            return func(args[0], self._places(args[1]))
        # The host has to know the numbers, or a shape hangs on them.
        if name != "is_nonzero" and not _READ & set(func.tags):
            return func(*args, **kwargs)
        with disable_proxy_modes_tracing():
            value = func(*args, **kwargs)
        if name in _ALIKE:
            if args[0].shape == args[1].shape:
                self._decisions.append(_ALIKE[name](*args, **kwargs).all() == value)
            return value
        if isinstance(value, float):
            raise _not_a_decision(f"the number {value:.4g}")
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                if one.is_floating_point() and name != "nonzero":
                    raise _not_a_decision(f"what {name} finds")
                self._known(one != 0 if name == "nonzero" else one)
        return value

    def _known(self, tensor: Tensor) -> Tensor:
        """The values of a tensor as they are here, which they have to be again."""
        with disable_proxy_modes_tracing():
            known = tensor.clone()
        self._decisions.append((tensor == known).all())
        return known

    def _places(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Where masks are true, in the place of masks."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            known = self._known(index)
            with disable_proxy_modes_tracing():
                found += known.nonzero(as_tuple=True)
        return found


class _Reads(TorchFunctionMode):
    """What reads the memory of a tensor past all operations."""

    def __init__(self, decisions: list[Tensor]) -> None:
        super().__init__()
        self._decisions = decisions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES:
            raise _not_a_decision(f"a tensor of shape {tuple(args[0].shape)} given to NumPy or another library")
        if name == "tolist":
            with disable_proxy_modes_tracing():
                value = args[0].detach().clone()
            self._decisions.append((args[0] == value).all())
            with disable_proxy_modes_tracing():
                return value.tolist()
        return func(*args, **(kwargs or {}))


def _not_a_decision(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this cannot be compiled: {what} is taken out of torch on the way, and would be the same for all images from "
        "then on. Expected a model and forward_func that are functions of torch alone; attribute explains this one"
    )
