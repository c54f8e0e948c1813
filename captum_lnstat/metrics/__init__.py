"""Measures of attributions as plain functions: maps and masks ``(batch, height, width)`` in, one value an image out.

The same as torchmetrics classes, ``Pointing`` to ``Sensitivity``, need the extra ``evaluate``; they are imported when
one is asked for.
"""

from importlib import import_module
from typing import Any

from captum_lnstat.metrics.agreement import map_correlation, spearman, spearman_ceiling
from captum_lnstat.metrics.boxes import box_iou, top1_localisation
from captum_lnstat.metrics.captum_measures import infidelity, sensitivity
from captum_lnstat.metrics.faithfulness import saco
from captum_lnstat.metrics.fills import black, blurred, mean_colour
from captum_lnstat.metrics.games import grid_mosaic, grid_share
from captum_lnstat.metrics.localisation import asked_share, corners, energy, pointing, two_object
from captum_lnstat.metrics.overlap import average_precision, f1, iou, pixel_accuracy
from captum_lnstat.metrics.perturbation import Curve, deletion, insertion, perturbation_curve
from captum_lnstat.metrics.sanity import cascade, randomised
from captum_lnstat.metrics.segmentation import (
    SegmentationCounts,
    SegmentationSummary,
    segmentation_average_precision,
    segmentation_counts,
    segmentation_summary,
)
from captum_lnstat.metrics.wsol import MaxBoxAccuracy, box_hits, max_box_accuracy

# Class to the module it is in; these modules import torchmetrics.
_CLASSES = (
    dict.fromkeys(
        (
            "AskedShare",
            "AveragePrecision",
            "Energy",
            "F1",
            "GridShare",
            "IoU",
            "MapCorrelation",
            "PixelAccuracy",
            "Pointing",
            "Segmentation",
            "Spearman",
            "TwoObject",
        ),
        "classes",
    )
    | dict.fromkeys(
        ("Deletion", "Infidelity", "Insertion", "NegativePerturbation", "PositivePerturbation", "SaCo", "Sensitivity"),
        "model_classes",
    )
    | dict.fromkeys(("BoxIoU", "MaxBoxAcc", "Top1Localisation"), "box_classes")
)

# The classes are left out, so that ``from captum_lnstat.metrics import *`` needs no extra.
__all__ = [
    "Curve",
    "MaxBoxAccuracy",
    "SegmentationCounts",
    "SegmentationSummary",
    "asked_share",
    "average_precision",
    "black",
    "blurred",
    "box_hits",
    "box_iou",
    "cascade",
    "corners",
    "deletion",
    "energy",
    "f1",
    "grid_mosaic",
    "grid_share",
    "infidelity",
    "insertion",
    "iou",
    "map_correlation",
    "max_box_accuracy",
    "mean_colour",
    "perturbation_curve",
    "pixel_accuracy",
    "pointing",
    "randomised",
    "saco",
    "segmentation_average_precision",
    "segmentation_counts",
    "segmentation_summary",
    "sensitivity",
    "spearman",
    "spearman_ceiling",
    "top1_localisation",
    "two_object",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
