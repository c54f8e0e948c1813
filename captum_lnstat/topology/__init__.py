"""From a recording to the blocks on the way to the head: one file a family, found by structure, not by name."""

from captum_lnstat.topology.base import Topology, find_topology, register_topology
from captum_lnstat.topology.plain import PlainTopology
from captum_lnstat.topology.windowed import WindowedTopology

__all__ = ["PlainTopology", "Topology", "WindowedTopology", "find_topology", "register_topology"]
