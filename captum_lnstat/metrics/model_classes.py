"""The measures that run the model, as torchmetrics classes; see ``classes`` for what they have in common.

The model is given to ``update`` and not kept: a metric is a module, and would move, copy and save the model with
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.metrics import captum_measures, faithfulness, perturbation
from captum_lnstat.metrics.classes import ImageMean
from captum_lnstat.metrics.perturbation import NINE, Curve, Order
from captum_lnstat.metrics.targets import Classes

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.metrics.shapes import Images, Maps

Forward = Callable[[Tensor], Any]
Fill = Tensor | Callable[[Tensor], Tensor]


class _OnModel(ImageMean):
    """Base of the metrics for which a model runs on images with removed pixels.

    Args:
        fill: What removed pixels become: ``black(mean, std)``, or a function of the images such as ``blurred``.
        kwargs: torchmetrics' own.
    """

    def __init__(self, fill: Fill, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._filling = fill

    def update(self, forward: Forward, images: Images, maps: Maps, target: Classes) -> None:
        fill = self._filling if isinstance(self._filling, Tensor) else self._filling(images)
        self._take(self.measure(forward, images, maps, target, fill=fill, **self.options))

    def _take(self, found: Any) -> None:
        self.add(found)


class _Path(_OnModel):
    """Base of the metrics along a path of changed images; the figure is the curves' mean height, ``Curve.auc``."""

    curve: Tensor

    def __init__(self, fill: Fill, length: int, **kwargs: Any) -> None:
        super().__init__(fill, **kwargs)
        self.add_state("curve", torch.zeros(length, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def _take(self, found: Curve) -> None:
        self.add(found.auc)
        self.curve += found.values.double().sum(0).to(self.curve.device)

    def compute(self) -> dict[str, Float[Tensor, "..."]]:
        """``auc``, the mean height of the curves, and ``curve``, their mean at every step.

        Raises:
            ValueError: No image was seen.
        """
        return {"auc": self.mean(), "curve": self.mean(self.curve)}


class _Perturbation(_Path):
    measure = staticmethod(perturbation.perturbation_curve)
    order: Order

    def __init__(self, fill: Fill, steps: Sequence[float] = NINE, **kwargs: Any) -> None:
        super().__init__(fill, len(steps), **kwargs)
        self.options = {"order": self.order, "steps": tuple(steps)}


class PositivePerturbation(_Perturbation):
    """``perturbation_curve``, most relevant pixels first: a dictionary ``auc``, ``curve``; lower is better.

    Example:
        >>> import torch
        >>> metric = PositivePerturbation(fill=torch.zeros(1, 1, 1, 1), steps=(0.0, 0.5))
        >>> score = lambda images: torch.stack([torch.full((len(images),), 0.5), images[:, 0, 0, 0]], 1)
        >>> metric(score, torch.ones(1, 1, 1, 2), torch.tensor([[[1.0, 0.0]]]), 1)
        {'auc': tensor(0.5000), 'curve': tensor([1., 0.])}
    """

    higher_is_better = False
    order = "positive"


class NegativePerturbation(_Perturbation):
    """``perturbation_curve``, least relevant pixels first: a dictionary ``auc``, ``curve``; higher is better.

    Example:
        >>> import torch
        >>> metric = NegativePerturbation(fill=torch.zeros(1, 1, 1, 1), steps=(0.0, 0.5))
        >>> score = lambda images: torch.stack([torch.full((len(images),), 0.5), images[:, 0, 0, 0]], 1)
        >>> metric(score, torch.ones(1, 1, 1, 2), torch.tensor([[[1.0, 0.0]]]), 1)
        {'auc': tensor(1.), 'curve': tensor([1., 1.])}
    """

    order = "negative"


class _Game(_Path):
    def __init__(self, fill: Fill, steps: int = 50, **kwargs: Any) -> None:
        super().__init__(fill, steps + 1, **kwargs)
        self.options = {"steps": steps}


class Deletion(_Game):
    """``deletion``: a dictionary ``auc``, ``curve`` of the target's probability; lower is better.

    Example:
        >>> import torch
        >>> score = lambda images: torch.stack([torch.zeros(len(images)), images.sum((1, 2, 3))], 1)
        >>> metric = Deletion(fill=torch.zeros(1, 1, 1, 1), steps=1)
        >>> metric(score, torch.ones(1, 1, 1, 2), torch.tensor([[[1.0, 0.0]]]), 1)["curve"]
        tensor([0.8808, 0.5000])
    """

    higher_is_better = False

    measure = staticmethod(perturbation.deletion)


class Insertion(_Game):
    """``insertion``: a dictionary ``auc``, ``curve`` of the target's probability; higher is better.

    Example:
        >>> import torch
        >>> score = lambda images: torch.stack([torch.zeros(len(images)), images.sum((1, 2, 3))], 1)
        >>> metric = Insertion(fill=torch.zeros(1, 1, 1, 1), steps=1)
        >>> metric(score, torch.ones(1, 1, 1, 2), torch.tensor([[[1.0, 0.0]]]), 1)["curve"]
        tensor([0.5000, 0.8808])
    """

    measure = staticmethod(perturbation.insertion)


class SaCo(_OnModel):
    """Mean of ``saco``; higher is better.

    Example:
        >>> import torch
        >>> score = lambda images: torch.stack([torch.zeros(len(images)), images[:, 0, 0, 0]], 1)
        >>> metric = SaCo(fill=torch.zeros(1, 1, 1, 1), groups=2)
        >>> metric(score, torch.ones(1, 1, 1, 2), torch.tensor([[[1.0, 0.0]]]), 1)
        tensor(1.)
    """

    measure = staticmethod(faithfulness.saco)
    plot_lower_bound = -1.0

    def __init__(self, fill: Fill, groups: int = 10, **kwargs: Any) -> None:
        super().__init__(fill, **kwargs)
        self.options = {"groups": groups}


class Infidelity(_OnModel):
    """Mean of ``infidelity``, whose options are keywords here; lower is better.

    Example:
        >>> import torch
        >>> score = lambda images: images.sum((1, 2, 3))[:, None]
        >>> images = torch.rand(1, 3, 4, 4)
        >>> bool(Infidelity(torch.zeros(1, 3, 1, 1), patch=2)(score, images, images.sum(1), 0) < 1e-9)
        True
    """

    measure = staticmethod(captum_measures.infidelity)
    higher_is_better = False
    plot_upper_bound = None

    def __init__(
        self,
        fill: Fill,
        *,
        patch: int | None = None,
        share: float = 0.2,
        draws: int = 32,
        seed: int = 0,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(fill, **kwargs)
        self.options = {"patch": patch, "share": share, "draws": draws, "seed": seed, "normalize": normalize}


class Sensitivity(ImageMean):
    """Mean of ``sensitivity``, whose options are keywords here; lower is better.

    Example:
        >>> import torch
        >>> Sensitivity(draws=2)(lambda images, target: images * 0 + 1, torch.rand(1, 3, 4, 4), 0)
        tensor(0.)
    """

    measure = staticmethod(captum_measures.sensitivity)
    higher_is_better = False
    plot_upper_bound = None

    def __init__(self, *, radius: float = 0.02, draws: int = 10, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = {"radius": radius, "draws": draws, "seed": seed}
