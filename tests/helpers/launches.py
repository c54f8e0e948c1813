"""Counts what a device would have to do: kernels that are launched, and numbers that the host waits for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Memory is taken, or a tensor passed on: nothing is launched.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach", "alias"),
    *("_unsafe_view", "_reshape_alias"),
}
# The host reads numbers, or has to know them to know a shape.
READS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "nonzero_static", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}


class Launches(TorchDispatchMode):
    """While it is entered, counts the operations that launch a kernel, views left out, and the host's reads.

    Attributes:
        names: How often each operation was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.reads = 0
        self._lists = _Lists(self)

    def __enter__(self) -> Launches:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        if name in READS:
            self.reads += 1
        elif name not in FREE and (alias is None or alias.is_write):
            self.names[name] += 1
        result: Tensor = func(*args, **(kwargs or {}))
        return result


class _Lists(TorchFunctionMode):
    """Of a tensor on the CPU these read the memory, and no operation is seen."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__"):
            self._launches.reads += 1
        return func(*args, **(kwargs or {}))
