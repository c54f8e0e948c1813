"""The private helpers of Captum that this package uses, in one place. Unchanged in name from Captum 0.7 to 0.9."""

from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _is_tuple,
    _run_forward,
    _select_targets,
    _validate_target,
)
from captum.log import log_usage

__all__ = [
    "_format_additional_forward_args",
    "_format_output",
    "_is_tuple",
    "_run_forward",
    "_select_targets",
    "_validate_target",
    "log_usage",
]
