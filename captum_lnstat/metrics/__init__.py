"""Measures of attributions, as plain functions on tensors."""

from captum_lnstat.metrics.localisation import asked_share, energy, iou, pointing

__all__ = ["asked_share", "energy", "iou", "pointing"]
