"""Published methods that are made of gradients of attention or of tokens, each from its paper's formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from captum_lnstat.attribution.arguments import check_choice
from captum_lnstat.attribution.baselines import OfGradients
from captum_lnstat.attribution.pixels import Interpolation
from captum_lnstat.recording.forward import Output
from captum_lnstat.rules.agcam import agcam
from captum_lnstat.rules.attcat import attcat
from captum_lnstat.rules.beyond_intuition import Approximation, beyond_intuition
from captum_lnstat.rules.legrad import legrad
from captum_lnstat.rules.rule import Rule


class LeGrad(OfGradients):
    r"""LeGrad (Bousselham et al., ICCV 2025): how sensitive each block's own score is to the block's attention.

    The score of block ``l`` is that of the mean of the :math:`N` tokens after it, read by the model's own head (its
    last norm, its pooling, its classifier), and

    .. math:: M_j = \frac{1}{L} \sum_l \frac{1}{H N} \sum_{h, i}
        (\frac{\partial s_l}{\partial A^h_{l, ij}})^+, \qquad
        s_l = y_c(\tfrac{1}{N} \sum_i x_{l, i}).

    No product over the blocks; a gradient goes through one block's MLP and no further. Prefix tokens are left out of
    the map. The paper has no Swin form. Derived here: the mean over ``i`` is that over the places of a window; where
    stages are merged above a block, :math:`s_l = \sum_i u_i \cdot x_{l, i}` with :math:`u` the direction in which
    the mean of the last tokens is read, pulled back through the mergings with their LayerNorm statistics constant; a
    merged token shares its value evenly among its children.

    One forward pass and less than one backward pass. Models whose stages are joined by what is not affine, or whose
    blocks are no modules, are refused.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.

    Examples::

        >>> from captum_lnstat import LeGrad, zoo
        >>> vit = zoo.load("vit-mini")
        >>> scene = zoo.scenes()[0]
        >>> LeGrad(vit.model).attribute(vit.transform(scene.image)[None], target=scene.labels[0]).shape
        torch.Size([1, 3, 64, 64])
    """

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "LeGrad"

    @property
    def method(self) -> Rule:
        """The mean of every block's positive gradients."""
        return Rule(
            self.get_name(), "E_l E_hi (ds_l/dA)^+", legrad, differentiable="model", starts=False, detailed=True
        )


class AGCAM(OfGradients):
    r"""Attention-guided CAM (Leem and Seo, AAAI 2024): positive gradients, guided by the sigmoid of attention scores.

    With :math:`S` what the softmax is given, :math:`A = \operatorname{softmax}(S)`, and :math:`r_i` the weight with
    which the head reads token ``i``,

    .. math:: M_j = \sum_l \sum_h \sum_i r_i
        (\frac{\partial y_c}{\partial A^h_{l, ij}})^+ \sigma(S^h_{l, ij}).

    The paper's form is that of a class token, :math:`r_i = 1` there: its row alone. Derived here: the weights of a
    model that averages its tokens, :math:`1 / N`; for Swin the same at the last stage, an even part of a token's
    weight for each of its children below a merging; ``S`` with the position bias and the mask of the windows; a merged
    token shares its value evenly among its children.

    One forward and one backward pass. Attention whose maps are mixed after the softmax is refused.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.

    Examples::

        >>> from captum_lnstat import AGCAM, zoo
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> AGCAM(swin.model).attribute(swin.transform(scene.image)[None], target=scene.labels[0]).shape
        torch.Size([1, 3, 64, 64])
    """

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "AGCAM"

    @property
    def method(self) -> Rule:
        """Guided gradients, added up over the blocks."""
        formula = "sum_lh r (dA)^+ * sigmoid(S)"
        return Rule(self.get_name(), formula, agcam, differentiable="model", starts=False, detailed=True)


class AttCAT(OfGradients):
    r"""AttCAT (Qiang et al., NeurIPS 2022): what tokens say for the class, by how much they are attended to. Signed.

    With :math:`x_{l, j}` token ``j`` after block ``l``, and :math:`a_{l, j}` the mean over heads and queries of the
    attention that block ``l`` pays to it,

    .. math:: M_j = \sum_l a_{l, j} \sum_k x_{l, jk} \frac{\partial y_c}{\partial x_{l, jk}}.

    The paper is on text. Derived here, for Swin: the mean over the queries is that over the places of a window, and a
    merged token shares its value evenly among its children.

    One forward and one backward pass. Attention that returns fewer tokens than it attends to is refused.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.

    Examples::

        >>> from captum_lnstat import AttCAT, zoo
        >>> vit = zoo.load("vit-mini")
        >>> scene = zoo.scenes()[0]
        >>> AttCAT(vit.model).relevance(vit.transform(scene.image)[None], target=scene.labels[0]).shape
        torch.Size([1, 8, 8])
    """

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "AttCAT"

    @property
    def method(self) -> Rule:
        """Token times gradient, weighted with attention."""
        return Rule(self.get_name(), "sum_l a <x, dy/dx>", attcat, differentiable="model", starts=False)


class BeyondIntuition(OfGradients):
    r"""Beyond Intuition (Chen et al., TMLR 2023): attention perception times reasoning feedback.

    .. math:: M_j = \sum_i r_i P_{ij} F_{ij}, \quad P = \prod_l (\bar A_l + I), \quad
        F = \operatorname{E}_h (\frac{1}{K} \sum_{k=1}^K
        \frac{\partial y_c(\frac{k}{K} X)}{\partial A^h_L})^+

    with :math:`r_i` the weight with which the head reads token ``i`` (1 at a class token, :math:`1 / N` of a mean over
    the tokens), the last block first in the product, and :math:`\bar A` one of

    - token-wise: :math:`\bar A_{ij} = \operatorname{E}_h A^h_{ij} \, \lVert v_j W_O \rVert / \lVert x_j \rVert`, by how
      much longer what attention writes of a token is than the token;
    - head-wise: :math:`\bar A = \sum_h \theta_h A^h`, :math:`\theta_h = I_h / \sum_h I_h`,
      :math:`I_h = \lvert \sum_{ij} A^h_{ij} \, \partial y_c / \partial A^h_{ij} \rvert`.

    Values are those that the attention averages, LayerNorm and bias in them. The paper has no Swin form. Derived here:
    in a block with a norm after the attention, :math:`v_j W_O` goes through that with the statistics of token ``j``;
    :math:`I_h` is summed over all windows of the image; a merged token shares its row of ``P`` evenly among its
    children, and each of them has its feedback.

    ``steps`` forward passes with a backward pass to the last attention each; head-wise, one of these goes all the way.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``. It is run ``steps`` times.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        approximation (str): ``"token"`` (default) or ``"head"``.
        steps (int): ``K``, of the integral over images from zero to the image as the model is given it. Default: 20
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.

    Examples::

        >>> from captum_lnstat import BeyondIntuition, zoo
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> beyond = BeyondIntuition(swin.model, approximation="head", steps=4)
        >>> beyond.relevance(swin.transform(scene.image)[None], target=scene.labels[0]).shape
        torch.Size([1, 16, 16])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        approximation: Approximation = "token",
        steps: int = 20,
        interpolation: Interpolation = "bilinear",
        output: Output = None,
    ) -> None:
        super().__init__(forward_func, model, interpolation=interpolation, output=output)
        check_choice("approximation", approximation, ("token", "head"))
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps is {steps!r}; expected a positive int")
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        self.approximation, self.steps = approximation, steps

    @property
    def method(self) -> Rule:
        """Perception times feedback."""
        compute = partial(beyond_intuition, approximation=self.approximation, steps=self.steps)
        return Rule(
            self.get_name(), f"r (P * F), {self.approximation}-wise", compute, differentiable="model", starts=False
        )
