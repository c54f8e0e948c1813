"""``LayerLNStat``: relevance at the tokens of a chosen block, in Captum's layer convention."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NoReturn

import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_lnstat.attribution.arguments import joined, the_image
from captum_lnstat.attribution.base import record, relevance_of, warn_of_nothing
from captum_lnstat.attribution.batches import chunks
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.attribution.one_pass import OnePass
from captum_lnstat.errors import UnsupportedModelError, warn_caller
from captum_lnstat.recording.eager import eager
from captum_lnstat.recording.forward import (
    ForwardArgs,
    Output,
    Target,
    TensorOrTuple,
    format_output,
    is_tuple,
    log_usage,
)
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.statistics import ResidualShare
from captum_lnstat.rules import Relevance, find_rule
from captum_lnstat.rules.checks import check_fits
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.rule import DEFAULT
from captum_lnstat.topology import DividedTopology, find_topology
from captum_lnstat.trace.steps import Block, MergingShare
from captum_lnstat.trace.trace import Trace


class LayerLNStat(LayerAttribution, OnePass):  # type: ignore[misc]
    r"""Relevance of the tokens at the input or output of one transformer block.

    The rules of ``LNStatAttribution`` walk from the head down; here they stop at the block and read its tokens as they
    would read the patch tokens of the image. ``"evidence"`` is complete at every block: the evidence of its tokens, of
    padded places and of the constant of everything above adds up to the score.

    The relevance of a token is spread evenly over its channels, so that the sum over the channels is the token's.
    Prefix tokens have evidence and rollout of their own; ``"lnstat"`` gives prefix tokens zero. Behind the last block
    of a model that reads its class token alone, no patch token is looked at any more: ``"lnstat"`` is zero there, and
    says so with a warning.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        layer (nn.Module): One of the model's blocks. May be reassigned, as ``TCAV`` does.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        rule (str): ``"lnstat"`` (default), ``"evidence"`` or ``"rollout"``.
        residual (str): As for ``LNStatAttribution``.
        head_fusion (str or Callable, optional): As for ``LNStatAttribution``.
        merging (str): As for ``LNStatAttribution``.
        contrastive (bool): As for ``LNStatAttribution``. Default: False
        output (str, int or Callable, optional): As for ``LNStatAttribution``.
        evidence_residual (str, optional): Deprecated, as for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.

    Examples::

        >>> from captum.attr import LayerAttribution
        >>> from captum_lnstat import LayerLNStat, zoo
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> image = swin.transform(scene.image)[None]
        >>> layer = LayerLNStat(swin.model, swin.model.layers[1].blocks[0])
        >>> attribution = layer.attribute(image, target=scene.labels[0])
        >>> # The block's output is channels last: 1 x 8 x 8 tokens x channels
        >>> attribution.shape[:3]
        torch.Size([1, 8, 8])
        >>> # Captum's interpolate expects the channels first
        >>> LayerAttribution.interpolate(attribution.permute(0, 3, 1, 2).sum(1, keepdim=True), (64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        model: nn.Module | None = None,
        *,
        rule: str = DEFAULT,
        residual: ResidualShare = "deviation",
        head_fusion: HeadFusion | None = None,
        merging: MergingShare = "variance",
        contrastive: bool = False,
        output: Output = None,
        evidence_residual: ResidualShare | None = None,
    ) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)
        find_rule(rule, at_every_block=True)
        self._lnstat = LNStatAttribution(
            forward_func,
            model,
            rule=rule,
            residual=residual,
            head_fusion=head_fusion,
            merging=merging,
            contrastive=contrastive,
            output=output,
            evidence_residual=evidence_residual,
        )

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "Layer LN Stat"

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not on offer: what ended on biases and padded places is not in the attributions."""
        raise NotImplementedError("the delta needs what ended on biases and padded places, which no token holds")

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Target = None,
        additional_forward_args: ForwardArgs = None,
        attribute_to_layer_input: bool = False,
        *,
        internal_batch_size: int | None = None,
    ) -> TensorOrTuple:
        r"""Attribute the target's score to the tokens of the block.

        Args:
            inputs (Tensor or tuple[Tensor]): As for ``LNStatAttribution.attribute``.
            target (int, tuple, Tensor or list, optional): As for ``LNStatAttribution.attribute``. Default: None
            additional_forward_args (Any, optional): Passed on to ``forward_func`` after the images. Default: None
            attribute_to_layer_input (bool, optional): The tokens that the block reads instead of those that it
                returns. Default: False
            internal_batch_size (int, optional): As for ``LNStatAttribution.attribute``. Default: None

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**:

            - **attributions**: Of the shape of the block's output (or input), in the dtype and tuple form of
              ``inputs``: ``(batch, token, channel)`` with the prefix tokens first for a ViT, ``(batch, row, column,
              channel)`` for a Swin, ``(batch, channel, row, column)`` for a CoAtNet. For
              ``LayerAttribution.interpolate``, move the channels before rows and columns.

        Raises:
            ValueError, TypeError, AssertionError, IndexError, RuntimeError, UnsupportedModelError, RecordingError: As
                for ``LNStatAttribution.attribute``; a ValueError also if ``layer`` is not a block of the model: the
                message names the blocks.
        """
        spread: list[Tensor] = []
        for image, part, arguments in chunks(the_image(inputs), target, additional_forward_args, internal_batch_size):
            relevance, shape, trace = explain_layer(self, image, part, arguments, attribute_to_layer_input)
            with torch.inference_mode(False), torch.no_grad():
                before, behind = relevance.prefix.tensor_split([relevance.prefix.shape[1] - trace.suffix], 1)
                tokens = torch.cat([before, relevance.grid.flatten(1), behind], 1)
                grid = relevance.grid.shape[1:]
                channel = 1 if len(shape) == 4 and shape[2:] == grid != shape[1:3] else len(shape) - 1
                # Prefix tokens that join the stream later are not among the block's own (CaiT).
                own = shape.numel() // (shape[0] * shape[channel])
                tokens = tokens[:, tokens.shape[1] - own :]
                values = check_fits((tokens / shape[channel]).to(image.dtype))
                values = values.reshape(*shape[:channel], *shape[channel + 1 :])
                spread.append(values.unsqueeze(channel).expand(shape).contiguous())
        whole = joined(spread)
        return format_output(is_tuple(inputs), (whole.transpose(0, 1) if trace.tokens_first else whole,))  # type: ignore[no-any-return]

    @property
    def lnstat(self) -> LNStatAttribution:
        """The same rule at the image; Captum's wrappers and users reassign ``forward_func``."""
        lnstat = copy(self._lnstat)
        lnstat.forward_func = self.forward_func
        return lnstat


def explain_layer(
    method: LayerLNStat,
    inputs: Tensor | tuple[Tensor, ...],
    target: Target,
    additional_forward_args: ForwardArgs = None,
    attribute_to_layer_input: bool = False,
) -> tuple[Relevance, torch.Size, Trace]:
    """The relevance at the block's tokens, the shape of the activation there with its batch first, and the trace."""
    lnstat = method.lnstat
    outcome = record(lnstat, inputs, [target], additional_forward_args)
    if outcome.trace.family == DividedTopology.family:
        raise UnsupportedModelError(
            f"a block of {type(lnstat.transformer).__name__} attends twice, over time and over space, and what lies "
            "between is not the output of a module; expected LNStatAttribution, at the video"
        )
    block = _block(method.layer, outcome, find_topology(eager(lnstat.transformer)).model)
    call = outcome.recording.call(block.name)
    activation = call.input if attribute_to_layer_input else call.output
    above = outcome.above(block, into=attribute_to_layer_input)
    relevance = relevance_of(lnstat, above)[0]
    warn_of_nothing(lnstat.method, above, [relevance], unread_only=True)
    if lnstat.rule == "lnstat" and not above.trace.steps and not bool(relevance.grid.any()):
        warn_caller(
            f"every patch token is zero at the output of {block.name!r}: the head reads prefix tokens only. Take "
            "attribute_to_layer_input=True, a block before it, or rule='evidence'"
        )
    turned = outcome.trace.tokens_first
    return relevance, (activation.turned() if turned else activation).tensor.shape, outcome.trace


def _block(layer: Any, outcome: Pass, model: nn.Module) -> Block:
    blocks = outcome.trace.blocks
    if isinstance(layer, nn.Module):
        for block in blocks:
            if eager(model.get_submodule(block.name)) is eager(layer):
                return block
    raise ValueError(
        f"layer is a {type(layer).__name__}, which is not a block of {type(model).__name__}; expected one of its "
        f"blocks: {', '.join(block.name for block in blocks)}"
    )
