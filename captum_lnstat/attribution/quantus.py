"""Any Captum attribution as Quantus' ``explain_func``. Quantus itself is neither needed nor imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ExplainFunc = Callable[..., NDArray[Any]]


def quantus_explain_func(attribution: Callable[..., Any], *, sum_channels: bool = False, **options: Any) -> ExplainFunc:
    """Make a Captum attribution into an ``explain_func`` for Quantus' metrics: numpy in, numpy out.

    Args:
        attribution: A class such as ``LNStatAttribution`` or ``IntegratedGradients``, or any function that makes an
            attribution from a model: ``lambda model: NoiseTunnel(Saliency(model))``.
        sum_channels: Return ``(batch, 1, height, width)``, the sum over the channels, instead of the inputs' shape.
            Quantus' localisation metrics, which compare a map with a mask of one channel, need it.
        options: Given to ``attribution`` after the model.

    Returns:
        A function ``(model, inputs, targets, **kwargs)``. Inputs are moved to the model's device and dtype. The
        ``kwargs``, Quantus' ``explain_func_kwargs``, are given to ``attribute``, but for ``device``, on which the model
        already is. What comes back is in the inputs' floating dtype (float32 for others).

    Example:
        >>> import numpy as np
        >>> from captum.attr import IntegratedGradients
        >>> from captum_lnstat import LNStatAttribution, zoo
        >>> swin = zoo.load("swin-mini")
        >>> images = swin.transform(zoo.scenes()[0].image)[None].numpy()
        >>> explain = quantus_explain_func(LNStatAttribution, rule="evidence", sum_channels=True)
        >>> explain(model=swin.model, inputs=images, targets=np.array([0])).shape
        (1, 1, 64, 64)
        >>> quantus_explain_func(IntegratedGradients)(swin.model, images, np.array([0]), n_steps=4).shape
        (1, 3, 64, 64)
    """

    def explain_func(model: nn.Module, inputs: Any, targets: Any = None, **kwargs: Any) -> NDArray[Any]:
        kwargs.pop("device", None)
        given = np.asarray(inputs)
        target = None if targets is None else torch.from_numpy(np.array(targets, np.int64, order="C"))
        example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
        # Copies, since torch takes neither read-only arrays nor those with negative strides, such as flipped images.
        image = torch.from_numpy(np.array(given, order="C")).to(example)
        values = attribution(model, **options).attribute(
            image, target=None if target is None else target.to(example.device), **kwargs
        )
        if not isinstance(values, Tensor):
            raise TypeError(
                f"attribute returned a {type(values).__name__}; expected one tensor. Leave out options that return "
                "more, such as return_convergence_delta"
            )
        values = values.detach()
        if sum_channels:
            values = values.sum(1, keepdim=True, dtype=torch.promote_types(values.dtype, torch.float32))
        dtype = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(np.float32)
        array: NDArray[Any] = values.double().cpu().numpy().astype(dtype)  # numpy has no bfloat16
        return array

    return explain_func
