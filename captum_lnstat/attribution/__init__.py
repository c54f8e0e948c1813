"""Captum's surface: ``LNStatAttribution``, the layer form, the baselines, and the registry of methods."""

from captum_lnstat.attribution.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
from captum_lnstat.attribution.layer import LayerLNStat
from captum_lnstat.attribution.libragrad import LibraGrad
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.attribution.rise import RISE
from captum_lnstat.attribution.vitcx import ViTCX

__all__ = [
    "RISE",
    "AttentionRollout",
    "FrozenLayerNorm",
    "GenericAttention",
    "LNStatAttribution",
    "LayerLNStat",
    "LibraGrad",
    "RawAttention",
    "ViTCX",
]
