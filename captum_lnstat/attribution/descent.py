"""How relevance comes down from the head to the image: at every block, and by every head of one, from a single pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.base import record, relevance_of
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.forward import Output
from captum_lnstat.recording.sites import FusedSite, SoftmaxSite
from captum_lnstat.rules import find_rule
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.perception import rollout
from captum_lnstat.rules.relation import propagate
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class BlockRelevance:
    """One block on the way, for one image.

    Attributes:
        name: Dotted name of the block.
        relevance: At the patch tokens that the block reads.
        residual: Residual share of the patch tokens after its attention, 0 to 1.
        variance: Variance over the channels of the patch tokens that the attention's update is added to.
        cell: Height and width of a token that the block reads, in pixels of the model's image.
    """

    name: str
    relevance: Float[Tensor, "row column"]
    residual: Float[Tensor, "row_after column_after"]
    variance: Float[Tensor, "row_after column_after"]
    cell: tuple[int, int]


@dataclass(frozen=True)
class HeadRelevance:
    """The attention heads of one block, for one image.

    Attributes:
        name: Dotted name of the block.
        heads: What each head passes on to the patch tokens that the block reads: ``((1 - alpha) * r) A_h`` with ``r``
            the class-agnostic relevance of the tokens after the block, rolled with the mean of the heads.
        cell: As for ``BlockRelevance``.
    """

    name: str
    heads: Float[Tensor, "head row column"]
    cell: tuple[int, int]


def descend(
    model: nn.Module,
    inputs: Float[Tensor, "1 channel height width"],
    target: int | None = None,
    *,
    rule: str = "rollout",
    output: Output = None,
) -> tuple[BlockRelevance, ...]:
    """Relevance, residual shares and token variances at every block.

    Args:
        model: The transformer.
        inputs: One image, normalised for it.
        target: The class; ``rule="rollout"`` needs none.
        rule: ``"rollout"``, ``"lnstat"`` or ``"evidence"``, read at the tokens of the block as ``LayerLNStat`` does.
        output: As for ``LNStatAttribution``.

    Returns:
        One record a block, from the image to the head.

    Raises:
        ValueError: Not one image, or an unknown rule.
        UnsupportedModelError: The tokens between the blocks are not in the order of the grid's rows.

    Example:
        >>> from captum_lnstat import zoo
        >>> vit = zoo.load("vit-mini")
        >>> first = descend(vit.model, vit.transform(zoo.scenes()[0].image)[None])[0]
        >>> first.name, tuple(first.relevance.shape)
        ('blocks.0', (8, 8))
    """
    find_rule(rule, at_every_block=True)
    lnstat = LNStatAttribution(model, rule=rule, output=output)
    outcome = _record(lnstat, inputs, target)
    found = []
    for block in outcome.trace.blocks:
        above, after = (outcome.trace.above(block, into=into) for into in (True, False))
        relevance = relevance_of(lnstat, outcome.above(block, into=True))[0]
        with torch.no_grad():
            share = _patches(block.residual_share(lnstat.settings.residual), after, block)
            block.forget()
            variance = _patches(block.own_statistics.variance, after, block)
        found.append(BlockRelevance(block.name, relevance.grid[0], share, variance, _cell(outcome.trace, above)))
    return tuple(found)


def descend_heads(
    model: nn.Module, inputs: Float[Tensor, "1 channel height width"], *, output: Output = None
) -> tuple[HeadRelevance, ...]:
    """What every head of every block passes on.

    Args:
        model: The transformer.
        inputs: One image, normalised for it.
        output: As for ``LNStatAttribution``.

    Returns:
        One record a block, from the image to the head.

    Raises:
        ValueError, UnsupportedModelError: As for ``descend``.

    Example:
        >>> from captum_lnstat import zoo
        >>> swin = zoo.load("swin-mini")
        >>> heads = descend_heads(swin.model, swin.transform(zoo.scenes()[0].image)[None])
        >>> [tuple(block.heads.shape) for block in heads[1:4]]
        [(2, 16, 16), (4, 8, 8), (4, 8, 8)]
    """
    lnstat = LNStatAttribution(model, rule="rollout", head_fusion="mean", output=output)
    outcome = _record(lnstat, inputs, None)
    with torch.inference_mode(False), torch.no_grad():
        return tuple(_heads(block, outcome, lnstat) for block in outcome.trace.blocks)


def _heads(block: Block, outcome: Pass, lnstat: LNStatAttribution) -> HeadRelevance:
    trace, settings = outcome.trace, lnstat.settings
    at_output = rollout(outcome.above(block, into=False), settings)[0]
    row = torch.cat([at_output.prefix, at_output.grid.flatten(1)], 1)[:, -block.after.shape[1] :]
    rest = (block.shares_of(settings.residual)[1] * row)[..., None]
    grids, above = [], trace.above(block, into=True)
    for head in range(block.site.shape[1]):
        came = propagate(block, rest, fusion=lambda maps, head=head: maps[:, head])  # type: ignore[misc]
        grids.append(_patches(came.rows[..., 0], above, block))
    return HeadRelevance(block.name, torch.stack(grids), _cell(trace, above))


def _cell(trace: Trace, above: Trace) -> tuple[int, int]:
    """The pixels under a token of a stage; a grid that was odd before a merging is one token wider than half."""
    rows, columns = (round(fine / coarse) for fine, coarse in zip(trace.grid, above.grid, strict=True))
    return trace.patch[0] * rows, trace.patch[1] * columns


def _record(lnstat: LNStatAttribution, inputs: Tensor, target: int | None) -> Pass:
    if inputs.dim() != 4 or len(inputs) != 1:
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}; expected one image, (1, channel, height, width)")
    outcome = record(lnstat, inputs, [target])
    trace = outcome.trace
    windowed = [
        block.name
        for block in trace.blocks
        if trace.family == "hierarchical"
        and isinstance(block.site, FusedSite | SoftmaxSite)
        and block.site.value is not None
        and block.site.value.tensor.dim() == 5
    ]
    if trace.place is not None or windowed:
        raise UnsupportedModelError(
            f"between the blocks of {type(lnstat.transformer).__name__} the tokens are not in the order of the "
            "image's rows, so they cannot be drawn as a map there; the map at the image is right: LNStatAttribution"
        )
    return outcome


def _patches(tokens: Float[Tensor, "batch token"], trace: Trace, block: Block) -> Float[Tensor, "row column"]:
    """The patch tokens of a stream, which come last in it, on their grid."""
    rows, columns = trace.grid
    prefix = tokens.shape[1] - rows * columns
    if not 0 <= prefix <= trace.prefix:
        raise UnsupportedModelError(
            f"{block.name!r} has {tokens.shape[1]} tokens for a grid of {rows} x {columns} and {trace.prefix} prefix "
            "tokens; they cannot be drawn as a map"
        )
    return tokens[0, prefix:].reshape(rows, columns)
