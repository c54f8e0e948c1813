"""What values contribute to many scores at once: one long sum over heads, kinds of directions and channels.

What is summed over is ``kinds`` times as large as the values. It is made some at a time and multiplied while it is
still in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.recording.devices import has_a_queue

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# So many keys are read side by side: of fewer, the products are slow.
SIDE_BY_SIDE = 400
# So many entries of what is summed over are held at once: they stay in the cache until they are multiplied.
HELD = 5 << 15
# So many times both of them on a device that takes long to start and not long to run.
DEVICE = 128


def read_many(
    weights: Float[Tensor, "group head kind key"],
    values: Float[Tensor, "group head key channel"],
    directions: Float[Tensor, "batch kind score head_channel"],
    used: Bool[Tensor, "group kind"],
) -> Float[Tensor, "group key score"]:
    """``sum_k sum_h weights^h_kj (p_k^h . v^h_j)`` for every score.

    Args:
        weights: With what weight each key is read in each kind of direction, head by head.
        values: The values, head by head.
        directions: ``p_k``, those of all heads side by side.
        used: Which kinds have a weight in a group at all. The others are left out where a run of groups has none.

    Example:
        >>> weights, values = torch.ones(1, 1, 2, 1), torch.tensor([[[[1.0, 2.0]]]])
        >>> directions = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 3.0]]]])
        >>> read_many(weights, values, directions, torch.tensor([[True, True]]))
        tensor([[[4., 8.]]])
    """
    groups, heads, kinds, keys = weights.shape
    images, _, scores, width = directions.shape
    # (batch, score, kind and head and channel)
    rows = directions.transpose(1, 2).reshape(images, scores, kinds * width)
    found = weights.new_empty(groups, keys, scores)
    scratch, more = weights.new_empty(0), DEVICE if has_a_queue(weights.device) else 1
    for image, its_groups, its_keys in _pieces(images, groups // images, keys, SIDE_BY_SIDE * more):
        # Keys last, those of several groups side by side.
        some_weights = weights[its_groups, :, :, its_keys].permute(2, 1, 0, 3).flatten(2).contiguous()
        some_values = values[its_groups, :, its_keys].permute(1, 3, 0, 2).flatten(2).contiguous()
        total = some_weights.new_zeros(scores, some_weights.shape[-1])
        for first, last in _runs(used[its_groups], max(1, HELD * more // (width * total.shape[1]))):
            size = (last - first) * width * total.shape[1]
            scratch = scratch if scratch.numel() >= size else scratch.new_empty(size)
            weighted = scratch[:size].view(last - first, heads, -1, total.shape[1])
            torch.mul(some_weights[first:last, :, None], some_values, out=weighted)
            torch.addmm(total, rows[image, :, first * width : last * width], weighted.flatten(0, 2), out=total)
        found[its_groups, its_keys] = total.reshape(scores, its_groups.stop - its_groups.start, -1).permute(1, 2, 0)
    return found


def _pieces(images: int, per_image: int, keys: int, beside: int) -> Iterator[tuple[int, slice, slice]]:
    """Some groups of an image, or some keys of a large group."""
    some = max(1, beside // keys)
    for image in range(images):
        for group in range(image * per_image, (image + 1) * per_image, some):
            its_groups = slice(group, min(group + some, (image + 1) * per_image))
            for key in range(0, keys, beside):
                yield image, its_groups, slice(key, min(key + beside, keys))


def _runs(used: Bool[Tensor, "group kind"], at_most: int) -> Iterator[tuple[int, int]]:
    """Kinds that any of the groups has, in runs of neighbours."""
    kinds = used.shape[1]
    # A device would have to be waited for.
    wanted = [True] * kinds if has_a_queue(used.device) or kinds == 1 else used.any(0).tolist()
    first = 0
    while first < kinds:
        last = first
        while last < kinds and wanted[last] and last - first < at_most:
            last += 1
        if last > first:
            yield first, last
        first = max(last, first + 1)
