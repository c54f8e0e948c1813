"""From a recording to the blocks on the way to the head: one file a family, found by structure, not by name."""

# The family registered last is tried first: what is known of a model beyond its structure comes before the structure.
# isort: off
from captum_lnstat.topology.base import Topology, find_topology, register_topology, takes_videos
from captum_lnstat.topology.hierarchical import HierarchicalTopology
from captum_lnstat.topology.encoder import EncoderTopology, SeenTopology
from captum_lnstat.topology.scattered import ScatteredTopology
from captum_lnstat.topology.divided import DividedTopology
from captum_lnstat.topology.video import VideoTopology
from captum_lnstat.topology.convolved import ConvolvedTopology
from captum_lnstat.topology.plain import PlainTopology
from captum_lnstat.topology.pooled import PooledTopology
from captum_lnstat.topology.windowed import WindowedTopology
from captum_lnstat.topology.cait import ClassAttentionTopology
# isort: on

__all__ = [
    "ClassAttentionTopology",
    "ConvolvedTopology",
    "DividedTopology",
    "EncoderTopology",
    "HierarchicalTopology",
    "PlainTopology",
    "PooledTopology",
    "ScatteredTopology",
    "SeenTopology",
    "Topology",
    "VideoTopology",
    "WindowedTopology",
    "find_topology",
    "register_topology",
    "takes_videos",
]
