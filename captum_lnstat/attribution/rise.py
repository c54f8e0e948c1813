"""RISE: random masks and the scores of what they leave, for any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.attribution.masked import MaskedAttribution, Masks
from captum_lnstat.recording.forward import ForwardArgs, Output

if TYPE_CHECKING:
    from jaxtyping import Float


class RISE(MaskedAttribution):
    r"""RISE (Petsiuk, Das and Saenko, BMVC 2018): the model is a black box, and needs not be a transformer.

    .. math:: S = \frac{1}{p N} \sum_{i=1}^{N} f_c(x \odot M_i)\, M_i

    with :math:`f_c` the probability of the class. A mask is a grid of ``cells`` x ``cells`` zeros and ones, 1 with
    probability :math:`p`, enlarged bilinearly to ``cells + 1`` times the size of a cell and cut out at random. Hidden
    pixels are 0 in the model's input, the mean colour where images are normalised by it.

    The masks come from a generator of their own and are the same for every image: a batch is what its images are one
    by one, and no random state of the caller's is touched. Positive; ``masks`` forward passes an image.

    Args:
        forward_func (Callable): From images to scores.
        masks (int): How many; the paper takes 4,000 and 8,000. Default: 4000.
        cells (int): Cells along each side of the grid that a mask is made from. Default: 7.
        share (float): Part of the cells that are shown, :math:`p`. Default: 0.5.
        seed (int): Of the masks. Default: 0.
        probabilities (bool): Take the softmax of the scores. Default: True.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is out of its range; the message names it.

    Examples::

        >>> from captum_lnstat import zoo
        >>> from captum_lnstat.attribution.rise import RISE
        >>> vit = zoo.load("vit-mini")
        >>> image = vit.transform(zoo.scenes()[0].image)[None]
        >>> RISE(vit.model, masks=8).attribute(image, target=0).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        masks: int = 4000,
        cells: int = 7,
        share: float = 0.5,
        seed: int = 0,
        probabilities: bool = True,
        output: Output = None,
    ) -> None:
        super().__init__(forward_func, output=output, probabilities=probabilities)
        for name, value, least in (("masks", masks, 1), ("cells", cells, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; expected an int")
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if not 0 < share < 1:
            raise ValueError(f"share is {share!r}; expected a number between 0 and 1")
        self.count, self.cells, self.share, self.seed = masks, cells, share, seed

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "RISE"

    def masks(self, image: Tensor, additional_forward_args: ForwardArgs) -> Masks:
        """The same for every image of a size."""
        height, width = image.shape[2:]
        if min(height, width) < self.cells:
            raise ValueError(
                f"inputs are {height} x {width} pixels; expected at least {self.cells} a side, or fewer cells"
            )
        rng = torch.Generator().manual_seed(self.seed)
        grids = torch.rand(self.count, self.cells, self.cells, generator=rng, device="cpu") < self.share
        cell = -(-height // self.cells), -(-width // self.cells)
        starts = torch.stack([torch.randint(side + 1, (self.count,), generator=rng, device="cpu") for side in cell], 1)

        def some(which: slice) -> Float[Tensor, "mask height width"]:
            size = [(self.cells + 1) * side for side in cell]
            large = F.interpolate(grids[which, None].to(image), size, mode="bilinear", align_corners=False)[:, 0]
            places = zip(large, starts[which].tolist(), strict=True)
            return torch.stack([one[top : top + height, left : left + width] for one, (top, left) in places])

        return Masks(self.count, some, 0.0, self.share * self.count)
