"""Maps of the same images again and again while a model is trained, in TensorBoard or Weights & Biases.

``log_maps`` writes explanations to an experiment logger; ``MapCallback`` does it for Lightning's trainer. Neither of
these libraries is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_lnstat.training.callback import MapCallback
    from captum_lnstat.training.maps import log_maps

__all__ = ["MapCallback", "log_maps"]

_HOMES = {"MapCallback": "callback", "log_maps": "maps"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
