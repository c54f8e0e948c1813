"""How ``forward_func`` is called, Captum's way, and which of the things that it returns is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

from captum._utils import common
from captum.log import log_usage as log_usage
from torch import Tensor

# Private helpers of Captum, unchanged in name from Captum 0.7 to 0.9.
format_additional_forward_args = common._format_additional_forward_args
expand_additional_forward_args, expand_target = common._expand_additional_forward_args, common._expand_target
format_output, is_tuple = common._format_output, common._is_tuple
run_forward, select_targets, validate_target = common._run_forward, common._select_targets, common._validate_target

Target = Union[None, int, tuple[int, ...], Tensor, list[int], list[tuple[int, ...]]]
ForwardArgs = Any
TensorOrTuple = TypeVar("TensorOrTuple", Tensor, tuple[Tensor, ...])
Output = Union[None, str, int, Callable[[Any], Tensor]]


def check_output(output: Output) -> None:
    """Raise unless ``output`` is a way to pick."""
    if isinstance(output, bool) or not (output is None or isinstance(output, str | int) or callable(output)):
        raise TypeError(
            f"output is {output!r}; expected a key (str), a position (int) or a function of what forward_func returns"
        )


def pick_output(returned: Any, output: Output) -> Tensor:
    """The scores among what ``forward_func`` returned.

    Args:
        returned: A tensor, a tuple, list or mapping of them, or an object that holds them, as Hugging Face's do.
        output: A key or the name of an attribute, a position, or a function of ``returned``. ``None`` takes the tensor
            itself, or the attribute ``logits``.

    Example:
        >>> import torch
        >>> pick_output({"age": torch.ones(1, 3), "kind": torch.zeros(1, 2)}, "kind")
        tensor([[0., 0.]])
    """
    if output is None:
        scores = getattr(returned, "logits", returned)
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"forward_func returned a {type(returned).__name__}{_listing(returned)}; expected a tensor of scores. "
                "Say which one to explain with output=: a key, a position, or a function of what was returned"
            )
        return scores
    picked = output(returned) if callable(output) else _item(returned, output)
    if not isinstance(picked, Tensor):
        how = "the function" if callable(output) else repr(output)
        raise TypeError(
            f"output={how} picks a {type(picked).__name__} from the {type(returned).__name__}{_listing(returned)}; "
            "expected a tensor of scores"
        )
    return picked


def _item(returned: Any, output: str | int) -> Any:
    if isinstance(returned, Tensor):
        raise TypeError(
            f"output={output!r}, but forward_func returned one tensor of shape {tuple(returned.shape)}; leave output "
            "out, and choose the class with target"
        )
    items = _items(returned)
    if isinstance(output, int) and isinstance(returned, tuple | list) and -len(items) <= output < 0:
        output += len(items)
    if output in items:
        return items[output]
    if isinstance(output, str) and hasattr(returned, output):
        return getattr(returned, output)
    raise ValueError(
        f"output={output!r} is not in the {type(returned).__name__} that forward_func returned{_listing(returned)}; "
        "expected output= to be one of these"
    )


def _items(returned: Any) -> dict[Any, Any]:
    """What can be picked, by key or position."""
    if isinstance(returned, Mapping):
        named = dict(returned)
        to_tuple = getattr(returned, "to_tuple", None)  # Hugging Face's outputs answer to positions too
        return named | dict(enumerate(to_tuple())) if callable(to_tuple) else named
    return dict(enumerate(returned)) if isinstance(returned, tuple | list) else {}


def _listing(returned: Any) -> str:
    items = dict(returned) if isinstance(returned, Mapping) else _items(returned)
    if not items and hasattr(returned, "__dict__"):
        items = {name: value for name, value in vars(returned).items() if not name.startswith("_")}
    shapes = (
        f"{key!r}: {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for key, value in items.items()
    )
    return f" of {{{', '.join(shapes)}}}" if items else ""
