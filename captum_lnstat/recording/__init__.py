"""One forward pass, and what it left: attention sites and LayerNorm statistics, in order."""

from captum_lnstat.recording.recorder import Recorder
from captum_lnstat.recording.recording import ModuleCall, NormCall, Recording

__all__ = ["ModuleCall", "NormCall", "Recorder", "Recording"]
