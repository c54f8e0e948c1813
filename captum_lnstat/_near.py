"""Names that a mistyped one may have been meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def near(name: str, known: Sequence[str], otherwise: str) -> str:
    """The end of an error about an unknown name: what it may have been meant to be.

    Example:
        >>> near("troser", ["trouser", "dress"], "expected another")
        "did you mean 'trouser'?"
    """
    folded = {other.casefold(): other for other in reversed(known)}
    matches = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3)]
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else otherwise
