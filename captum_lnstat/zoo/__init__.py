"""Small reference models, trained, and held-out sample scenes with exact masks, shipped inside the package."""

from captum_lnstat.zoo.models import ReferenceModel, architecture, load, names
from captum_lnstat.zoo.sample_scenes import Scene, scenes

__all__ = ["ReferenceModel", "Scene", "architecture", "load", "names", "scenes"]
