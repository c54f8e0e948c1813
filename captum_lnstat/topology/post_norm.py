"""Blocks that the stream leaves through its norms: ``x' = LN(x + attention(x))``, ``x'' = LN(x' + mlp(x'))``.

With its statistics frozen such a norm is an affine map of each token. So a block is four steps: the attention, whose
update is added to ``x``; a norm; the MLP, whose update is added to ``x'``; a norm. The first norm reads ``x + d`` and
divides both parts by one number: the residual share is what it is in a pre-norm block.
"""

from __future__ import annotations

from torch import nn

from captum_lnstat.layout import Grid, Layout
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.parts import parts_of
from captum_lnstat.topology.anatomy.unfolding import unfolded
from captum_lnstat.topology.anatomy.units import norm_step
from captum_lnstat.topology.residual import norms_in_order, off_by, output_of, path_to_update, residual_block
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
    if off_by(left, after) > 1:
        return [residual_block(name, block, recording, layout)]
    before, between, summed = (stream(kept.read()) for kept in (call.input, first.input, second.input))
    site = unfolded(recording.site(f"{name}.{parts.attention}"), parts.out.in_features)
    path, normed = path_to_update(name, parts, site, recording), output_of(first)
    return [
        Block(name, site, layout, before, between, between, path, centred=first.centred),
        norm_step(first.module, first, between, normed, grid),
        Update(f"{name}.mlp", normed, summed),
        norm_step(second.module, second, summed, after, grid),
    ]
