"""Follows where tokens come from through the functions that a model calls before its first attention.

What a function did to the places is worked out when it is asked for, of the tokens of the first block alone. Until then
nothing is held but how it was called: of the tensors that it was given, those that say which token goes where.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from captum_lnstat.recording import moving
from captum_lnstat.recording.provenance import Lattice, Provenance
from captum_lnstat.recording.remembered import number_of, remembered

Args = tuple[Any, ...]
# Images and what was made of them where it cannot be followed: less alike, they were moved.
ALIKE = 0.5
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"}
# Where the value is among the arguments of what writes into its first one.
_WRITES = {"__setitem__": 2, "index_copy": 3, "index_copy_": 3, "scatter": 3, "scatter_": 3, "copy_": 1}

# What functions return that asks a tensor for something.
_NO_TENSORS = {torch.Size, bool, int, float, str, torch.dtype, torch.device}


class Path:
    """The way of one tensor from the images.

    Args:
        shape: The tensor's shape.
        make: Works its places out.
        number: That of all that they follow from, if they follow from no other tensors.
    """

    def __init__(self, shape: torch.Size, make: Callable[[], Provenance | None], number: int | None) -> None:
        self.shape = shape
        self.number = number
        self._make: Callable[[], Provenance | None] | None = make

    @cached_property
    def provenance(self) -> Provenance | None:
        """Where the tensor's numbers come from; ``None`` if that is not known."""
        make, self._make = self._make, None
        return None if make is None else remembered(self.number, lambda: self._worked_out(make))

    def _worked_out(self, make: Callable[[], Provenance | None]) -> Provenance | None:
        try:
            places = make()
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError):
            return None  # whatever the function was given, it is not known what it did with it
        return places if places is not None and places.shape == self.shape else None

    @property
    def is_settled(self) -> bool:
        """Whether it is worked out, and what follows from it takes no time: it is a lattice as it is, or lost."""
        places = self.__dict__.get("provenance", self)
        return places is None or (isinstance(places, Provenance) and places.ids is None)

    def settle(self) -> None:
        """Work it out now."""
        _ = self.provenance


class Follower:
    """The ways of the tensors of one pass.

    Args:
        images: What ``forward_func`` is given; for the rows of the batch alone, where the head begins; or tokens.
        rows: Whether it is the rows alone.
        tokens: Whether it is tokens with their channels last, each a cell of its own.
    """

    def __init__(self, images: Tensor, *, rows: bool = False, tokens: bool = False) -> None:
        self._given, self._images, self._rows, self._tokens = images, images.shape, rows, tokens
        self.other_pixels = False  # what the model was given cannot be followed, and is not what it would be in place
        # By identity; a tensor that is gone gives its identity away.
        self._known: dict[int, tuple[weakref.ref[Tensor], Path]] = {}
        # Which axis of a video has its channels is seen where a convolution reads it.
        if rows or tokens or images.dim() == 4:
            self._begin(images)

    def of(self, tensor: object) -> Path | None:
        """The way of a tensor, if it was followed."""
        reference, path = self._known.get(id(tensor), (None, None))
        return path if reference is not None and reference() is tensor else None

    def put(self, tensor: Tensor, path: Path) -> None:
        """A tensor came this way."""
        self._known[id(tensor)] = weakref.ref(tensor), path

    def follow(self, function: Callable[..., Any], args: Args, kwargs: dict[str, Any], output: Any) -> None:
        """A function has run."""
        if type(output) in _NO_TENSORS:
            return
        name = _name(function)
        if name in moving.CONVOLUTIONS and args and not (self._rows or self._tokens):
            self._again(args[0])
        arguments = [self._argument(arg, name in moving.LINEAR) for arg in args]
        named = {key: self._argument(value, False) for key, value in kwargs.items()}
        several = (arg if isinstance(arg, tuple | list) else [arg] for arg in (*arguments, *named.values()))
        given = [path for some in several for path in some]
        given = [path for path in given if isinstance(path, Path)]
        if not given or name.endswith("_like") or name.startswith("new_"):
            return
        if name in _WRITES:
            value = arguments[_WRITES[name]] if len(arguments) > _WRITES[name] else None
            output = args[0] if name == "__setitem__" else output
            arguments = [*arguments[: _WRITES[name]], value]
        outputs = output if isinstance(output, tuple | list) else (output,)
        sorted_to = outputs[1] if name in moving.SORTS and len(outputs) == 2 else None
        for place, one in enumerate(outputs):
            # What is no number of a token is an index or a mask.
            if not isinstance(one, Tensor) or not one.is_floating_point():
                continue
            made = _Made(name, function, arguments, named, given, one.shape, place, sorted_to)
            number = None if sorted_to is not None else number_of(name, function, arguments, named, one.shape, place)
            path = Path(one.shape, made.provenance, number)
            if all(before.is_settled for before in given):
                path.settle()
            self.put(one, path)

    def _begin(self, images: Tensor) -> None:
        shape, lattice = images.shape, Lattice.of(images, rows=self._rows)
        numbers = lattice.numbers(shape) if self._rows else None
        if self._tokens:
            lattice = Lattice(tuple(shape[:-1]), (0.0,) * (len(shape) - 2), (1.0,) * (len(shape) - 2))
            numbers = torch.arange(math.prod(shape[:-1]), device="cpu").reshape(*shape[:-1], 1).expand(shape)
        number = number_of("images", shape, self._rows, self._tokens)
        path = Path(shape, lambda: Provenance(lattice, numbers, shape), number)
        path.settle()
        self.put(images, path)

    def _again(self, given: Any) -> None:
        """What was lost on the way, but has the images' size, is the images."""
        size, whole = getattr(given, "shape", ()), self._images
        same = size[:1] + size[2:] == whole[:1] + whole[2:]
        video = len(size) == len(whole) == 5 and size[:1] == whole[:1] and sorted(size) == sorted(whole)
        if (same or video) and self.of(given) is None:
            self.other_pixels = self.other_pixels or not _alike(given, self._given)
            self._begin(given)

    def _argument(self, value: Any, floats: bool) -> Any:
        """What is held of an argument: ways, shapes, and numbers that say where to."""
        if isinstance(value, Tensor):
            path = self.of(value)
            if path is not None:
                return path
            return value if floats or not value.is_floating_point() else value.shape
        if isinstance(value, tuple | list) and any(isinstance(one, Tensor) for one in value):
            return type(value)(self._argument(one, floats) for one in value)
        return value


def _alike(given: Tensor, images: Tensor) -> bool:
    """Whether images are brighter where others are, or darker: normalised elsewhere, they still lie in place."""
    if images.dim() != 4 or given.shape != images.shape:
        return True
    seen, wanted = (one.detach().double().mean(1).flatten(1) for one in (given, images))
    seen, wanted = seen - seen.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True)
    size = seen.norm(dim=1) * wanted.norm(dim=1)
    return not bool(((seen * wanted).sum(1).abs() < ALIKE * size).any())


class Following:
    """What is followed in one pass: from the images to the first attention, rows from the stream's end to the scores.

    Args:
        images: What ``forward_func`` is given; without them nothing is followed.
        values: Whether the values of every attention are followed, too, from what the modules around it were given.

    Attributes:
        given: The ways of what modules were given.
        values: For every module the way of the values of the first attention in it, from what the module was given.
    """

    def __init__(self, images: Tensor | None, *, values: bool = False) -> None:
        self._first = self._follower = None if images is None else Follower(images)
        self._rows = images is not None and len(images) > 1
        self.given: dict[str, Path] = {}
        self.values: dict[str, Path] = {}
        # Of the modules that are running and in which no attention has been seen; without values of none.
        self._inside: dict[str, Follower] | None = {} if values and images is not None else None

    def of(self, tensor: Tensor) -> Path | None:
        """The way of a tensor, if it is followed now."""
        return None if self._follower is None else self._follower.of(tensor)

    @property
    def is_over(self) -> bool:
        """Nothing is followed now."""
        return self._follower is None and not self._inside

    def same(self, before: Tensor, after: Tensor) -> None:
        """A tensor is passed on as another one."""
        path = self.of(before)
        if self._follower is not None and path is not None:
            self._follower.put(after, path)

    def entering(self, name: str, tensor: Any) -> None:
        """A module is given a tensor."""
        path = self.of(tensor)
        self.given |= {} if path is None else {name: path}
        if self._inside is not None and isinstance(tensor, Tensor) and tensor.dim() in (3, 4):
            self._inside[name] = Follower(tensor, tokens=True)

    def leaving(self, name: str) -> None:
        """A module has run."""
        if self._inside:
            self._inside.pop(name, None)

    def attends_to(self, values: Tensor) -> None:
        """An attention averages these."""
        if self._inside:
            found = {name: follower.of(values) for name, follower in self._inside.items()}
            self.values |= {name: path for name, path in found.items() if path is not None}
            self._inside.clear()

    def ran(
        self, function: Callable[..., Any], args: Args, kwargs: dict[str, Any], output: Any, *, last: bool
    ) -> None:  # fmt: skip
        """A function has run. After the ``last`` one, the first attention, a topology knows where tokens go."""
        if self._follower is not None:
            self._follower.follow(function, args, kwargs, output)
            self._follower = None if last else self._follower
        for follower in (self._inside or {}).values():
            follower.follow(function, args, kwargs, output)

    @property
    def other_pixels(self) -> bool:
        """The model was given what is not the images in place, made by functions that cannot be followed."""
        return self._first is not None and self._first.other_pixels

    def head_begins(self, stream: Tensor) -> None:
        """The stream has ended: from here on rows are followed."""
        self._follower = Follower(stream, rows=True) if self._rows else None


class _Made:
    """What one call made of the places it was given."""

    def __init__(
        self, name: str, function: Callable[..., Any], arguments: list[Any], named: dict[str, Any], given: list[Path],
        shape: torch.Size, place: int, sorted_to: Tensor | None,
    ) -> None:  # fmt: skip
        self._name, self._function, self._arguments, self._named = name, function, arguments, named
        self._given, self._shape, self._place, self._sorted_to = given, shape, place, sorted_to

    def provenance(self) -> Provenance | None:
        """Of one of the tensors that it returned."""
        with torch.no_grad():
            return self._provenance()

    def _provenance(self) -> Provenance | None:
        name, arguments, shape = self._name, [_read(arg) for arg in self._arguments], self._shape
        named = {key: _read(value) for key, value in self._named.items()}
        known = [places for places in (path.provenance for path in self._given) if places is not None]
        first = arguments[0] if arguments else next(iter(named.values()))
        if not known or (name in _JOINS and len(known) < len(self._given)):
            return None
        if name in _JOINS:
            return moving.joined(name, self._function, arguments, named, known)
        if name in _WRITES:
            return moving.written(name, arguments, shape, known)
        if not known[0].lattice.shape[1:] and name not in moving.MOVES | moving.SORTS:
            return moving.in_rows(known, shape)
        if name == "where" and len(arguments) == 3:
            return moving.chosen(arguments, known)
        if name in moving.LINEAR:
            return moving.combined(name, self._function, arguments, named, known[0])
        if not isinstance(first, Provenance):
            return None if name in moving.MOVES else moving.alongside(known, shape)
        if name in moving.COARSER:
            return moving.coarser(name, first, arguments, named, shape)
        if name == "pad":
            return moving.padded(self._function, first, arguments, named, shape)
        if name in moving.MOVES:
            ids = moving.moved(name, self._function, first, arguments[1:], named)
            return first.to(ids[self._place] if isinstance(ids, tuple | list) else ids)
        if self._sorted_to is not None:
            rest = arguments[1 if name == "sort" else 2 :]
            dim = next((arg for arg in rest if type(arg) is int), named.get("dim", -1))
            return first.to(first.read().gather(dim, self._sorted_to.cpu()))
        if name in moving.SCATTERS:
            return first.mixed_by(name, shape)
        if name == "linear":
            return moving.projected(first, shape)
        return moving.alongside(known, shape)


def _read(value: Any) -> Any:
    if isinstance(value, Path):
        return value.provenance
    if type(value) in (tuple, list) and any(isinstance(one, Path) for one in value):
        return type(value)(_read(one) for one in value)
    return value


def _name(function: Callable[..., Any]) -> str:
    name: str = getattr(function, "__name__", "")
    # Of Tensor.T and its like a getter is called.
    return str(getattr(getattr(function, "__self__", None), "__name__", name)) if name == "__get__" else name
