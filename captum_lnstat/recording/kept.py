"""Copies of large recorded tensors, side by side in memory.

What is recorded outlives what the model allocates around it. Kept where the model put it, it leaves holes that the next
layer's buffers do not fit into, so that a pass takes up to twice the memory it needs. Copied to a place of its own, the
model's own memory is used again by every layer, as in a pass that is not recorded.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_lnstat.errors import RecordingError

# Tensors of so many bytes are copied.
LARGE = 1 << 21
# Memory is taken in pieces of so many bytes, used as far as it is filled. The C library takes a piece this large from
# the system by itself, and not out of what it keeps for small ones.
PIECE = 1 << 26
# A view of a storage that is more than so many times larger stays where it is.
PART = 4
_ALIGNED = 64


@dataclass
class Original:
    """The storage that was copied, and whether it was seen to be changed in place afterwards."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    copy: Tensor
    changed: bool = False


class Arena:
    """Keeps one copy of every large storage, as it was when it was first seen.

    Example:
        >>> x, arena = torch.zeros(1 << 20), Arena()
        >>> copy, _ = arena.put(x)
        >>> again, _ = arena.put(x[:500_000])
        >>> copy.data_ptr() == again.data_ptr() != x.data_ptr()
        True
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0
        self._pieces: set[int] = set()
        self._known: dict[int, Original] = {}

    def put(self, tensor: Tensor, least: int = LARGE) -> tuple[Tensor, Original | None]:
        """The copy of ``tensor`` and where it came from, or ``tensor`` itself if it is not to be copied.

        Views of one storage are views of one copy of it, so that what lies in the same place still does.

        Args:
            tensor: What is to be kept.
            least: Tensors of so many bytes are copied. One of a few numbers splits a hole as a large one does.
        """
        if tensor.device.type != "cpu" or tensor.is_inference() or tensor.requires_grad or type(tensor) is not Tensor:
            return tensor, None
        storage = tensor.untyped_storage()
        size, width = storage.nbytes(), tensor.element_size()
        if size < least or size > PART * tensor.numel() * width or size % width or storage.data_ptr() in self._pieces:
            return tensor, None
        original = self._known.get(storage.data_ptr())
        alive = original is not None and original.storage() is not None
        if original is not None and alive and original.version != tensor._version:
            original.changed = True
        if original is None or not alive or original.changed:
            flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            copy = self._take(size).copy_(flat)
            original = Original(weakref.ref(storage), tensor._version, copy)
            self._known[storage.data_ptr()] = original
        typed = original.copy.view(tensor.dtype)
        offset = typed.storage_offset() + tensor.storage_offset()
        return typed.as_strided(tensor.shape, tensor.stride(), offset), original

    def _take(self, size: int) -> Tensor:
        if self._used + size > len(self._piece):
            self._piece, self._used = torch.empty(max(PIECE, size), dtype=torch.uint8, device="cpu"), 0
            self._pieces.add(self._piece.data_ptr())
        taken = self._piece[self._used : self._used + size]
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return taken


@dataclass(frozen=True)
class Kept:
    """A tensor of the forward pass, kept by reference, with the version it had when it was seen; or a copy of it.

    A model may write into a tensor after it was recorded; reading it then would explain another computation.
    """

    tensor: Tensor
    version: int
    original: Original | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Kept:
        return cls(tensor, -1 if tensor.is_inference() else tensor._version)

    @classmethod
    def on(cls, arena: Arena | None, tensor: Tensor) -> Kept:
        """A copy in the arena if the tensor is large, so that what is kept does not lie between what is not."""
        if arena is None:
            return cls.of(tensor)
        copy, original = arena.put(tensor)
        return cls.of(tensor) if original is None else cls(copy, -1, original)

    def turned(self) -> Kept:
        """The same with its first two dimensions the other way round."""
        return replace(self, tensor=self.tensor.transpose(0, 1))

    def read(self) -> Tensor:
        changed = self.version >= 0 and self.tensor._version != self.version
        if changed or (self.original is not None and self.original.changed):
            raise RecordingError(
                f"a recorded tensor of shape {tuple(self.tensor.shape)} was changed in place later in the forward "
                "pass, so its value at the attention is lost; expected a model that leaves these tensors alone"
            )
        return self.tensor.detach()


def edge(output: Tensor) -> GradientEdge | None:
    """Where a tensor is in a graph, if it is in one: for the gradient rule, that need not keep the tensor for it."""
    return get_gradient_edge(output) if output.requires_grad else None
