"""Captum's surface: ``LNStatAttribution``, the layer form, the baselines, and the registry of methods."""

from captum_lnstat.attribution.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
from captum_lnstat.attribution.layer import LayerLNStat
from captum_lnstat.attribution.lnstat import LNStatAttribution

__all__ = [
    "AttentionRollout",
    "FrozenLayerNorm",
    "GenericAttention",
    "LNStatAttribution",
    "LayerLNStat",
    "RawAttention",
]
