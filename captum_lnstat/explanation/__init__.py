"""One call for a picture: a model and an image in, a map, a prediction and pictures out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_lnstat.explanation.explanation import Explanation, Explanations

__all__ = ["Explanation", "Explanations"]


def __getattr__(name: str) -> Any:
    # Imported on use: what reads names of classes or shows progress needs no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.explanation"), name)
