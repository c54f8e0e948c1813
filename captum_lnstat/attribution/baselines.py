"""Known methods on the same engine and with the same surface, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.attribution.base import GridAttribution
from captum_lnstat.attribution.pixels import Interpolation
from captum_lnstat.recording.forward import Output
from captum_lnstat.recording.fusion import PLAIN, HeadFusion, check_fusion
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.gradient import gradient
from captum_lnstat.rules.perception import keep_all, raw_attention, rollout
from captum_lnstat.rules.relevance import Relevance, Settings, per_image
from captum_lnstat.rules.rule import Rule


class RawAttention(GridAttribution):
    r"""The attention of one block alone, as the head reads it: :math:`r A_l`, class-agnostic, sums to 1.

    With :math:`A_l` the head-fused attention of the block and :math:`r_i` the weight with which the head reads token
    ``i`` (1 at the class token, :math:`1 / N` for a model that averages its ``N`` tokens), patch ``j`` gets

    .. math:: P_j = \sum_i r_i A_{l, ij}.

    No relation of another block is applied. Windows and shifts are undone; a Swin's map is taken down through its
    patch mergings uniformly. What ends on prefix tokens or on padded places of windows is not on the patches.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        block (int): Which block; negative indices count from the last. Default: -1, the last.
        head_fusion (str or Callable): ``"mean"`` (default), ``"max"``, ``"min"`` or a callable.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them. ``attribute`` raises a
            ValueError if the model has no such block.

    Examples::

        >>> from captum_lnstat import RawAttention, zoo
        >>> vit = zoo.load("vit-mini")
        >>> image = vit.transform(zoo.scenes()[0].image)[None]
        >>> RawAttention(vit.model).attribute(image).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        block: int = -1,
        head_fusion: HeadFusion = "mean",
        interpolation: Interpolation = "bilinear",
        output: Output = None,
    ) -> None:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"block is {block!r}; expected the index of a block")
        check_fusion(head_fusion, PLAIN)
        settings = Settings(residual="half", head_fusion=head_fusion, merging="uniform")
        super().__init__(forward_func, model, settings=settings, interpolation=interpolation, output=output)
        self.block = block

    @property
    def method(self) -> Rule:
        """Attention of the block."""
        compute = partial(raw_attention, block=self.block)
        return Rule(self.get_name(), "r A of one block", compute, ("head_fusion",), class_specific=False)


class AttentionRollout(GridAttribution):
    """Attention rollout (Abnar and Zuidema, ACL 2020): ``r <- r (A + I) / 2``, class-agnostic, sums to 1.

    Starts at what the head reads: the class token, or the mean over the tokens of a Swin. Windows, shifts and mergings
    are undone as for ``LNStatAttribution``; no token statistics are used.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        head_fusion (str or Callable): ``"mean"`` (default), ``"max"``, ``"min"`` or a callable.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        head_fusion: HeadFusion = "mean",
        interpolation: Interpolation = "bilinear",
        output: Output = None,
    ) -> None:
        check_fusion(head_fusion, PLAIN)
        settings = Settings(residual="half", head_fusion=head_fusion, merging="uniform")
        super().__init__(forward_func, model, settings=settings, interpolation=interpolation, output=output)

    @property
    def method(self) -> Rule:
        """Perception with a share of a half."""
        return Rule(self.get_name(), "r <- r (A + I) / 2", rollout, ("head_fusion",), class_specific=False)


class OfGradients(GridAttribution):
    """What the baselines share that are made of gradients in the whole model: Captum's surface without options."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        interpolation: Interpolation = "bilinear",
        output: Output = None,
    ) -> None:
        settings = Settings(head_fusion="mean", merging="uniform", normalized=False)
        super().__init__(forward_func, model, settings=settings, interpolation=interpolation, output=output)


class GenericAttention(OfGradients):
    """Generic attention explainability (Chefer, Gur and Wolf, ICCV 2021): ``r <- r + r E_h[(dA * A)^+]``.

    Starts at the class token, or, for a model that averages its tokens, at the mean over them.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.
    """

    @property
    def method(self) -> Rule:
        """Positive gradients, with a share of 1."""
        compute = partial(gradient, share=keep_all)
        return Rule(self.get_name(), "r <- r + r E_h[(dA * A)^+]", compute, differentiable="model", starts=False)


class FrozenLayerNorm(GridAttribution):
    r"""Gradient times input with LayerNorm deviations, attention probabilities and activation gates held constant.

    For autograd the model is then affine in its input :math:`x`, and

    .. math:: a = x \odot \frac{\partial y_c}{\partial x}, \qquad \sum a = y_c - b,

    exactly, where :math:`b` is what biases, class token and position embedding add to the score. Held constant are

    - :math:`\sigma` in :math:`\gamma (x - \mu) / \sigma + \beta`, and the root mean square of an RMSNorm,
    - the attention probabilities :math:`A` in :math:`A v`: nothing flows into queries and keys,
    - :math:`f(x) / x` of an activation :math:`f` (GELU, SiLU, ReLU, tanh), taken as 1/2 at ``x = 0`` for the first
      three, the whole factor of a gated MLP, and factors such as a sigmoid.

    LayerScale and every other linear map stay as they are. What ``forward_func`` does around the model is
    differentiated as it is. Signed, per input element: there is no interpolation. ``relevance`` sums it over the
    channels and the pixels of every patch. One forward and one backward pass; fused attention stays in place.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.

    Examples::

        >>> from captum_lnstat import FrozenLayerNorm, zoo
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> image = swin.transform(scene.image)[None]
        >>> frozen = FrozenLayerNorm(swin.model)
        >>> frozen.attribute(image, target=scene.labels[0]).shape
        torch.Size([1, 3, 64, 64])
        >>> frozen.relevance(image, target=scene.labels[0]).shape
        torch.Size([1, 16, 16])
    """

    def __init__(
        self, forward_func: Callable[..., Any], model: nn.Module | None = None, *, output: Output = None
    ) -> None:
        super().__init__(forward_func, model, settings=Settings(), interpolation="nearest", output=output)

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "Frozen LayerNorm"

    @property
    def method(self) -> Rule:
        """Input times gradient, summed over every patch."""
        return Rule(self.get_name(), "x * dy/dx, frozen", _patch_sums, differentiable="affine", starts=False)

    def _to_inputs(self, outcome: Pass, grid: Tensor, image: Tensor) -> Tensor:
        return outcome.input_times_gradient.to(image.dtype).contiguous()


def _patch_sums(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    assert outcome.score is not None
    trace, pixels = outcome.trace, outcome.input_times_gradient.sum(outcome.trace.channel_axis)
    sides = list(zip(trace.grid, trace.patch, strict=True))  # tokens, and pixels of each, along every axis
    # An image padded to whole patches ends inside the last one; pixels past the last patch are never read.
    begins = [-round(start) for start in trace.origin or (0,) * len(sides)]
    whole = list(zip(sides, pixels.shape[1:], begins, strict=True))
    ends = [end for (count, part), side, begin in reversed(whole) for end in (begin, count * part - side - begin)]
    pixels = F.pad(pixels, ends)
    grid = pixels.reshape(-1, *(size for side in sides for size in side)).sum(
        [2 * axis + 2 for axis in range(len(sides))]
    )
    nothing = torch.zeros_like(grid.flatten(1)[:, 0])
    constant = outcome.score.to(grid.dtype) - per_image(grid)
    return (Relevance(grid, grid.new_zeros(len(grid), trace.prefix), nothing, constant),)
