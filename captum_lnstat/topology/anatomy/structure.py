"""What a model is made of, in a form that can be compared: has anything changed since it was last looked through?"""

from __future__ import annotations

from typing import Any

from torch import nn

_NUMBERS = frozenset({int, bool, float, str, type(None)})
_LOOKED_AT = _NUMBERS | {tuple, list}
# What says nothing of the structure, or is a module's own bookkeeping.
_PASSING = {"training", "_is_full_backward_hook", "_compiled_call_impl", "call_super_init"}

Structure = tuple[Any, ...]


def structure_of(model: nn.Module) -> Structure:
    """Every module of ``model``: which one it is, its children and parameters, and the settings it holds.

    Two equal ones are of the same modules with the same settings. Settings in other forms than numbers, strings and
    tuples of these are not looked at.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> before = structure_of(model)
        >>> before == structure_of(model)
        True
        >>> model[0] = nn.Linear(2, 2)
        >>> before == structure_of(model)
        False
    """
    found: list[Any] = []
    left, seen = [model], set[int]()
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        left += [child for child in module._modules.values() if child is not None]
        parameters = module._parameters
        found += (id(module), type(module), *module._modules.keys(), *parameters.keys())
        found += [None if parameter is None else parameter.shape for parameter in parameters.values()]
        for name, value in vars(module).items():
            kind = type(value)
            if kind not in _LOOKED_AT:
                continue
            if kind in _NUMBERS:
                if name not in _PASSING:
                    found += (name, value)
            elif all(type(one) in _NUMBERS for one in value):
                found += (name, tuple(value))
    return tuple(found)
