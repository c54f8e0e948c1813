"""Grad-CAM at any layer of a transformer, whatever the layout of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.recording.hooks import Hooks
from captum_lnstat.topology.anatomy.structure import structure_of

if TYPE_CHECKING:
    from jaxtyping import Float

# What the first norm of a block is called: timm and torchvision's Swin, torchvision's ViT, Hugging Face.
_FIRST_NORMS = ("norm1", "ln_1", "layernorm_before", "norm_before")


def last_first_norm(model: nn.Module) -> str:
    """Name of the first norm of the last block, the usual layer for transformers.

    Raises:
        ValueError: No module is called like one.
    """
    names: list[str] = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _FIRST_NORMS]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no module called {', '.join(_FIRST_NORMS)}; name a layer: gradcam:LAYER"
        )
    return names[-1]


class GradCam:
    r"""Grad-CAM (Selvaraju et al., ICCV 2017) at a named layer, resized to the image.

    .. math:: M = \max(0, \sum_k \bigl(\tfrac{1}{N} \sum_i \tfrac{\partial y_c}{\partial a_{ki}}\bigr) a_k)

    with :math:`a_k` channel ``k`` of the layer's output over its ``N`` patches; prefix tokens are left out of both
    sums. Captum's ``LayerGradCam`` gives the same where the layer's output is ``(batch, channel, row, column)``; it
    would take the tokens of ``(batch, token, channel)`` and the rows of ``(batch, row, column, channel)`` for channels.

    Args:
        forward (Callable): From images to class scores.
        model (nn.Module): The model that it runs.
        layer (str, optional): A module of the model. Default: the first norm of the last block.
    """

    def __init__(self, forward: Callable[..., Any], model: nn.Module, layer: str | None = None) -> None:
        self.forward, self.model = forward, model
        self.layer = last_first_norm(model) if layer is None else layer
        # What was asked last, and the answer.
        self._last: tuple[Any, tuple[tuple[int, ...], int]] = None, ((0, 0), 0)
        try:
            self.module = model.get_submodule(self.layer)
        except AttributeError:
            raise ValueError(
                f"{type(model).__name__} has no module {self.layer!r}; the usual one is {last_first_norm(model)!r}"
            ) from None

    def attribute(self, images: Tensor, target: int | Tensor) -> Float[Tensor, "batch 1 height width"]:
        """The maps of the targets, one for all images or one for each.

        Raises:
            ValueError: The layer ran not once, or its output cannot be placed on the image.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.append(output)

        hooks = Hooks()
        with torch.enable_grad():
            try:
                hooks.add(self.module, after=keep)
                scores = self.forward(images.detach().requires_grad_(True))
            finally:
                hooks.remove()
            classes = torch.as_tensor(target, device=scores.device).reshape(-1, 1).expand(len(scores), 1)
            wanted = scores.gather(1, classes).sum()
        if len(seen) != 1 or not isinstance(seen[0], Tensor):
            raise ValueError(
                f"layer {self.layer!r} ran {len(seen)} times, or does not return a tensor; expected one that runs once"
            )
        (gradient,) = torch.autograd.grad(wanted, seen[0])
        activation, gradient = (self._channels_first(part.detach(), images) for part in (seen[0], gradient))
        grid = (self._weights(gradient) * activation).sum(1, keepdim=True).clamp(min=0)
        return F.interpolate(grid, images.shape[2:], mode="bilinear", align_corners=False)

    def _weights(self, gradient: Tensor) -> Tensor:
        """What activations are weighted with: one number a channel."""
        return gradient.mean((2, 3), keepdim=True)

    def _channels_first(self, values: Tensor, images: Tensor) -> Float[Tensor, "batch channel row column"]:
        if values.dim() == 3:
            rows, columns, prefix = self._grid(values.shape[1], images)
            return values[:, prefix:].transpose(1, 2).reshape(len(values), -1, rows, columns)
        if values.dim() == 4:
            return values if self._is_channels_first(values.shape) else values.permute(0, 3, 1, 2)
        raise ValueError(
            f"layer {self.layer!r} returns {tuple(values.shape)}; expected (batch, token, channel), (batch, row, "
            "column, channel) or (batch, channel, row, column)"
        )

    def _is_channels_first(self, shape: torch.Size) -> bool:
        """Which dimension of four holds the channels, by what the module says of itself."""
        if isinstance(self.module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | nn.MaxPool2d | nn.AvgPool2d):
            return True
        if isinstance(self.module, nn.LayerNorm | nn.Linear):
            # timm's LayerNorm2d is an nn.LayerNorm that takes channels first.
            return "2d" in type(self.module).__name__.lower()
        # Elsewhere, as in a whole block: rows and columns go together, the channels are the odd one out.
        if shape[1] == shape[2] != shape[3]:
            return False
        if shape[2] == shape[3] != shape[1]:
            return True
        raise ValueError(
            f"which of {tuple(shape)} are the channels of layer {self.layer!r} is not certain; name a norm or a "
            "convolution in it"
        )

    def _grid(self, tokens: int, images: Tensor) -> tuple[int, int, int]:
        """Rows, columns and prefix tokens of a flat sequence of tokens."""
        (height, width), before = self._patches(images)
        rows, columns = height, width
        while rows >= 1 and columns >= 1:
            for prefix in dict.fromkeys((before, 0)):
                if tokens == prefix + rows * columns:
                    return rows, columns, prefix
            if (rows, columns) == (1, 1):
                break
            rows, columns = -(-rows // 2), -(-columns // 2)
        raise ValueError(
            f"layer {self.layer!r} has {tokens} tokens, neither the {height} x {width} patches "
            f"after {before} prefix tokens nor a stage of them; name another layer"
        )

    def _patches(self, images: Tensor) -> tuple[tuple[int, ...], int]:
        """Rows and columns of patches, and the tokens before them: a forward pass, once for a size and a model."""
        asked = images.shape[1:], self.forward, structure_of(self.model)
        known, found = self._last  # another thread may ask for another size meanwhile
        if known != asked:
            described = LNStatAttribution(self.forward, self.model, rule="rollout").describe(images[:1])
            found = tuple(described.grid), described.prefix_tokens
            self._last = asked, found
        return found


class HiResCAM(GradCam):
    r"""HiResCAM (Draelos and Carin, arXiv 2011.08891) at a named layer: Grad-CAM without the mean over the patches.

    .. math:: M_i = \max(0, \sum_k \frac{\partial y_c}{\partial a_{ki}} a_{ki})

    The positive part is taken, as of Grad-CAM, so that the two are compared in what they weigh alone. It needs no form
    of its own for Swin: the layer's grid is laid over the image.

    Args:
        forward (Callable): From images to class scores.
        model (nn.Module): The model that it runs.
        layer (str, optional): A module of the model. Default: the first norm of the last block.

    Example:
        >>> from captum_lnstat import HiResCAM, zoo
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> HiResCAM(swin.model, swin.model).attribute(swin.transform(scene.image)[None], scene.labels[0]).shape
        torch.Size([1, 1, 64, 64])
    """

    def _weights(self, gradient: Tensor) -> Tensor:
        return gradient
