"""The test kit that a family has to pass: ``check_family(model, image_size)``, or its parts one by one."""

from captum_lnstat.testing.family import (
    FamilyReport,
    check_batch,
    check_completeness,
    check_family,
    check_mass,
    check_recognised,
    check_rule,
    check_untouched,
)
from captum_lnstat.testing.placement import (
    PEAKS,
    Ground,
    RulePlacement,
    check_layout,
    check_placement,
    ground,
    noise,
    planted_images,
)
from captum_lnstat.testing.planting import wake

__all__ = [
    "PEAKS",
    "FamilyReport",
    "Ground",
    "RulePlacement",
    "check_batch",
    "check_completeness",
    "check_family",
    "check_layout",
    "check_mass",
    "check_placement",
    "check_recognised",
    "check_rule",
    "check_untouched",
    "ground",
    "noise",
    "planted_images",
    "wake",
]
