"""Compiled and data-parallel models are recorded through the module inside, run eagerly."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import nn


def eager(module: nn.Module) -> nn.Module:
    """The module inside DataParallel and torch.compile wrappers, which runs eagerly on one device."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
            continue
        # Its own: a wrapper may pass on the attributes of a compiled module inside it.
        held: Any = vars(module).get("_modules")
        if not isinstance(held, dict) or held.get("_orig_mod") is None:
            return module
        module = held["_orig_mod"]


def recorded_name(dotted: str) -> str:
    """What a recording calls a module: its dotted name without the wrappers of ``torch.compile`` on the way."""
    return dotted.replace("._orig_mod", "")


def names_and_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of ``model`` with the name that a recording has for it, in the order in which they are defined.

    As ``named_modules``, whose generators take much of the time of all that is not the pass of a small model. One that
    is in several places has the first of its names; what ``torch.compile`` wraps has that of its wrapper.

    Example:
        >>> [name for name, _ in names_and_modules(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())))]
        ['', '0', '1', '1.0']
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()

    def look(dotted: str, module: nn.Module) -> None:
        seen.add(module)
        found.append((recorded_name(dotted), module))
        for name, child in module._modules.items():
            if child is not None and child not in seen:
                look(f"{dotted}.{name}" if dotted else name, child)

    look("", model)
    return found


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The same by name: of a wrapper of ``torch.compile`` and what it wraps, that."""
    return dict(names_and_modules(model))


class _Eagerly:
    """While any thread records, ``torch.compile`` directives are ignored: Dynamo cannot trace into a recorder.

    The stance is global, so the first to enter sets it and the last to leave takes it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # Nothing is compiled before Dynamo is imported, which takes seconds; set_stance is there from torch 2.6.
            if self._inside == 1 and "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


run_eagerly = _Eagerly()
