"""Input times gradient at every place of the stream of a linearised pass, and what its attention moved: LibraGrad.

In a pass with ``differentiable="affine"`` attention probabilities, deviations of norms and gates are constants, so
``T_i = <dy/dx_i, x_i>`` at any place of the stream is what token ``i`` there contributes to the score. Between two
places ``T`` changes by what the biases of the layers add, and by what attention carries from token to token:

    T after the block = T before it - sent + received + biases

with ``sent_j = sum_hi A^h_ij <dy/do^h_i, v^h_j>`` and ``received_i`` the same summed over the keys. That gives the
biases of all layers without looking at one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.statistics import accumulation_dtype, stream
from captum_lnstat.rules.attention_gradient import check_graph, output_edge, slopes
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import Request, RowVector, Walk, walk
from captum_lnstat.trace.steps import Block, Merging, Step

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.rules.engine import Pass


@dataclass(frozen=True)
class Linearised:
    """What a linearised pass says of the score.

    Attributes:
        inputs: ``T`` of the tokens before each step, by the step's name.
        end: ``T`` of the tokens at the end of the stream.
        outputs: The gradient at the output of each block's attention, by the block's name.
    """

    inputs: dict[str, Float[Tensor, "batch token 1"]]
    end: Float[Tensor, "batch token 1"]
    outputs: dict[str, Tensor]

    @classmethod
    def of(cls, outcome: Pass) -> Linearised:
        """One backward pass.

        Raises:
            UnsupportedModelError: Steps of the model are neither plain blocks nor patch mergings.
            RecordingError: A part of the model is not in the graph of the score.
        """
        trace, stream_end = outcome.trace, outcome.head.stream_end
        for step in trace.steps:
            _check_step(step, trace.family)
        check_graph(outcome)
        given = {step.name: outcome.recording.call(step.name).input for step in trace.steps}
        edges = {block.name: output_edge(block) for block in trace.blocks}
        at: list[Tensor | GradientEdge] = [stream_end, *(kept.tensor for kept in given.values()), *edges.values()]
        end, *found = slopes(outcome, at)
        inputs = [_product(slope, kept.read()) for slope, kept in zip(found, given.values(), strict=False)]
        for step, values in zip(trace.steps, inputs, strict=True):
            if values.shape[1] != step.before.shape[1]:
                raise RecordingError(
                    f"{step.name!r} was given {values.shape[1]} tokens, and {step.before.shape[1]} were recognised; "
                    "expected tokens as (batch, token, channel) or (batch, row, column, channel)"
                )
        return cls(
            dict(zip(given, inputs, strict=True)),
            _product(end, stream_end.detach()),
            dict(zip(edges, found[len(given) :], strict=True)),
        )

    def moved(self, block: Block) -> tuple[Float[Tensor, "batch token 1"], Float[Tensor, "batch 1"]]:
        """``sent - received`` of every token in a block's attention; what padded places sent."""
        site, batch = block.site, len(block.before)
        slope = site.output_gradient(self.outputs[block.name])
        slope = slope.to(accumulation_dtype(slope))
        values = site.values(slice(0, site.shape[1]))
        sent = slope.new_zeros(site.shape[0], site.shape[3], 1)
        received = slope.new_zeros(site.shape[0], site.shape[2], 1)
        for queries, some_heads in site.chunks():
            for heads, attention in some_heads:
                d_output, v = slope[:, heads][:, :, queries], values[:, heads]
                sent += ((attention.transpose(-2, -1) @ d_output) * v).sum((1, 3))[..., None]
                received[:, queries] += ((attention @ v) * d_output).sum((1, 3))[..., None]
        tokens, padding = (block.keys or block.layout).scatter(sent, batch)
        return tokens - block.layout.scatter(received, batch)[0], padding


def _product(slope: Tensor, tokens: Tensor) -> Float[Tensor, "batch token 1"]:
    return (stream(slope) * stream(tokens)).sum(-1, keepdim=True)


def _check_step(step: Step, family: str) -> None:
    """Only steps that give every token its own gradient are known."""
    if isinstance(step, Merging) or (isinstance(step, Block) and step.below is None and step.carried is None):
        return
    raise UnsupportedModelError(
        f"{step.name!r} of this {family} transformer is neither a block that keeps its tokens nor a patch merging, so "
        "LibraGrad is not defined for it; expected a ViT or a Swin. FrozenLayerNorm has the same gradient at the pixels"
    )


def full_gradient(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """FullGrad+: ``sum_l T_l`` over the inputs of all layers, and what every bias adds, put where it is added."""
    return walk(outcome.trace, settings, _full(Linearised.of(outcome), outcome, settings))[0]


def _full(found: Linearised, outcome: Pass, settings: Settings) -> Walk:
    r = RowVector.of(found.end, None)
    for step in reversed(outcome.trace.steps):
        before = found.inputs[step.name]
        if isinstance(step, Block):
            yield Request(step, torch.zeros_like(r.tokens), None)  # only to see that it is wired as it was recognised
            # Biases of the block: T after it - T before it + sent - received; r holds T after it already.
            moved, padding = found.moved(step)
            r = RowVector(r.tokens + moved, None, r.padding + padding)
        else:
            assert step.below is not None
            # Biases of the merging: T of a parent - T of its children.
            children = step.below.gather(before).sum(1).reshape(len(before), -1, 1)
            r = r.plus(-children).to_children(step, settings.merging).plus(before)
        r = r.plus(before)
    return r.relevance(outcome.trace)


def token_gradient(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """Input times gradient at the tokens that the first block reads."""
    found, trace, score = Linearised.of(outcome), outcome.trace, outcome.score
    assert score is not None
    r = RowVector.of(found.inputs[trace.steps[0].name], None)
    return r.relevance(trace, score.to(r.tokens.dtype)[:, None] - r.tokens.sum(1))
