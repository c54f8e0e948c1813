"""Maps read at a block instead of at the patches, put back on the image by the geometry of the model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.attribution.layer import LayerLNStat, explain_layer
from captum_lnstat.explanation.explainer import Explainer
from captum_lnstat.explanation.subject.subject import Subject
from captum_lnstat.layout import even_shares
from captum_lnstat.recording.eager import eager
from captum_lnstat.rules import find_rule
from captum_lnstat.topology import find_topology
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


class DepthExplainer(Explainer):
    """Explains by the tokens after the first ``depth`` blocks, each where its patches are on the image.

    The rule stops at the block (``LayerLNStat``). A token that stands for several patches, behind a patch merging, is
    spread evenly over them: how fine the map is says how coarse the tokens are there.

    Args:
        subject: The model.
        depth: 1 to the number of blocks less one.
        rule: One that ``LayerLNStat`` has.
        contrastive: As for ``LNStatAttribution``.

    Example:
        >>> from captum_lnstat.explanation.subject.subject import read_subject
        >>> explainer = DepthExplainer(read_subject("swin-mini"), depth=2)
        >>> trace, grid = explainer.relevance(torch.rand(1, 3, 64, 64), [0])
        >>> len(trace.blocks), grid.shape
        (6, torch.Size([1, 16, 16]))
    """

    def __init__(self, subject: Subject, *, depth: int, rule: str = "lnstat", contrastive: bool = False) -> None:
        super().__init__(subject, rule=rule, contrastive=contrastive)
        find_rule(rule, at_every_block=True)
        self.depth = depth
        self._layered = partial(LayerLNStat, rule=rule, contrastive=contrastive)

    def relevance(self, inputs: Tensor, targets: list[int] | None) -> tuple[Trace, Tensor]:
        """The trace of the images' pass, and on its patch grid the relevance of the tokens at the block.

        Raises:
            ValueError: No such depth.
        """
        model = self.subject.model
        trace = geometry(self.subject, inputs)
        if not 1 <= self.depth < len(trace.blocks):
            raise ValueError(f"depth is {self.depth}; expected 1 to {len(trace.blocks) - 1}")
        block = trace.blocks[self.depth]
        layer = eager(find_topology(eager(model)).model).get_submodule(block.name)
        found, *_ = explain_layer(self._layered(model, layer), inputs, targets, attribute_to_layer_input=True)
        with torch.no_grad():
            return trace, to_patches(torch.cat([found.prefix, found.grid.flatten(1)], 1), trace, block)


def geometry(subject: Subject, inputs: Float[Tensor, "1 3 height width"]) -> Trace:
    """The trace of one forward pass: blocks, mergings and grids.

    Raises:
        UnsupportedModelError, RecordingError: As for ``LNStatAttribution.attribute``.
    """
    return Explainer(subject, rule="rollout").relevance(inputs, None)[0]


def to_patches(tokens: Float[Tensor, "batch token"], trace: Trace, block: Block) -> Float[Tensor, "batch row column"]:
    """What tokens before ``block`` stand for, on the patch grid; prefix tokens stand for no patch.

    Args:
        tokens: One value a token of the stream that ``block`` reads.
        trace: The whole trace that ``block`` is of.
        block: One of its blocks.
    """
    for groups in trace.below(block):
        # The value of every parent, in even parts, to its children.
        parts = (tokens[:, :, None] * even_shares(groups, tokens.dtype)).flatten(0, 1)
        tokens = groups.scatter(parts[..., None], len(tokens))[0][..., 0]
    return trace.on_grid(tokens)
