"""The two ways in which an explanation can be refused."""

from __future__ import annotations


class UnsupportedModelError(RuntimeError):
    """The model, or a setting of it, cannot be explained with certainty; the message says what would be needed."""


class RecordingError(RuntimeError):
    """The forward pass did not leave a recording that adds up, so any picture made from it would be wrong."""
