"""Maps read at a block instead of at the patches, put back on the image by the geometry of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.base import record
from captum_lnstat.attribution.layer import LayerLNStat, explain_layer
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.attribution.pixels import to_pixels
from captum_lnstat.layout import Groups, even_shares
from captum_lnstat.recording.eager import eager
from captum_lnstat.rules import layer_rule_names
from captum_lnstat.topology import find_topology
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


def geometry(model: nn.Module, inputs: Float[Tensor, "1 3 height width"]) -> Trace:
    """The way of one forward pass: blocks, mergings and grids.

    Raises:
        UnsupportedModelError, RecordingError: As for ``LNStatAttribution.attribute``.
    """
    return record(LNStatAttribution(model, rule="rollout"), inputs, [None]).trace


def map_after(
    model: nn.Module,
    inputs: Float[Tensor, "1 3 height width"],
    target: int,
    *,
    depth: int,
    rule: str = "lnstat",
    contrastive: bool = False,
) -> Float[Tensor, "height width"]:
    """Relevance of the tokens after the first ``depth`` blocks, each where its patches are on the image.

    The rule stops at the block (``LayerLNStat``). A token that stands for several patches, behind a patch merging, is
    spread evenly over them: how fine the map is says how coarse the tokens are there.

    Args:
        model: The transformer, in eval mode.
        inputs: One image.
        target: The class.
        depth: 1 to the number of blocks less one.
        rule: One that ``LayerLNStat`` has.
        contrastive: As for ``LNStatAttribution``.

    Returns:
        A map of the image's size, whose sum is the relevance of the patch tokens there.

    Raises:
        ValueError: No such depth, or a rule without layers.
        UnsupportedModelError, RecordingError: As for ``LNStatAttribution.attribute``.

    Example:
        >>> from captum_lnstat import zoo
        >>> model = zoo.load("swin-mini").model
        >>> map_after(model, torch.rand(1, 3, 64, 64), 0, depth=2).shape
        torch.Size([64, 64])
    """
    if rule not in layer_rule_names():
        raise ValueError(f"rule={rule!r} has the full map only; expected one of {', '.join(layer_rule_names())}")
    trace = geometry(model, inputs)
    if not 1 <= depth < len(trace.blocks):
        raise ValueError(f"depth is {depth}; expected 1 to {len(trace.blocks) - 1}")
    block = trace.blocks[depth]
    layer = eager(find_topology(eager(model)).model).get_submodule(block.name)
    reader = LayerLNStat(model, layer, rule=rule, contrastive=contrastive)
    found, _ = explain_layer(reader, inputs, target, attribute_to_layer_input=True)
    with torch.no_grad():
        tokens = torch.cat([found.prefix, found.grid.flatten(1)], 1)
        grid = to_patches(tokens, trace, block)
        return to_pixels(grid, (inputs.shape[2], inputs.shape[3]), trace.patch)[0]


def to_patches(tokens: Float[Tensor, "batch token"], trace: Trace, block: Block) -> Float[Tensor, "batch row column"]:
    """What tokens before ``block`` stand for, on the patch grid; prefix tokens stand for no patch.

    Args:
        tokens: One value a token of the stream that ``block`` reads.
        trace: The whole way that ``block`` is on.
        block: One of its blocks.
    """
    below = trace.steps[: next(i for i, step in enumerate(trace.steps) if step is block)]
    for step in reversed(below):
        groups = step.below
        if groups is not None:
            tokens = _split(tokens, groups)
    patches = tokens[:, trace.prefix :]
    if trace.place is not None:
        patches = patches[:, trace.place]
    return patches.reshape(len(patches), *trace.grid)


def _split(tokens: Tensor, groups: Groups) -> Tensor:
    """The value of every parent, in even parts, to its children."""
    shares = even_shares(groups, tokens.dtype)
    return groups.scatter((tokens[:, :, None] * shares).flatten(0, 1)[..., None], len(tokens))[0][..., 0]
