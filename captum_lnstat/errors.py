"""What is raised: explanations that are refused, and things asked for that are not there."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar


class UnsupportedModelError(RuntimeError):
    """The model, or a setting of it, cannot be explained with certainty; the message says what would be needed."""


class RecordingError(RuntimeError):
    """The forward pass did not leave a recording that adds up, so any picture made from it would be wrong."""


class SourceError(ValueError):
    """An image, a model, a checkpoint or a class that was asked for cannot be had; the message says why not."""


_SUGGESTED = 5


def near(name: str, known: Sequence[str], otherwise: str) -> str:
    """The end of an error about an unknown name: what it may have been meant to be.

    First what has the name as a word, then what has it as a part, then what is spelt like it.

    Example:
        >>> near("troser", ["trouser", "dress"], "expected another")
        "did you mean 'trouser'?"
        >>> near("cat", ["crate", "polecat", "tabby cat"], "expected another")
        "did you mean 'tabby cat' or 'polecat'?"
    """
    folded = {other.casefold(): other for other in reversed(known)}
    wanted, ordered = name.casefold(), list(reversed(folded))
    words = [other for other in ordered if re.search(rf"(?<![^\W_]){re.escape(wanted)}(?![^\W_])", other)]
    parts = [other for other in ordered if len(wanted) > 2 and wanted in other]
    matches = list(dict.fromkeys([*words, *parts]))[:_SUGGESTED] or difflib.get_close_matches(wanted, folded, n=3)
    return f"did you mean {' or '.join(repr(folded[match]) for match in matches)}?" if matches else otherwise


# Captum's log_usage wraps every attribute, and the decorators of torch and contextlib wrap functions: none of these is
# the caller's code.
_MACHINERY = ("captum_lnstat", "captum", "torch", "contextlib")


_QUIET = ContextVar("captum_lnstat_quiet", default=False)


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing is warned of: a pass like this one has run, and has warned of it."""
    before = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(before)


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as if from the innermost line that is neither this package's, Captum's nor torch's.

    ``warnings`` counts frames, and their number differs from one public method to the next and by what Captum wraps.
    """
    if _QUIET.get():
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def one_line(text: object) -> str:
    r"""The text without its line breaks; what it lists, line by line, in one sentence.

    Example:
        >>> one_line("no vision transformer\nseen: a Linear\nto do: pass another")
        'no vision transformer; seen: a Linear; to do: pass another'
    """
    return " ".join(re.sub(r"\n\s*(seen|to do):", r"; \1:", str(text)).split())
