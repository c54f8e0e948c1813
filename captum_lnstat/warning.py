"""Warnings that name the line of the caller, however many frames of this package lie between."""

from __future__ import annotations

import sys
import warnings

# Captum's log_usage wraps every attribute, and the decorators of torch and contextlib wrap functions: none of these is
# the caller's code.
_MACHINERY = ("captum_lnstat", "captum", "torch", "contextlib")


def warn_caller(message: str) -> None:
    """Warn as if from the innermost line that is neither this package's, Captum's nor torch's.

    ``warnings`` counts frames, and their number differs from one public method to the next and by what Captum wraps.
    """
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _MACHINERY:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
