"""Names of classes: read from a file, looked for by a name or an index, and said in words. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_lnstat.errors import SourceError, near, one_line


def find_class(wanted: int | str, names: Sequence[str], count: int | None) -> int:
    """The class that an index or a name means.

    Args:
        wanted: An index, or a name; a class with several names answers to each of them, in capitals or not, and
            with underlines in the place of spaces.
        names: The names of all classes, or none.
        count: How many classes there are, if it is known.

    Raises:
        SourceError: There is no such class, or there are several.

    Example:
        >>> find_class("Cat", ("dog", "cat, tomcat"), 2), find_class("0", (), 2)
        (1, 0)
    """
    until = "" if count is None else f", 0 to {count - 1}"
    if isinstance(wanted, bool) or not isinstance(wanted, int | str):
        raise SourceError(f"a target is {wanted!r}; expected the index or the name of a class")
    if isinstance(wanted, int) or re.fullmatch(r"-?\d+", wanted):
        if int(wanted) < 0 or (count is not None and int(wanted) >= count):
            raise SourceError(f"there is no class {wanted}; expected an index{until}")
        return int(wanted)
    if not names:
        raise SourceError(
            f"unknown class {wanted!r}: the names of this model's classes are not known; give an index{until}"
        )
    found = [i for i, name in enumerate(names) if _plain(wanted) in (_plain(name), *_plain(name).split(", "))]
    if not found:
        known = [part for name in names for part in name.split(", ")]
        otherwise = f"expected one of {', '.join(names)}" if len(names) <= 20 else f"expected a name or an index{until}"
        raise SourceError(f"unknown class {wanted!r}; {near(wanted, known, otherwise)}")
    if len(found) > 1:
        raise SourceError(
            f"{wanted!r} is the name of several classes; give one of the indices {', '.join(map(str, found))}"
        )
    return found[0]


def _plain(name: str) -> str:
    """In small letters, with spaces for underlines, which completion in a shell writes in their place."""
    return name.casefold().replace("_", " ")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of classes from a file: one a line; or JSON, a list, ``{"0": name, ...}`` or ``{name: 0, ...}``.

    Raises:
        SourceError: There is no such file, or it holds something else.
    """
    try:
        text = path.read_text("utf-8-sig")
        given: Any = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"{str(path)!r} cannot be read as names of classes: {one_line(error)}") from None
    if isinstance(given, dict):
        given = given.get("id2label", given)
        indexed = all(isinstance(value, int) for value in given.values())
        numbered = {str(value): name for name, value in given.items()} if indexed else given
        given = [numbered.get(str(index)) for index in range(len(numbered))]
    # ImageNet's own file has [synset, name] for every class.
    names = [name[-1] if isinstance(name, list) and name else name for name in given]
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise SourceError(
                f"{str(path)!r} has no name for class {index}; expected one name a line, or JSON: a list, or an object "
                'like {"0": "cat", "1": "dog"}'
            )
    if not names:
        raise SourceError(f"{str(path)!r} holds no names of classes")
    return tuple(name.strip() for name in names)


def label(names: Sequence[str], index: int) -> str:
    """A class in words: its first name and its index."""
    return f"{names[index].split(', ')[0]} ({index})" if names else f"class {index}"
