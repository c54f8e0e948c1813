"""What a metric applies to: an example, and whether its true class is explained."""

from __future__ import annotations

from captum_lnstat.evaluation.frame import Example


def image(one: Example, true_class: bool) -> bool:
    """Every image."""
    return not one.sample.only_two


def objects(one: Example, true_class: bool) -> bool:
    """Those of an object with a mask or boxes."""
    return not one.sample.only_two and (one.mask is not None or one.boxes is not None)


def masked(one: Example, true_class: bool) -> bool:
    """Those with a mask."""
    return not one.sample.only_two and one.mask is not None


def boxed(one: Example, true_class: bool) -> bool:
    """Those with boxes."""
    return not one.sample.only_two and one.boxes is not None


def two_objects(one: Example, true_class: bool) -> bool:
    """Those with masks of two objects, asked for the true class."""
    return true_class and one.mask is not None and one.other_mask is not None


def in_grid(one: Example, true_class: bool) -> bool:
    """Those that may be a cell of a mosaic."""
    return true_class and not one.sample.only_two and one.sample.target is not None


def annotated(one: Example, true_class: bool) -> bool:
    """Those on which people marked something."""
    return one.human is not None and bool(one.human.max() > one.human.min())
