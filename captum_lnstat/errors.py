"""What is raised: explanations that are refused, and things asked for that are not there."""

from __future__ import annotations


class UnsupportedModelError(RuntimeError):
    """The model, or a setting of it, cannot be explained with certainty; the message says what would be needed."""


class RecordingError(RuntimeError):
    """The forward pass did not leave a recording that adds up, so any picture made from it would be wrong."""


class SourceError(ValueError):
    """An image, a model, a checkpoint or a class that was asked for cannot be had; the message says why not."""
