"""Captum's infidelity and sensitivity for maps, per image, with perturbations that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max
from torch import Tensor

from captum_lnstat.metrics.checks import check_batch, check_images, result_dtype
from captum_lnstat.metrics.perturbation import fill_images
from captum_lnstat.metrics.targets import Classes, class_indices, class_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from captum_lnstat.metrics.shapes import Images, Maps, PerImage


def patch_draws(
    height: int, width: int, *, patch: int, share: float, draws: int, seed: int
) -> Bool[Tensor, "draw height width"]:
    """Random choices of square patches: the same number of patches in every draw, at least one.

    Example:
        >>> patch_draws(4, 4, patch=2, share=0.25, draws=3, seed=0).sum((1, 2))
        tensor([4, 4, 4])
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; expected a number between 0 and 1")
    if patch < 1 or patch > max(height, width) or draws < 1:
        raise ValueError(
            f"patch is {patch} and draws {draws} for images of {height} x {width} px; expected a patch within the "
            "image and one draw or more"
        )
    rows, cols = -(-height // patch), -(-width // patch)
    if rows * cols < 2:
        raise ValueError(
            f"a patch of {patch} px covers the whole image of {height} x {width} px; expected a smaller one"
        )
    count = min(max(1, round(share * rows * cols)), rows * cols - 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(draws, rows * cols, dtype=torch.bool, device="cpu")
    for draw in chosen:
        draw[torch.randperm(rows * cols, generator=generator, device="cpu")[:count]] = True
    grid = chosen.view(draws, rows, cols)
    return grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]


def infidelity(
    forward: Callable[[Tensor], Any],
    images: Images,
    maps: Maps,
    target: Classes,
    *,
    fill: Float[Tensor, "..."],
    patch: int | None = None,
    share: float = 0.2,
    draws: int = 32,
    seed: int = 0,
    normalize: bool = True,
    max_examples_per_batch: int | None = None,
) -> PerImage:
    """Captum's infidelity when patches are replaced by ``fill``; lower is better.

    ``mean over draws of (sum of the map over the replaced pixels - (f(x) - f(x with them replaced)))^2``, f the
    target's score. A map is taken for relevance, that is for what each pixel adds to the score over ``fill``: in
    Captum's words, the perturbation is ``(x - perturbed) / (x - baseline)``, 1 on replaced pixels. Every image meets
    the same patches, so its value does not depend on the batch.

    Args:
        forward: The model, or a function from images to scores ``(batch, classes)``.
        images: As the model takes them.
        maps: One map an image, of the image's size: attributions summed over the channels.
        target: One class for all, or one for every image.
        fill: What replaced pixels become, in the model's input space: ``black(mean, std)`` and the like.
        patch: Side of a patch in pixels; by default a 14th of the shorter side, 16 at 224.
        share: Share of the patches replaced in every draw.
        draws: How many draws; each is a forward pass an image.
        seed: Of the patches.
        normalize: Scale every map first by the factor that suits it best, so that a map's unit is of no account.
            Without it, only maps in units of the score can do well.
        max_examples_per_batch: Of a forward pass; at least the number of images.

    Example:
        >>> import torch
        >>> def forward(images):  # what every pixel adds is known
        ...     return images.sum((1, 2, 3))[:, None]
        >>> images, nothing = torch.rand(2, 3, 8, 8), torch.zeros(1, 3, 1, 1)
        >>> infidelity(forward, images, images.sum(1), 0, fill=nothing, patch=2) < 1e-9
        tensor([True, True])
        >>> infidelity(forward, images, torch.rand(2, 8, 8), 0, fill=nothing, patch=2) > 0.1
        tensor([True, True])
    """
    check_images(images, maps)
    classes, other = class_indices(target, images), fill_images(fill, images)
    class_scores(forward, images, classes)  # says in plain words what is wrong with forward or target
    height, width = images.shape[2:]
    patch = max(1, min(height, width) // 14) if patch is None else patch
    removed = patch_draws(height, width, patch=patch, share=share, draws=draws, seed=seed).to(images.device)
    used = 0

    def replace(repeated: Tensor) -> tuple[Tensor, Tensor]:
        # Captum asks for the draws in turns when max_examples_per_batch is small; images in the outer order.
        nonlocal used
        turn = len(repeated) // len(images)
        masks = removed[used : used + turn].repeat(len(images), 1, 1)[:, None]
        used += turn
        changed = torch.where(masks, other.repeat_interleave(turn, 0), repeated)
        return masks.to(repeated.dtype).expand_as(repeated), changed

    def scored(given: Tensor) -> Tensor:
        return class_scores(forward, given, classes[:0])

    # The sum over channels is the map's: Captum wants attributions of the images' shape. In float64, as its scaled form
    # is a difference of large sums.
    spread = (maps.double() / images.shape[1])[:, None].expand_as(images).contiguous()
    values: Tensor = captum_infidelity(
        scored,
        replace,
        images,
        spread,
        target=classes,
        n_perturb_samples=draws,
        max_examples_per_batch=max_examples_per_batch,
        normalize=normalize,
    )
    return values.clamp(min=0).to(result_dtype(maps))


def sensitivity(
    explain: Callable[..., Tensor],
    images: Images,
    target: Classes,
    *,
    radius: float = 0.02,
    draws: int = 10,
    seed: int = 0,
    max_examples_per_batch: int | None = None,
) -> PerImage:
    """Captum's maximal sensitivity: how far a map moves when faint noise is added to the image; lower is better.

    ``max over draws of |explain(x + noise) - explain(x)| / |explain(x)|`` in the Euclidean norm, with uniform noise in
    ``[-radius, radius]``. Every image meets the same noise, so its value does not depend on the batch. A map that
    does not look at the image has 0: never read it alone.

    Args:
        explain: ``explain(images, target=...)`` to maps or attributions, such as
            ``LNStatAttribution(model).attribute``.
        images: As the model takes them.
        target: One class for all, or one for every image.
        radius: Of the noise, in the model's input space.
        draws: How many.
        seed: Of the noise.
        max_examples_per_batch: Of a call of ``explain``; at least the number of images.

    Example:
        >>> import torch
        >>> sensitivity(lambda images, target: images.sum(1) * 0 + 1, torch.rand(2, 3, 4, 4), 0)
        tensor([0., 0.])
    """
    check_batch(images)
    if not radius > 0 or draws < 1:
        raise ValueError(f"radius is {radius} and draws {draws}; expected a radius above 0 and one draw or more")
    classes = class_indices(target, images)
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.rand((draws, *images.shape[1:]), generator=generator, device="cpu") * 2 - 1) * radius
    noise, used = noise.to(images), 0

    def add_noise(repeated: Tensor) -> Tensor:
        nonlocal used
        turn = len(repeated) // len(images)
        added = noise[used : used + turn].repeat(len(images), 1, 1, 1)
        used += turn
        return repeated + added

    def explained(given: Tensor | tuple[Tensor, ...], target: Tensor) -> tuple[Tensor]:
        values = explain(given[0] if isinstance(given, tuple) else given, target=target)
        if not isinstance(values, Tensor):
            raise TypeError(f"explain returned a {type(values).__name__}; expected one tensor")
        if not bool(values.isfinite().all()):
            raise ValueError("explain returned values that are NaN or infinite; expected finite ones")
        # Always a tuple: Captum's first call gives one, and would take a lone tensor apart by images.
        return (values.detach().to(torch.promote_types(values.dtype, torch.float32)).contiguous(),)

    values: Tensor = sensitivity_max(
        explained,
        images,
        perturb_func=add_noise,
        n_perturb_samples=draws,
        max_examples_per_batch=max_examples_per_batch,
        target=classes,
    )
    return values
