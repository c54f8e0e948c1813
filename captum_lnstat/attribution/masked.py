"""What the methods share that mask the image: the scores of masked images, put back on the pixels of their masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_lnstat.attribution.arguments import joined, the_image
from captum_lnstat.attribution.batches import chunks
from captum_lnstat.recording.forward import (
    ForwardArgs,
    Output,
    Target,
    TensorOrTuple,
    check_output,
    expand_additional_forward_args,
    expand_target,
    format_additional_forward_args,
    format_output,
    is_tuple,
    log_usage,
    pick_output,
    run_forward,
)
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.rules.checks import check_numbers
from captum_lnstat.rules.target import target_score

if TYPE_CHECKING:
    from jaxtyping import Float

PER_EVAL = 32


@dataclass(frozen=True)
class Masks:
    """The masks of one image.

    Attributes:
        count: How many there are.
        some: From a slice of them to the masks, ``(mask, height, width)``, 1 where the image is shown.
        hidden: What is shown where a mask is 0; broadcasts to the image.
        weight: What the sum over the masks is divided by; ``None`` for the sum of the masks at each pixel.
    """

    count: int
    some: Callable[[slice], Float[Tensor, "mask height width"]]
    hidden: Tensor | float
    weight: float | None


class MaskedAttribution(PerturbationAttribution):  # type: ignore[misc]
    """``S = sum_m f(x M + z (1 - M)) M / w``: every mask counts as much as what is left of the image scores."""

    def __init__(self, forward_func: Callable[..., Any], *, output: Output = None, probabilities: bool = True) -> None:
        if not callable(forward_func):
            raise TypeError(f"forward_func is a {type(forward_func).__name__}; expected a function of the images")
        if not isinstance(probabilities, bool):
            raise TypeError(f"probabilities is {probabilities!r}; expected True or False")
        check_output(output)
        super().__init__(forward_func)
        self.output, self.probabilities = output, probabilities

    @abstractmethod
    def masks(self, image: Float[Tensor, "1 channel height width"], additional_forward_args: ForwardArgs) -> Masks:
        """The masks of an image."""

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Target = None,
        additional_forward_args: ForwardArgs = None,
        *,
        perturbations_per_eval: int = PER_EVAL,
    ) -> TensorOrTuple:
        """The attributions, of the inputs' shape, evenly over the channels.

        Args:
            inputs: Images, ``(batch, channels, height, width)``, normalised for the model, or a tuple with them.
            target: The class to explain, in any of Captum's forms.
            additional_forward_args: Passed on to ``forward_func`` after the images.
            perturbations_per_eval: How many masked images go through the model at a time; memory grows with it.

        Raises:
            ValueError, TypeError: The images are no images, or ``perturbations_per_eval`` is no positive int.
        """
        if isinstance(perturbations_per_eval, bool) or not isinstance(perturbations_per_eval, int):
            raise TypeError(f"perturbations_per_eval is {perturbations_per_eval!r}; expected a positive int")
        if perturbations_per_eval < 1:
            raise ValueError(f"perturbations_per_eval is {perturbations_per_eval}; expected at least 1")
        images = check_numbers(the_image(inputs))
        if images.dim() != 4:
            raise ValueError(
                f"inputs has shape {tuple(images.shape)}; expected images, (batch, channels, height, width)"
            )
        found = []
        with torch.no_grad():
            for image, wanted, arguments in chunks(images, target, additional_forward_args, 1):
                arguments = format_additional_forward_args(arguments)
                map_ = self._map(image.detach(), wanted, arguments, perturbations_per_eval)
                found.append((map_ / image.shape[1]).to(image.dtype).expand(image.shape).contiguous())
        result: TensorOrTuple = format_output(is_tuple(inputs), (joined(found),))
        return result

    def _map(self, image: Tensor, target: Target, arguments: ForwardArgs, per_eval: int) -> Tensor:
        """``(1, 1, height, width)``."""
        masks = self.masks(image, arguments)
        dtype = accumulation_dtype(image)
        total = image.new_zeros(image.shape[2:], dtype=dtype)
        cover = torch.zeros_like(total)
        for start in range(0, masks.count, per_eval):
            some = masks.some(slice(start, min(start + per_eval, masks.count))).to(image)
            shown = image * some[:, None] + masks.hidden * (1 - some[:, None])
            score = self._score(shown, target, arguments).to(dtype)
            total += torch.einsum("m,mhw->hw", score, some.to(dtype))
            cover += some.to(dtype).sum(0)
        weight = cover.clamp(min=torch.finfo(dtype).tiny) if masks.weight is None else masks.weight
        return (total / weight)[None, None]

    def _score(self, images: Tensor, target: Target, arguments: ForwardArgs) -> Float[Tensor, " mask"]:
        count = len(images)
        expanded = expand_additional_forward_args(arguments, count)
        returned = pick_output(run_forward(self.forward_func, (images,), None, expanded), self.output)
        if self.probabilities and returned.dim() > 1:
            returned = returned.softmax(1)
        return target_score(returned, expand_target(target, count))
