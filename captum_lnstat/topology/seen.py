"""Plain encoders whose blocks have none of the known builds: each block is read by what ran in it.

Blocks that hold their queries, keys and values themselves, attention that does not say how many heads it has, heads
that are modules of their own. Of such a block the recording says all: a norm reads what the block was given, another
one reads that and what the recorded attention makes of its values.
"""

from __future__ import annotations

from torch import nn

from captum_lnstat.errors import RecordingError
from captum_lnstat.layout import Grid, Layout
from captum_lnstat.recording.joined_heads import JoinedHeads
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.sites import AttentionSite, FusedSite, SoftmaxSite
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import block_lists, lists_of
from captum_lnstat.topology.anatomy.parts import channels_of, has_heads, layers
from captum_lnstat.topology.anatomy.refusal import is_attention, weighs_channels
from captum_lnstat.topology.anatomy.unfolding import unfolded
from captum_lnstat.topology.branches import branch_lists, path_as_seen
from captum_lnstat.topology.post_norm import through_norms
from captum_lnstat.topology.residual import far_apart, output_of
from captum_lnstat.trace.steps import Block, Step

# How far an update may be from what the attention makes of its values, to be taken for it, in its own size.
NEAR = 0.05


def is_seen_block(block: nn.Module) -> bool:
    """Whether a module can be a block: it holds two norms or more, Linears, no convolution, and something attends."""
    parts = list(block.modules())
    norms = sum(channels_of(part) is not None for part in parts)
    if isinstance(block, nn.ModuleList) or norms < 2 or len(layers(block, nn.Linear)) < 2 or layers(block, nn.Conv2d):
        return False
    attention = [part for part in parts if is_attention(part)]
    if len(attention) > 1:
        # Heads are in one list; attentions in other places are several, one after the other.
        heads = {id(part) for part in attention}
        if not any(isinstance(part, nn.ModuleList) and heads == set(map(id, part)) for part in parts):
            return False
    return (bool(attention) or has_heads(block)) and not any(map(weighs_channels, attention))


def seen_lists(model: nn.Module) -> dict[str, nn.Module]:
    """Lists of nothing but such blocks, by name, where there are none of blocks of a known build."""
    if block_lists(model) or branch_lists(model):
        return {}
    found = lists_of(model, is_seen_block)
    # Of a list in a block the block is what counts.
    return {name: part for name, part in found.items() if not any(_holds(outer, part) for outer in found.values())}


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return outer is not inner and any(part is inner for part in outer.modules())


def seen_block(name: str, block: nn.Module, recording: Recording, layout: Layout, grid: Grid) -> list[Step]:
    """Read one block from the recording, pre-norm or post-norm.

    Args:
        name: Dotted name of the block in the recording.
        block: The block.
        recording: The pass.
        layout: How the stream's tokens become the attention's queries and keys.
        grid: Rows and columns of patch tokens.

    Raises:
        RecordingError: Of the norms in it none reads what the block was given, or none that and the attention's update.
    """
    call = recording.call(name)
    before, after = stream(call.input.read()), stream(call.output.read())
    site = _site(name, recording, before.shape[-1])
    norms = [norm for norm in recording.norms_inside(name) if norm.input.tensor.numel() == before.numel()]
    pre = next((norm for norm in norms if norm.input.tensor.data_ptr() == call.input.tensor.data_ptr()), None)
    for place, norm in enumerate(norms):
        between = stream(norm.input.read())
        if norm is pre or between.shape != before.shape:
            continue
        path, off = path_as_seen(block, block, site, between - before)
        if not block.training and off > NEAR:
            continue
        if pre is not None:
            both = pre, norm
            return [Block(name, site, layout, before, between, after, path, norms=both, centred=norm.centred)]
        for last in norms[place + 1 :]:
            if not bool(far_apart(output_of(last), after)):
                one = Block(name, site, layout, before, between, between, path)
                return through_norms(one, norm, last, after, grid)
    raise RecordingError(
        f"no norm in {name!r} reads what the block is given, or none reads that with what its attention makes of the "
        f"values; {len(norms)} norms read tokens there. Expected x' = x + attention(norm(x)), x'' = x' + mlp(norm(x')) "
        "or x' = norm(x + attention(x)), x'' = norm(x' + mlp(x'))"
    )


def _site(name: str, recording: Recording, width: int) -> AttentionSite:
    """The attention of a block; of heads that are modules of their own, all of them."""
    sites = recording.sites_inside(name)
    if len(sites) < 2:
        return unfolded(recording.site(name), width)
    return JoinedHeads(name, tuple(_of_one_head(site) for site in sites))


def _of_one_head(site: AttentionSite) -> AttentionSite:
    value = site.value if isinstance(site, FusedSite | SoftmaxSite) else None
    return site if value is None else unfolded(site, value.tensor.shape[-1])
