"""Hooks on modules that other threads may be running: no dictionary that torch may be going through is changed.

torch goes through a module's hooks while it runs them; where a dictionary gains or loses an entry meanwhile, the thread
that runs the module raises. So a module's own dictionaries of hooks stay as they are, and the module is given a view of
each for as long as passes are recorded: the user's entries as they are at the time, and then ours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, ItemsView, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

from torch import nn

# What torch calls before and after ``forward``, and which of the latter run after an error, too.
_DICTIONARIES = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
_lock = threading.Lock()


class _View(MutableMapping[Any, Any]):
    """A module's dictionary, and what was added to the view of it. What others write goes into the dictionary."""

    __slots__ = ("__weakref__", "added", "own")

    def __init__(self, own: Any) -> None:
        self.own = own
        self.added: dict[Any, Any] = {}  # never changed, only replaced

    def items(self) -> ItemsView[Any, Any]:
        return [*self.own.items(), *self.added.items()]  # type: ignore[return-value]  # nobody can change this one

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.own, *self.added])

    def __len__(self) -> int:
        return len(self.own) + len(self.added)

    def __contains__(self, key: object) -> bool:
        return key in self.added or key in self.own

    def __getitem__(self, key: Any) -> Any:
        return self.added[key] if key in self.added else self.own[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.own[key] = value
        # The handle that removes it knows this view alone, and by a weak reference.
        with suppress(AttributeError):
            self.own.view = self

    def __delitem__(self, key: Any) -> None:
        del self.own[key]

    def move_to_end(self, key: Any, last: bool = True) -> None:
        """As of ``OrderedDict``: a hook is to run before the others."""
        self.own.move_to_end(key, last)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.own), (list(self.own.items()),)  # a copy of the model has no hooks of ours


class Hooks:
    """Hooks of one kind of observer, on any number of modules, until ``remove``.

    Example:
        >>> import torch
        >>> layer, hooks = nn.Linear(2, 1), Hooks()
        >>> hooks.add(layer, after=lambda module, inputs, output: print("ran"))
        >>> output = layer(torch.zeros(1, 2))
        ran
        >>> hooks.remove()
        >>> output = layer(torch.zeros(1, 2))
    """

    def __init__(self) -> None:
        self._key = object()  # torch numbers hooks without a lock: two threads can be given the same number
        self._modules: list[nn.Module] = []

    def add(
        self,
        module: nn.Module,
        before: Callable[[nn.Module, Any], Any] | None = None,
        after: Callable[[nn.Module, Any, Any], Any] | None = None,
    ) -> None:
        """Run ``before`` before ``module``, and ``after`` after it, whatever it raises; both behind others' hooks."""
        entries = (before, after, None if after is None else True)
        self._modules.append(module)
        with _lock:
            held = vars(module)
            for name, entry in zip(_DICTIONARIES, entries, strict=True):
                if entry is not None:
                    view = held[name]
                    if type(view) is not _View:
                        view = held[name] = _View(view)
                    view.added = {**view.added, self._key: entry}

    def remove(self) -> None:
        """Take them off; a module that nobody else observes has its own dictionaries again."""
        for module in self._modules:
            with _lock:
                held = vars(module)
                for name in _DICTIONARIES:
                    view = held.get(name)
                    if type(view) is _View and self._key in view.added:
                        view.added = {key: entry for key, entry in view.added.items() if key is not self._key}
                        if not view.added:
                            held[name] = view.own
        self._modules.clear()
