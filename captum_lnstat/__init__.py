"""Explain vision transformers inside Captum, from attention and the statistics of tokens at the LayerNorms.

A name is imported when it is first used (PEP 562): Captum alone brings matplotlib's pyplot with it, and the command's
``--help`` needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_lnstat._version import __version__

if TYPE_CHECKING:
    from captum_lnstat import zoo
    from captum_lnstat.attribution import LNStatAttribution
    from captum_lnstat.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
    from captum_lnstat.errors import RecordingError, SourceError, UnsupportedModelError
    from captum_lnstat.explaining import explain
    from captum_lnstat.explanation import Explanation, Explanations
    from captum_lnstat.feature_mask import patch_feature_mask
    from captum_lnstat.layer import LayerLNStat
    from captum_lnstat.quantus import quantus_explain_func
    from captum_lnstat.recording import Recorder, Recording
    from captum_lnstat.topology import Topology, register_topology

__all__ = [
    "AttentionRollout",
    "Explanation",
    "Explanations",
    "FrozenLayerNorm",
    "GenericAttention",
    "LNStatAttribution",
    "LayerLNStat",
    "RawAttention",
    "Recorder",
    "Recording",
    "RecordingError",
    "SourceError",
    "Topology",
    "UnsupportedModelError",
    "__version__",
    "explain",
    "patch_feature_mask",
    "quantus_explain_func",
    "register_topology",
    "zoo",
]

# The module that each name is defined in, or the module itself.
_HOMES = {
    "AttentionRollout": "baselines",
    "Explanation": "explanation",
    "Explanations": "explanation",
    "FrozenLayerNorm": "baselines",
    "GenericAttention": "baselines",
    "LNStatAttribution": "attribution",
    "LayerLNStat": "layer",
    "RawAttention": "baselines",
    "Recorder": "recording",
    "Recording": "recording",
    "RecordingError": "errors",
    "SourceError": "errors",
    "Topology": "topology",
    "UnsupportedModelError": "errors",
    "explain": "explaining",
    "patch_feature_mask": "feature_mask",
    "quantus_explain_func": "quantus",
    "register_topology": "topology",
    "zoo": "zoo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    found = globals()[name] = getattr(module, name, module)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
