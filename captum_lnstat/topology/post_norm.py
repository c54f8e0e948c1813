"""Blocks that the stream leaves through its norms: ``x' = LN(x + attention(x))``, ``x'' = LN(x' + mlp(x'))``.

With its statistics frozen such a norm is an affine map of each token. So a block is four steps: the attention, whose
update is added to ``x``; a norm; the MLP, whose update is added to ``x'``; a norm. The first norm reads ``x + d`` and
divides both parts by one number: the residual share is what it is in a pre-norm block.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from captum_lnstat.layout import Grid, Layout
from captum_lnstat.recording.recording import NormCall, Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.parts import parts_of
from captum_lnstat.topology.anatomy.unfolding import unfolded
from captum_lnstat.topology.anatomy.units import norm_step
from captum_lnstat.topology.residual import far_apart, norms_in_order, output_of, path_to_update, residual_block
from captum_lnstat.trace.steps import Block, Step, Update


def block_steps(name: str, block: nn.Module, recording: Recording, layout: Layout, grid: Grid) -> list[Step]:
    """One block, its norms before what they feed or behind what they read.

    Args:
        name: Dotted name of the block in the recording.
        block: The block.
        recording: The pass.
        layout: How the stream's tokens become the attention's queries and keys.
        grid: Rows and columns of patch tokens.

    Raises:
        RecordingError, UnsupportedModelError: As ``residual_block``.
    """
    parts, call = parts_of(block, name), recording.call(name)
    first, *others = norms_in_order(name, parts, recording)
    reads_stream = first.input.tensor.data_ptr() == call.input.tensor.data_ptr()
    if reads_stream or len(others) != 1:
        return [residual_block(name, block, recording, layout)]
    (second,) = others
    after, left = stream(call.output.read()), output_of(second)
    if bool(far_apart(left, after)):
        return [residual_block(name, block, recording, layout)]
    site = unfolded(recording.site(f"{name}.{parts.attention}"), parts.out.in_features)
    path, before = path_to_update(name, parts, site, recording), stream(call.input.read())
    return through_norms(Block(name, site, layout, before, before, before, path), first, second, after, grid)


def through_norms(block: Block, first: NormCall, second: NormCall, after: Tensor, grid: Grid) -> list[Step]:
    """The four steps of a block, given with what attends, which the stream leaves through two norms.

    Args:
        block: Its attention; where its streams after that lie is read here.
        first: The norm of the stream with the attention's update.
        second: The norm of that with the MLP's.
        after: What the block returned.
        grid: Rows and columns of patch tokens.
    """
    between, normed, summed = stream(first.input.read()), output_of(first), stream(second.input.read())
    return [
        replace(block, between=between, after=between, centred=first.centred),
        norm_step(first.module, first, between, normed, grid),
        Update(f"{block.name}.mlp", normed, summed),
        norm_step(second.module, second, summed, after, grid),
    ]
