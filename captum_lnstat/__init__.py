"""Explain vision transformers inside Captum, from attention and the statistics of tokens at the LayerNorms."""

from captum_lnstat import zoo
from captum_lnstat._version import __version__
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
