"""ViT-CX: the feature maps of a transformer's tokens as masks of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.attribution.baselines import FrozenLayerNorm
from captum_lnstat.attribution.masked import MaskedAttribution, Masks
from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.forward import ForwardArgs, Output
from captum_lnstat.rules.engine import run
from captum_lnstat.trace.maps import FrozenNorm

if TYPE_CHECKING:
    from jaxtyping import Float


class ViTCX(MaskedAttribution):
    r"""ViT-CX (Xie, Li, Cao and Zhang, IJCAI 2023): causal scores of the parts of the image that features light up.

    .. math:: S = \sum_k f_c\bigl(x \odot M_k + z \odot (1 - M_k)\bigr)\, M_k / \sum_k M_k

    with :math:`f_c` the probability of the class and :math:`z` noise of deviation ``noise``. Every channel of the
    tokens that the last block's attention reads is a map on the patch grid, scaled to [0, 1]. Maps whose cosine
    distance is below ``distance`` are merged (complete linkage), and the mean of each cluster, scaled to [0, 1] and
    enlarged bilinearly, is a mask. Derived from what is public of the paper's text; how the maps are linked is not said
    there. For a Swin the maps are those of its last stage.

    The noise comes from a generator of its own and is the same for every image. Positive; one recorded forward pass
    and one for each mask, at most as many as the tokens have channels. Needs SciPy.

    Args:
        forward_func (Callable): As for ``LNStatAttribution``.
        model (nn.Module, optional): As for ``LNStatAttribution``.
        distance (float): See above. Default: 0.1.
        noise (float): Standard deviation of the noise, in the model's input. Default: 0.1.
        seed (int): Of the noise. Default: 0.
        probabilities (bool): Take the softmax of the scores. Default: True.
        output (str, int or Callable, optional): As for ``LNStatAttribution``.

    Raises:
        ValueError, TypeError: An option is out of its range; the message names it.
        ImportError: From ``attribute``: SciPy is not installed.

    Examples::

        >>> from captum_lnstat import zoo
        >>> from captum_lnstat.attribution.vitcx import ViTCX
        >>> vit = zoo.load("vit-mini")
        >>> image = vit.transform(zoo.scenes()[0].image)[None]
        >>> ViTCX(vit.model).attribute(image, target=0).shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        distance: float = 0.1,
        noise: float = 0.1,
        seed: int = 0,
        probabilities: bool = True,
        output: Output = None,
    ) -> None:
        super().__init__(forward_func, output=output, probabilities=probabilities)
        if not 0 <= distance <= 2:
            raise ValueError(f"distance is {distance!r}; expected a cosine distance, 0 to 2")
        if not noise >= 0:
            raise ValueError(f"noise is {noise!r}; expected 0 or more")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed is {seed!r}; expected an int, 0 or more")
        self.model = FrozenLayerNorm(forward_func, model, output=output).transformer  # the same checks
        self.distance, self.noise, self.seed = distance, noise, seed

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "ViT-CX"

    def masks(self, image: Tensor, additional_forward_args: ForwardArgs) -> Masks:
        """One recorded forward pass."""
        forward = run(
            self.forward_func, self.model, image, (None,), additional_forward_args, starts=False, output=self.output
        )
        trace, block = forward.trace, forward.trace.blocks[-1]
        if trace.origin or not (trace.place is None or trace.one_grid):
            raise UnsupportedModelError(
                f"the patches of this {trace.family} transformer do not begin where the image does, or were put in "
                "another order before they were merged, so its feature maps are no masks of the image; RISE needs none"
            )
        tokens = block.before if block.norms is None else FrozenNorm.of(block.norms[0]).apply(block.before)
        at_block = trace if trace.one_grid else trace.above(block, into=True)
        maps = at_block.on_grid(tokens)[0].movedim(-1, 0)
        low = clusters(maps.flatten(1).double(), self.distance).reshape(-1, *maps.shape[1:]).to(image)
        whole = [count * side for count, side in zip(trace.grid, trace.patch, strict=True)]
        rng = torch.Generator().manual_seed(self.seed)
        noise = self.noise * torch.randn(image.shape[1:], generator=rng, dtype=torch.float64, device="cpu")

        def some(which: slice) -> Float[Tensor, "mask height width"]:
            large = F.interpolate(low[which, None], whole, mode="bilinear", align_corners=False)[:, 0]
            return large[:, : image.shape[2], : image.shape[3]]

        return Masks(len(low), some, noise.to(image), None)


def clusters(maps: Float[Tensor, "map patch"], distance: float) -> Float[Tensor, "cluster patch"]:
    """The mean of each cluster of maps, all scaled to [0, 1]; flat maps are left out.

    Example:
        >>> clusters(torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.1], [5.0, 5.0, 5.0], [1.0, 0.0, 0.0]]), 0.1)
        tensor([[0.0000, 0.4881, 1.0000],
                [1.0000, 0.0000, 0.0000]])
    """
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import pdist
    except ModuleNotFoundError as error:
        raise ImportError('ViTCX needs SciPy to merge maps: pip install "captum-lnstat[evaluate]"') from error
    scaled = _scaled(maps[maps.amax(1) > maps.amin(1)])
    if len(scaled) < 2:
        return scaled
    pairs = pdist(scaled.cpu().numpy(), "cosine")
    label = torch.from_numpy(fcluster(linkage(pairs, "complete"), distance, "distance")).long() - 1
    member = F.one_hot(label).T.to(scaled)
    return _scaled(member @ scaled / member.sum(1, keepdim=True))


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return (maps - low) / (high - low)
