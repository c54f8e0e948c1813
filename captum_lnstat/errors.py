"""What is raised: explanations that are refused, and things asked for that are not there."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Sequence


class UnsupportedModelError(RuntimeError):
    """The model, or a setting of it, cannot be explained with certainty; the message says what would be needed."""


class RecordingError(RuntimeError):
    """The forward pass did not leave a recording that adds up, so any picture made from it would be wrong."""


class SourceError(ValueError):
    """An image, a model, a checkpoint or a class that was asked for cannot be had; the message says why not."""


def near(name: str, known: Sequence[str], otherwise: str) -> str:
    """The end of an error about an unknown name: what it may have been meant to be.

    Example:
        >>> near("troser", ["trouser", "dress"], "expected another")
        "did you mean 'trouser'?"
    """
    folded = {other.casefold(): other for other in reversed(known)}
    matches = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3)]
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else otherwise


# Captum's log_usage wraps every attribute, and the decorators of torch and contextlib wrap functions: none of these is
# the caller's code.
_MACHINERY = ("captum_lnstat", "captum", "torch", "contextlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as if from the innermost line that is neither this package's, Captum's nor torch's.

    ``warnings`` counts frames, and their number differs from one public method to the next and by what Captum wraps.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def one_line(text: object) -> str:
    """The text without its line breaks."""
    return " ".join(str(text).split())
