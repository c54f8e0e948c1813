"""Captum's surface: ``LNStatAttribution``, the layer form, the baselines, and the registry of methods."""

from captum_lnstat.attribution.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
from captum_lnstat.attribution.gradcam import HiResCAM
from captum_lnstat.attribution.gradient_baselines import AGCAM, AttCAT, BeyondIntuition, LeGrad
from captum_lnstat.attribution.layer import LayerLNStat
from captum_lnstat.attribution.libragrad import LibraGrad
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.attribution.rise import RISE
from captum_lnstat.attribution.vitcx import ViTCX

__all__ = [
    "AGCAM",
    "RISE",
    "AttCAT",
    "AttentionRollout",
    "BeyondIntuition",
    "FrozenLayerNorm",
    "GenericAttention",
    "HiResCAM",
    "LNStatAttribution",
    "LayerLNStat",
    "LeGrad",
    "LibraGrad",
    "RawAttention",
    "ViTCX",
]
