"""Whether a block does what its topology says: its update of the stream against what its attention was seen to do."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.sites import Queries
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import pull_back
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from jaxtyping import Float

# How far the updates may be from what the path makes of A v, in their own size.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.2
# So many channels of the stream are compared, others in every block.
PROBED = 64


@lru_cache(16)
def _scattered(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed numbers in which no structure of a model lies."""
    n = torch.arange(count, device=device, dtype=dtype)
    return torch.sin(0.7 * n * n + 1)


class Wiring:
    """Whether what each block adds to the stream is what its recorded attention makes of the values.

    Every block's updates, weighted over the tokens and some of the channels with fixed numbers, are compared with the
    same of ``A v``. The verdict is taken once, at the end, so that no device has to wait in between.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._excess: list[Tensor] = []

    def note(self, name: str, excess: Float[Tensor, " batch"]) -> None:
        """How far a block is off, in units of what is allowed."""
        self._names.append(name)
        self._excess.append(excess.amax())

    def verify(self) -> None:
        """Raise if any block was found to do something else."""
        if not self._excess:
            return
        worst = torch.stack(self._excess)
        if bool((worst <= 1).all()):
            return
        index = int((~(worst <= 1)).nonzero()[0])
        raise RecordingError(
            f"what block {self._names[index]!r} adds to the stream is not its attention's output as recorded: off by "
            f"{float(worst[index]):.2g} times what rounding explains. Its wiring is not one that is known, so no map "
            "from it can be trusted"
        )


class Probe:
    """One block's updates against ``A v``: ``sum_i z_i <w, update_i>`` from both sides."""

    def __init__(self, block: Block) -> None:
        self._block = block
        batch, tokens, channels = block.between.shape
        # Which channels is a matter of the name, so that a stack of blocks has all of them compared.
        first = sum(map(ord, block.name)) * PROBED % channels
        self._channels = slice(min(first, max(0, channels - PROBED)), first + PROBED)
        w = block.between.new_zeros(channels)
        w[self._channels] = _scattered(len(w[self._channels]), w.device, w.dtype)
        self._w, self._z = w, _scattered(tokens, w.device, w.dtype)
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

    def excess(self, wanted: Tensor | None) -> Float[Tensor, " batch"]:
        """How far the two sides are apart, in units of what rounding explains."""
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
        own, kind = block.statistics[0], torch.finfo(block.site.dtype)
        size = kind.eps * (own.variance + own.mean.square()).sqrt() + kind.smallest_normal
        # Each stream was rounded when it was added up, and their difference and the product with it round again.
        rounding = 4 * w.norm() * (z * size).square().sum(1).sqrt()
        tolerance = TOLERANCE.get(block.site.dtype, HALF_TOLERANCE)
        expected, typical = terms.sum(1), terms.square().sum(1).sqrt()
        excess: Tensor = (found - expected).abs() / (tolerance * (typical + expected.abs()) + rounding)
        return excess


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
