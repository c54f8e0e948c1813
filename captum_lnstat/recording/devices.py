"""Whether a number of a tensor can be read at once, or the device that it lies on has to be waited for."""

from __future__ import annotations

import torch

# On these a number is there when the function that makes it returns. All others have a queue: to read one number stops
# until all that was launched has run, and no more is launched meanwhile.
AT_ONCE = {"cpu"}


def has_a_queue(device: torch.device) -> bool:
    """Whether to read a number from a device takes as long as all that it was given to do."""
    return device.type not in AT_ONCE
