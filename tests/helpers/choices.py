"""Which combinations of choices are tested where no two choices can go wrong together that go right alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any


def diagonal(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every choice of every axis in some row: as many rows as the longest axis has choices.

    For choices that are independent of one another. An axis of tuples gives its parts to the row.

    Example:
        >>> diagonal("abc", [1, 2])
        [('a', 1), ('b', 2), ('c', 1)]
        >>> diagonal([("a", 1), ("a", 2)], "x")
        [('a', 1, 'x'), ('a', 2, 'x')]
    """
    lists = [list(axis) for axis in axes]
    return [_flat(one[row % len(one)] for one in lists) for row in range(max(map(len, lists)))]


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every choice of an axis with every choice of every other axis, in few rows.

    For what may go wrong where two choices meet, and not where three do.

    Example:
        >>> pairwise("ab", [1, 2], "xy")
        [('a', 1, 'x'), ('a', 2, 'y'), ('b', 1, 'y'), ('b', 2, 'x')]
    """
    lists = [list(axis) for axis in axes]
    places = [range(len(one)) for one in lists]
    pairs = list(combinations(range(len(lists)), 2))
    left = {(i, a, j, b): None for i, j in pairs for a in places[i] for b in places[j]}
    rows: list[list[int]] = []
    while left:
        i, a, j, b = next(iter(left))
        row: dict[int, int] = {i: a, j: b}
        for axis, choices in enumerate(places):
            if axis not in row:
                new = [sum(_pair(axis, choice, k, c) in left for k, c in row.items()) for choice in choices]
                row[axis] = new.index(max(new))
        rows.append([row[axis] for axis in range(len(lists))])
        for k, m in pairs:
            left.pop((k, row[k], m, row[m]), None)
    return [_flat(one[place] for one, place in zip(lists, row, strict=True)) for row in rows]


def _pair(i: int, a: int, j: int, b: int) -> tuple[int, int, int, int]:
    return (i, a, j, b) if i < j else (j, b, i, a)


def _flat(choices: Iterable[Any]) -> tuple[Any, ...]:
    parts = [choice if isinstance(choice, tuple) else (choice,) for choice in choices]
    return tuple(part for one in parts for part in one)
