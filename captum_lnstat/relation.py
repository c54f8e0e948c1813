"""One block's relation, applied to row vectors: what its attention hands down, and what its values said.

The probabilities of a site are computed again some at a time, used for everything that needs them, and dropped. No map
of all queries against all keys is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.covector import Covector
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.frozen import pull_through
from captum_lnstat.fusion import Fuser, HeadFusion
from captum_lnstat.layout import WholeImage
from captum_lnstat.sites import Queries
from captum_lnstat.statistics import accumulation_dtype
from captum_lnstat.trace import Block

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Up to so many directions in u, what values said is summed over the queries before it is read, not after.
FEW = 4


@dataclass(frozen=True)
class Handed:
    """What a block's attention made of row vectors, at the tokens before the block.

    Attributes:
        rows: ``r A`` for every row vector given.
        rows_lost: What of it fell on padded places.
        said: ``c_j``: what each token's values said about every score, if there was a covector.
        said_lost: What padded places said.
        constant: What the biases on the way said.
    """

    rows: Float[Tensor, "batch token row"]
    rows_lost: Float[Tensor, "batch row"]
    said: Float[Tensor, "batch token score"] | None
    said_lost: Float[Tensor, "batch score"] | None
    constant: Float[Tensor, "batch score"] | None


def hand_down(
    block: Block,
    rows: Float[Tensor, "batch token row"],
    at: Int[Tensor, " place"] | None,
    u: Covector | None,
    fusion: HeadFusion,
    wiring: Wiring | None,
) -> Handed:
    """``r A`` with head-fused ``A``, and ``c_j = sum_h sum_i A^h_ij (u_i W_O^h) . v^h_j``.

    Args:
        block: The block.
        rows: Row vectors at the tokens after the attention.
        at: The only tokens at which they are not zero, if that is known.
        u: Covector of the stream.
        fusion: How the heads become one for ``r A``; what was said is summed over the heads as they are.
        wiring: Where the block's update is compared with what the attention was seen to do.
    """
    check_layout(block)
    site, layout, keys = block.site, block.layout, block.keys or block.layout
    wanted = _wanted(block, at, u)
    grouped = layout.gather(rows)
    reader = None if u is None else _Reader(block, u)
    probe = None if wiring is None else wiring.begin(block)
    mixed = grouped.new_zeros(len(grouped), site.shape[3], grouped.shape[-1])
    for queries, turns in site.chunks(wanted, whole_maps=callable(fusion)):
        fuser = Fuser(fusion, site.shape[1], signed=site.signed)
        for heads, attention in turns:
            fuser.add(attention)
            if reader is not None:
                reader.add(queries, heads, attention)
            if probe is not None:
                probe.add(queries, heads, attention)
        mixed += fuser.fused().transpose(-2, -1) @ grouped[:, queries]
    if probe is not None:
        probe.compare(wanted)
    handed, lost = keys.scatter(mixed, len(rows))
    if reader is None:
        return Handed(handed, lost, None, None, None)
    said, said_lost = keys.scatter(reader.said, len(rows))
    return Handed(handed, lost, said, said_lost, reader.constant)


def _wanted(block: Block, at: Tensor | None, u: Covector | None) -> Tensor | None:
    """The queries that matter; ``None`` for all."""
    if at is None or not isinstance(block.layout, WholeImage):
        return None
    if u is not None:
        at = torch.unique(torch.cat([at, u.at]))
    return at if 2 * len(at) < block.between.shape[1] else None


class _Reader:
    """Collects what the values of a block said about the scores, head by head."""

    def __init__(self, block: Block, u: Covector) -> None:
        self._site = block.site
        if block.layout.covered is not None:
            u = u.scaled(block.layout.covered.to(u.scale.dtype)[None])  # a token that takes no part hears no bias
        pulled, constant = pull_through(block.path, u)
        self.constant = constant.sum(1)
        batch, heads = len(u.scale), block.site.shape[1]
        self._few = u.kinds <= FEW
        if self._few:
            one_hot = torch.nn.functional.one_hot(pulled.kind, pulled.kinds).to(u.scale.dtype)
            weights = pulled.spread(pulled.scale[..., None] * one_hot)
            self._weights = block.layout.gather(weights)  # (group, query, kind)
            # (batch, head, head channel, kind and score)
            split = pulled.directions.reshape(batch, pulled.kinds * u.scores, heads, -1).permute(0, 2, 3, 1)
            self._directions = split
        else:
            dense = pulled.spread(pulled.dense().flatten(2))
            grouped = block.layout.gather(dense)
            split = grouped.reshape(*grouped.shape[:2], u.scores, heads, -1)
            self._dense = split.permute(0, 3, 1, 2, 4)  # (group, head, query, score, head channel)
        self._scores, self._batch = u.scores, batch
        self.said = u.scale.new_zeros(block.site.shape[0], block.site.shape[3], u.scores)

    def add(self, queries: Queries, heads: slice, attention: Tensor) -> None:
        if self._few:
            self._add_few(queries, heads, attention)
            return
        values = self._site.values(heads)
        pulled = self._dense[:, heads][:, :, queries]
        carried = attention.transpose(-2, -1) @ pulled.flatten(3)
        carried = carried.reshape(*carried.shape[:3], *pulled.shape[3:])
        self.said += (carried * values[:, :, :, None]).sum((1, 4))

    def _add_few(self, queries: Queries, heads: slice, attention: Tensor) -> None:
        # sum_k (sum_{i of kind k} s_i A_ij) (p_k . v_j): no product of the maps with anything wide
        heard = self._weights[:, None, queries].transpose(-2, -1) @ attention  # (group, head, kind, key)
        read = read_values(self._site.values(heads), self._directions[:, heads])
        if read.shape[-1] == 1:
            self.said += (heard[:, :, 0] * read[..., 0]).sum(1)[..., None]
        else:
            read = read.reshape(*read.shape[:3], -1, self._scores)
            self.said += torch.einsum("ghmk,ghkms->gks", heard, read)


def read_values(
    values: Float[Tensor, "group head key channel"], directions: Float[Tensor, "batch head channel direction"]
) -> Float[Tensor, "group head key direction"]:
    """``p . v_j`` of every value with every direction of its image."""
    per_image = values.reshape(len(directions), -1, *values.shape[1:])
    if directions.shape[-1] == 1:
        read = (per_image * directions[:, None, :, None, :, 0]).sum(-1, keepdim=True)
    else:
        read = per_image @ directions[:, None]
    flat: Tensor = read.flatten(0, 1)
    return flat


# How far an update may be from what its path makes of A v, in the size of such updates.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.2


def _probe_direction(channels: int, like: Tensor) -> Tensor:
    """A fixed direction in which no structure of a model lies."""
    n = torch.arange(channels, device=like.device, dtype=like.dtype)
    return torch.sin(0.7 * n * n + 1)


class Wiring:
    """Whether what each block adds to the stream is what its recorded attention makes of the values.

    Every token's update is read in one fixed direction and compared with the same of ``A v``. The verdict is taken
    once, at the end, so that no device has to wait in between.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._excess: list[Tensor] = []

    def begin(self, block: Block) -> _Probe:
        return _Probe(block, self._note)

    def _note(self, name: str, excess: Tensor) -> None:
        self._names.append(name)
        self._excess.append(excess)

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


class _Probe:
    """One block's update against ``A v``, token by token."""

    def __init__(self, block: Block, note: Callable[[str, Tensor], None]) -> None:
        self._block, self._note = block, note
        between, site = block.between, block.site
        batch, tokens, channels = between.shape
        self._direction = _probe_direction(channels, between)
        everywhere = torch.arange(tokens, device=between.device)
        u = Covector(
            at=everywhere,
            scale=between.new_ones(batch, tokens),
            directions=self._direction.expand(batch, 1, 1, channels),
            kind=torch.zeros_like(everywhere),
            tokens=tokens,
        )
        pulled, self._constant = pull_through(block.path, u)
        self._pulled = pulled
        heads = site.shape[1]
        self._dense = pulled.kinds > 1
        if self._dense:
            grouped = block.layout.gather(pulled.dense()[:, :, 0])
            self._per_query = grouped.reshape(*grouped.shape[:2], heads, -1).transpose(1, 2)
        else:
            split = pulled.directions.reshape(batch, 1, heads, -1).permute(0, 2, 3, 1)
            self._read = read_values(site.values(slice(0, heads)), split)  # (group, head, key, 1)
        self._told = between.new_zeros(site.shape[0], site.shape[2], 1)

    def add(self, queries: Queries, heads: slice, attention: Tensor) -> None:
        if self._dense:
            averaged = attention @ self._block.site.values(heads)
            self._told[:, queries, 0] += (averaged * self._per_query[:, heads][:, :, queries]).sum((1, 3))
        else:
            self._told[:, queries] += (attention @ self._read[:, heads]).sum(1)

    def compare(self, wanted: Tensor | None) -> None:
        block, dtype = self._block, self._block.site.dtype
        told, _ = block.layout.scatter(self._told, len(block.between))
        scale = 1 if self._dense else self._pulled.scale
        told = told[..., 0] * scale + self._constant[..., 0]
        expected = (block.between @ self._direction) - (block.base @ self._direction)
        own, _ = block.statistics
        if wanted is not None:
            told, expected = told[:, wanted], expected[:, wanted]
        elif block.layout.covered is not None:
            told = torch.where(block.layout.covered, told, 0.0)
        # The update is a difference of two streams, and a small one of large streams is known to their rounding only.
        kind, channels = torch.finfo(dtype), block.base.shape[-1]
        length = (channels * (own.variance + own.mean.square())).sqrt()
        rounding = self._direction.norm() * (kind.eps * length + channels**0.5 * kind.smallest_normal)
        if wanted is not None:
            rounding = rounding[:, wanted]
        tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
        typical = expected.square().mean(1, keepdim=True).sqrt()
        allowed = tolerance * (typical + expected.abs()) + rounding
        self._note(block.name, ((told - expected).abs() / allowed).amax())


def check_layout(block: Block) -> None:
    """Attention has to be from token to token."""
    members = block.layout.gather(block.between[:1, :, :1]).shape[1]
    queries, keys = block.site.shape[2:]
    if queries != members or (block.keys is None and keys != members):
        raise UnsupportedModelError(
            f"the attention of {block.name!r} is {queries} x {keys}, its tokens are "
            f"{members}; expected attention from token to token (not from channel to channel)"
        )


def positive_gradient_attention(
    block: Block,
    output_gradient: Tensor,
    rows: Float[Tensor, "batch token row"],
    at: Int[Tensor, " place"] | None,
    normalized: bool,
    wiring: Wiring | None,
) -> tuple[Float[Tensor, "batch token row"], Float[Tensor, "batch row"]]:
    """``r A'`` with ``A' = E_h[(dA * A)^+]``, ``dA = (dL/dO) v^T``, and what of it fell on padded places."""
    check_layout(block)
    site, keys = block.site, block.keys or block.layout
    d_output = site.output_gradient(output_gradient)
    d_output = d_output.to(accumulation_dtype(d_output))
    if d_output.shape[1] != site.shape[1]:
        raise RecordingError(
            f"the output of {site.module!r} has {d_output.shape[1]} heads, its attention {site.shape[1]}"
        )
    wanted, grouped = _wanted(block, at, None), block.layout.gather(rows)
    probe = None if wiring is None else wiring.begin(block)
    mixed = grouped.new_zeros(len(grouped), site.shape[3], grouped.shape[-1])
    for queries, turns in site.chunks(wanted):
        fuser = Fuser("mean", site.shape[1])
        for heads, attention in turns:
            if probe is not None:
                probe.add(queries, heads, attention)
            d_attention = d_output[:, heads][:, :, queries] @ site.values(heads).transpose(-2, -1)
            fuser.add(d_attention.mul_(attention).clamp_(min=0))
        weighted = fuser.fused()
        if normalized:
            total = weighted.sum(-1, keepdim=True)
            weighted = torch.where(total > 0, weighted / total, weighted)
        mixed += weighted.transpose(-2, -1) @ grouped[:, queries]
    if probe is not None:
        probe.compare(wanted)
    return keys.scatter(mixed, len(rows))
