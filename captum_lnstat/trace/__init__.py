"""What a topology makes of a recording: the way from the patches to the head, ready for the rules."""

from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenNorm, FrozenScale
from captum_lnstat.trace.pooling import AttentionPooling, FixedPooling, Pooling
from captum_lnstat.trace.steps import Block, Merging, Step, Transition, Update
from captum_lnstat.trace.trace import Trace

__all__ = [
    "AttentionPooling",
    "Block",
    "Cotangent",
    "FixedPooling",
    "FrozenLinear",
    "FrozenMap",
    "FrozenNorm",
    "FrozenScale",
    "Merging",
    "Pooling",
    "Step",
    "Trace",
    "Transition",
    "Update",
]
