"""LibraGrad: gradient methods on the linearised backward pass of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from captum_lnstat.attribution.arguments import check_choice
from captum_lnstat.attribution.base import GridAttribution
from captum_lnstat.attribution.pixels import Interpolation
from captum_lnstat.recording.forward import Output
from captum_lnstat.rules.attcat import attcat
from captum_lnstat.rules.linearised import full_gradient, token_gradient
from captum_lnstat.rules.relevance import Settings
from captum_lnstat.rules.rule import Compute, Rule

Form = Literal["fullgrad+", "attcat", "inputxgradient"]
_FORMS: dict[str, tuple[str, Compute]] = {
    "fullgrad+": ("sum_l x_l dy/dx_l + sum of b dy/db, frozen", full_gradient),
    "attcat": ("sum_l a_l x_l dy/dx_l, frozen", attcat),
    "inputxgradient": ("x_0 dy/dx_0, frozen", token_gradient),
}


class LibraGrad(GridAttribution):
    r"""LibraGrad (Mehri, Soleymani Baghshah and Pilehvar, CVPR 2025): gradients with a balanced backward pass.

    Attention probabilities, the deviations of LayerNorms and the gates of activations are constants of the backward
    pass, as for ``FrozenLayerNorm``; the gradient is taken at the tokens. With :math:`x_{l,i}` token ``i`` before block
    ``l``, :math:`T_{l,i} = \langle x_{l,i}, \partial y_c / \partial x_{l,i} \rangle` and :math:`T_{L,i}` the same at
    the end of the stream, patch ``i`` gets

    .. math::
        \text{fullgrad+:} \quad & \sum_{l=0}^{L} T_{l,i} + \sum_{l} (\text{sent}_{l,i} - \text{received}_{l,i}) \\
        \text{attcat:} \quad & \sum_{l=1}^{L} a_{l,i} T_{l,i} \\
        \text{inputxgradient:} \quad & T_{0,i}

    FullGrad+ is defined as the input times gradient of every layer, the embedding, blocks and mergings, plus that of
    every bias; what attention carries from one token to another, *sent* and *received*, is what is left of the biases
    when they are added up. The bias of the head and the last norm's are left out. ``AttCAT`` says what :math:`a_l` is.
    For a Swin the paper has no form: here a coarse token's value is shared evenly by the patches under it. A gated MLP
    holds one branch constant, where the paper halves both.

    Signed. One forward and one backward pass; fused attention stays in place.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        form (str): ``"fullgrad+"`` (default), ``"attcat"`` or ``"inputxgradient"``.
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is none of those above; the message names them.
        UnsupportedModelError: From ``attribute``: the model has steps that are neither plain blocks nor patch mergings.

    Examples::

        >>> from captum_lnstat import zoo
        >>> from captum_lnstat.attribution.libragrad import LibraGrad
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> image = swin.transform(scene.image)[None]
        >>> LibraGrad(swin.model).attribute(image, target=scene.labels[0]).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        form: Form = "fullgrad+",
        interpolation: Interpolation = "bilinear",
        output: Output = None,
    ) -> None:
        check_choice("form", form, tuple(_FORMS))
        settings = Settings(head_fusion="mean", merging="uniform")
        super().__init__(forward_func, model, settings=settings, interpolation=interpolation, output=output)
        self.form = form

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "LibraGrad"

    @property
    def method(self) -> Rule:
        """The form's."""
        formula, compute = _FORMS[self.form]
        return Rule(f"LibraGrad {self.form}", formula, compute, differentiable="affine", starts=False)
