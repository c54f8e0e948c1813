"""Whether a block does what its topology says: its update of the stream against what its attention was seen to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.sites import Queries
from captum_lnstat.recording.verdicts import expect
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import pull_back
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from jaxtyping import Float

# How far the updates may be from what the path makes of A v, in their own size.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.2
# Each stream was rounded when it was added up, and their difference and the product with it round again.
ROUNDED = 4
# So many channels of the stream are compared, others in every block.
PROBED = 64


@lru_cache(16)
@torch.inference_mode(False)
def scattered(count: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Fixed numbers in which no structure of a model lies."""
    n = torch.arange(count, device=device, dtype=dtype)
    return torch.sin(0.7 * n * n + 1) * scale


@lru_cache(64)
def length_of(count: int) -> float:
    """The length of so many of them."""
    return math.hypot(*(math.sin(0.7 * n * n + 1) for n in range(count)))


def probed(name: str, channels: int) -> slice:
    """Which channels of a block are compared: a matter of its name, so that a stack of blocks has all compared."""
    first = sum(map(ord, name)) * PROBED % channels
    return slice(min(first, max(0, channels - PROBED)), first + PROBED)


@lru_cache(64)
@torch.inference_mode(False)
def directions_of(names: tuple[str, ...], channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """In what direction each block's update is looked at: of the compared channels, others in every block."""
    w = torch.zeros(len(names), channels, device=device, dtype=dtype)
    for row, name in zip(w, names, strict=True):
        some = row[probed(name, channels)]
        some.copy_(scattered(len(some), device, dtype))
    return w


def probes(
    names: tuple[str, ...], tokens: int, channels: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "block 1 token channel"]:
    """What the updates of some blocks are weighted with, token by token: as large as their streams, and not kept."""
    z = scattered(tokens, device, dtype)
    return (z[:, None] * directions_of(names, channels, device, dtype)[:, None])[:, None]


@dataclass(frozen=True)
class Comparison:
    """Updates of some blocks, weighted and added up, from both sides.

    Attributes:
        names: The blocks.
        found: The sum as the attention has it.
        expected: The sum of what was added to the stream.
        typical: The length of that sum's terms.
        rounding: By how much it may be off, of the streams that were subtracted to know what was added.
        dtype: In which the model computed.
        least: By how much it may be off however small the streams are.
    """

    names: Sequence[str]
    found: Float[Tensor, "block batch"]
    expected: Float[Tensor, "block batch"]
    typical: Float[Tensor, "block batch"]
    rounding: Float[Tensor, "block batch"]
    dtype: torch.dtype
    least: float = 0.0


class Wiring:
    """Whether what each block adds to the stream is what its recorded attention makes of the values.

    Every block's updates, weighted over the tokens and some of the channels with fixed numbers, are compared with the
    same of ``A v``. The verdict is taken once, when all blocks have been looked at.
    """

    def __init__(self) -> None:
        self._compared: dict[torch.dtype, list[Comparison]] = {}

    def note(self, compared: Comparison) -> None:
        """Some more blocks."""
        self._compared.setdefault(compared.dtype, []).append(compared)

    def verify(self) -> None:
        """Raise if any block was found to do something else."""
        for dtype, compared in self._compared.items():
            _verify(compared, TOLERANCE.get(dtype, HALF_TOLERANCE))


def _verify(compared: Sequence[Comparison], tolerance: float) -> None:
    found, expected = torch.cat([one.found for one in compared]), torch.cat([one.expected for one in compared])
    typical, rounding = torch.cat([one.typical for one in compared]), torch.cat([one.rounding for one in compared])
    # In units of what rounding explains.
    allowed = torch.add(rounding, typical + expected.abs(), alpha=tolerance) + max(one.least for one in compared)
    excess = (found - expected).abs() / allowed

    def error() -> RecordingError:
        names = [name for one in compared for name in one.names]
        worst = excess.nan_to_num(torch.inf).amax(1)
        index = int((worst > 1).nonzero()[0])
        return RecordingError(
            f"what block {names[index]!r} adds to the stream is not its attention's output as recorded: off by "
            f"{float(worst[index]):.2g} times what rounding explains. Its wiring is not one that is known, or the "
            "weights that it ran with are not its own (functional_call, a hook or an adapter on the projection), so no "
            "map from it can be trusted"
        )

    expect(excess <= 1, error)


class Probe:
    """One block's updates against ``A v``: ``sum_i z_i <w, update_i>`` from both sides."""

    def __init__(self, block: Block) -> None:
        self._block = block
        batch, tokens, channels = block.between.shape
        self._channels = probed(block.name, channels)
        w = directions_of((block.name,), channels, block.between.device, block.between.dtype)[0]
        self._w, self._z = w, scattered(tokens, w.device, w.dtype)
        everywhere = torch.arange(tokens, device=w.device)
        directions = w.expand(batch, 1, 1, channels)
        u = Cotangent(everywhere, self._z.expand(batch, -1), directions, torch.zeros_like(everywhere), tokens)
        self._u, self._constant = pull_back(block.path, u)
        site = block.site
        # What is multiplied with every head's map from the left, if the cotangent has one direction for all tokens.
        self.columns: Tensor | None = None
        if self._u.kinds > 1:
            grouped = block.layout.gather(self._u.dense()[:, :, 0])
            self._per_query = grouped.reshape(*grouped.shape[:2], site.shape[1], -1).transpose(1, 2)
        else:
            self.columns = self._u.scale[..., None]
        self._found = w.new_zeros(batch)

    def add(self, queries: Queries, heads: slice, attention: Float[Tensor, "group head query key"]) -> None:
        """Without columns: the maps of some heads, for some queries."""
        averaged = attention @ self._block.site.values(heads)
        found = averaged * self._per_query[:, heads][:, :, queries]
        self._found += found.reshape(len(self._found), -1).sum(1)

    def add_products(self, products: Float[Tensor, "group head 1 key"]) -> None:
        """With columns: their products with the maps of all heads."""
        site, batch = self._block.site, len(self._found)
        directions = self._u.directions.reshape(batch, site.shape[1], -1, 1)
        read = read_values(site.values(slice(0, site.shape[1])), directions)  # (group, head, key, 1)
        self._found += torch.linalg.vecdot(products.reshape(batch, -1), read.reshape(batch, -1))

    def compared(self, wanted: Tensor | None) -> Comparison:
        """Both sides, of the queries that were looked at."""
        block, w = self._block, self._w[self._channels]
        z, found, covered = self._z, self._found, block.layout.covered
        if wanted is None and covered is None:
            found = found + self._constant.sum((1, 2))
        else:
            taken = torch.zeros_like(z, dtype=torch.bool)
            taken[slice(None) if wanted is None else wanted] = True
            z, counted = z * taken, taken if covered is None else taken & covered
            found = found + (self._constant[..., 0] * counted).sum(1)
        terms = z * ((block.between[..., self._channels] - block.base[..., self._channels]) @ w)
        # The update is a difference of two streams, and a small one of large streams is known to their rounding only.
        own, kind = block.own_statistics, torch.finfo(block.site.dtype)
        size = kind.eps * (own.variance + own.mean.square()).sqrt() + kind.smallest_normal
        rounding = ROUNDED * w.norm() * (z * size).square().sum(1).sqrt()
        expected, typical = terms.sum(1), terms.square().sum(1).sqrt()
        return Comparison([block.name], found[None], expected[None], typical[None], rounding[None], block.site.dtype)


def read_values(
    values: Float[Tensor, "group head key channel"], directions: Float[Tensor, "batch head channel direction"]
) -> Float[Tensor, "group head key direction"]:
    """``p . v_j`` of every value with every direction of its image."""
    images, _, _, count = directions.shape
    if count == 1:
        # Read where they lie in memory, head by head; a product would copy them first.
        one = directions[..., 0].repeat_interleave(len(values) // images, 0)
        read: Tensor = torch.linalg.vecdot(values, one[:, :, None])
        return read[..., None]
    per_image = values.reshape(images, -1, *values.shape[1:])
    flat: Tensor = (per_image @ directions[:, None]).flatten(0, 1)
    return flat
