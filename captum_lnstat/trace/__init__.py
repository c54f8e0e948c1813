"""What a topology makes of a recording: the way from the patches to the head, ready for the rules."""

from captum_lnstat.trace.covector import Covector
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenNorm, FrozenScale
from captum_lnstat.trace.pooling import AttentionPooling, FixedPooling, Pooling
from captum_lnstat.trace.steps import Block, Merging, Step, Transition, Update
from captum_lnstat.trace.trace import Trace

__all__ = [
    "AttentionPooling",
    "Block",
    "Covector",
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
