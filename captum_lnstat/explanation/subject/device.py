"""Where a model computes, by a name on the command line."""

from __future__ import annotations

import torch

from captum_lnstat.errors import SourceError


def find_device(name: str, local: int = 0) -> torch.device:
    """The device of a name.

    Args:
        name: ``"auto"`` for a GPU if there is one, else the CPU; or any name that torch knows.
        local: Which GPU is taken where the name does not say: that of this process among those of the host.

    Raises:
        SourceError: There is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SourceError(f"unknown device {name!r}; expected auto, cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SourceError(f"there is no GPU for device {name!r}; expected auto or cpu")
        index, count = int(name.partition(":")[2] or local), torch.cuda.device_count()
        if index >= count:
            raise SourceError(f"there is no GPU {index}; there are {count}, counted from 0")
        return torch.device("cuda", index)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise SourceError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
