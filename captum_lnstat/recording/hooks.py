"""Hooks on modules that other threads may be running: no dictionary that torch may be going through is changed.

torch goes through a module's hooks while it runs them; where a dictionary gains or loses an entry meanwhile, the thread
that runs the module raises. So a module's own dictionaries of hooks stay as they are, and the module is given a view of
each for as long as passes are recorded: the user's entries as they are at the time, and ours around them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, ItemsView, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from captum_lnstat.recording.eager import names_and_modules

# What torch calls before and after ``forward``, and which of the latter run after an error, too.
_DICTIONARIES = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
# Which of those before and after it are given what ``forward`` is given by keyword, too.
_WITH_KEYWORDS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
_lock = threading.Lock()


def _renew() -> None:
    """In a process that was forked while a thread held the lock, that thread is not there to release it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


class _View(MutableMapping[Any, Any]):
    """A module's dictionary, and what was added to the view of it. What others write goes into the dictionary."""

    __slots__ = ("__weakref__", "added", "first", "own")

    def __init__(self, own: Any) -> None:
        self.own = own
        # Before and behind it; never changed, only replaced.
        self.first: dict[Any, Any] = {}
        self.added: dict[Any, Any] = {}

    def items(self) -> ItemsView[Any, Any]:
        # Nobody can change this one.
        return [*self.first.items(), *self.own.items(), *self.added.items()]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.first, *self.own, *self.added])

    def __bool__(self) -> bool:
        return bool(self.added or self.first or self.own)  # torch asks this of every module that it runs

    def __len__(self) -> int:
        return len(self.first) + len(self.own) + len(self.added)

    def __contains__(self, key: object) -> bool:
        return key in self.added or key in self.own or key in self.first

    def __getitem__(self, key: Any) -> Any:
        ours = self.first if key in self.first else self.added
        return ours[key] if key in ours else self.own[key]

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
        # torch numbers hooks without a lock: two threads can be given the same number.
        self._first_key, self._key = object(), object()
        self._modules: list[nn.Module] = []

    def add(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        first: Callable[..., Any] | None = None,
        *,
        keywords: bool = False,
    ) -> None:
        """Run ``before`` before ``module``, and ``after`` after it, whatever it raises; both behind others' hooks.

        ``first`` runs after it too, before others' hooks: it sees what the module itself returned. With ``keywords``
        all three are called as torch calls hooks that were registered with ``with_kwargs=True``.
        """
        always = tuple(None if hook is None else True for hook in (before, after, first))
        entries: tuple[Any, ...] = (before, after, always[1])
        earlier: tuple[Any, ...] = (None, first, always[2])
        names: tuple[str, ...] = _DICTIONARIES
        if keywords:
            # First of all, and so that they are there when the hooks are.
            names, entries, earlier = _WITH_KEYWORDS + names, (*always[:2], *entries), (None, always[2], *earlier)
        self._modules.append(module)
        with _lock:
            held = vars(module)
            for name, entry, early in zip(names, entries, earlier, strict=True):
                if entry is None and early is None:
                    continue
                view = held[name]
                if type(view) is not _View:
                    view = held[name] = _View(view)
                if entry is not None:
                    view.added = {**view.added, self._key: entry}
                if early is not None:
                    view.first = {**view.first, self._first_key: early}

    def remove(self) -> None:
        """Take them off; a module that nobody else observes has its own dictionaries again."""
        for module in self._modules:
            with _lock:
                held = vars(module)
                for name in _DICTIONARIES + _WITH_KEYWORDS:
                    view = held.get(name)
                    if type(view) is _View:
                        view.added, view.first = _less(view.added, self._key), _less(view.first, self._first_key)
                        if not view.added and not view.first:
                            held[name] = view.own
        self._modules.clear()


def _less(entries: dict[Any, Any], key: object) -> dict[Any, Any]:
    """The others; those who are going through the entries see no change."""
    return {other: entry for other, entry in entries.items() if other is not key} if key in entries else entries


def stamps(name: str, running: list[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks before and after a module of which only has to be known that this thread is running it."""
    thread = threading.get_ident()

    def entering(module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == thread:
            running.append(name)

    def leaving(module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            running.pop()

    return entering, leaving


def unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook whose own functions are none of the model's: a mode that looks at each of those does not see them."""

    def quietly(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return hook(*args)

    return quietly


def hooked(model: nn.Module) -> int:
    """How many hooks of others' there are on the modules of a model, and functions in the place of their ``forward``.

    Example:
        >>> layer = nn.Sequential(nn.Linear(1, 1))
        >>> handle = layer[0].register_forward_hook(lambda module, inputs, output: 2 * output)
        >>> hooked(layer)
        1
    """
    count = 0
    for _, module in names_and_modules(model):
        held = vars(module)
        before, after = held["_forward_pre_hooks"], held["_forward_hooks"]
        count += len(before.own if type(before) is _View else before)
        count += len(after.own if type(after) is _View else after) + ("forward" in held)
    return count
