"""Explain vision transformers inside Captum, from attention and the statistics of tokens at the LayerNorms.

A name is imported when it is first used (PEP 562): Captum alone brings matplotlib's pyplot with it, and the command's
``--help`` needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_lnstat._version import __version__

if TYPE_CHECKING:
    from captum_lnstat import zoo
    from captum_lnstat.attribution.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
    from captum_lnstat.attribution.feature_mask import patch_feature_mask
    from captum_lnstat.attribution.gradcam import HiResCAM
    from captum_lnstat.attribution.gradient_baselines import AGCAM, AttCAT, BeyondIntuition, LeGrad
    from captum_lnstat.attribution.layer import LayerLNStat
    from captum_lnstat.attribution.libragrad import LibraGrad
    from captum_lnstat.attribution.lnstat import LNStatAttribution
    from captum_lnstat.attribution.quantus import quantus_explain_func
    from captum_lnstat.attribution.rise import RISE
    from captum_lnstat.attribution.vitcx import ViTCX
    from captum_lnstat.errors import RecordingError, SourceError, UnsupportedModelError
    from captum_lnstat.explanation.explain import explain
    from captum_lnstat.explanation.explanation import Explanation, Explanations
    from captum_lnstat.recording.recorder import Recorder
    from captum_lnstat.recording.recording import Recording
    from captum_lnstat.topology import Topology, register_topology

__all__ = [
    "AGCAM",
    "RISE",
    "AttCAT",
    "AttentionRollout",
    "BeyondIntuition",
    "Explanation",
    "Explanations",
    "FrozenLayerNorm",
    "GenericAttention",
    "HiResCAM",
    "LNStatAttribution",
    "LayerLNStat",
    "LeGrad",
    "LibraGrad",
    "RawAttention",
    "Recorder",
    "Recording",
    "RecordingError",
    "SourceError",
    "Topology",
    "UnsupportedModelError",
    "ViTCX",
    "__version__",
    "explain",
    "patch_feature_mask",
    "quantus_explain_func",
    "register_topology",
    "zoo",
]

# The module that each name is defined in, or the module itself.
_HOMES = {
    "AGCAM": "attribution.gradient_baselines",
    "AttCAT": "attribution.gradient_baselines",
    "AttentionRollout": "attribution.baselines",
    "BeyondIntuition": "attribution.gradient_baselines",
    "Explanation": "explanation.explanation",
    "Explanations": "explanation.explanation",
    "FrozenLayerNorm": "attribution.baselines",
    "GenericAttention": "attribution.baselines",
    "HiResCAM": "attribution.gradcam",
    "LNStatAttribution": "attribution.lnstat",
    "LayerLNStat": "attribution.layer",
    "LibraGrad": "attribution.libragrad",
    "RISE": "attribution.rise",
    "LeGrad": "attribution.gradient_baselines",
    "RawAttention": "attribution.baselines",
    "Recorder": "recording.recorder",
    "Recording": "recording.recording",
    "RecordingError": "errors",
    "SourceError": "errors",
    "Topology": "topology",
    "UnsupportedModelError": "errors",
    "ViTCX": "attribution.vitcx",
    "explain": "explanation.explain",
    "patch_feature_mask": "attribution.feature_mask",
    "quantus_explain_func": "attribution.quantus",
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
