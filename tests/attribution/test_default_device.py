"""A default device that is not the model's: no tensor is made there. ``meta`` is a device that every machine has."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.contract import EVERY_METHOD, distilled, images, swin, swin_v2, vit
from torch import Tensor, nn

import captum_lnstat as lnstat
from captum_lnstat import metrics
from captum_lnstat.attribution.gradcam import GradCam
from captum_lnstat.attribution.quantus import quantus_explain_func
from captum_lnstat.metrics import classes


@contextmanager
def elsewhere() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


def assert_same(call: Callable[[], Any]) -> None:
    expected = call()
    with elsewhere():
        found = call()
    assert _plain(found) == _plain(expected)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.device), value.dtype, value.detach().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value]


@pytest.mark.parametrize("make", [vit, distilled, swin, swin_v2])
@pytest.mark.parametrize("name", [*EVERY_METHOD])
def test_every_method(name: str, make: Callable[[], nn.Module]) -> None:
    model, image = make(), images()
    assert_same(lambda: EVERY_METHOD[name](model).attribute(image, target=[1, 2]))


@pytest.mark.parametrize("make", [vit, swin])
def test_what_goes_with_a_method(make: Callable[[], nn.Module]) -> None:
    model, image = make(), images()
    method = lnstat.LNStatAttribution(model)
    assert_same(lambda: method.relevance_per_target(image, [0, 1, 2]))
    assert_same(lambda: method.attribute(image, target=torch.tensor([1, 2], device="cpu"), internal_batch_size=1))
    assert_same(lambda: GradCam(model, model).attribute(image, 1))
    assert_same(lambda: lnstat.patch_feature_mask(model, 32))
    assert_same(lambda: quantus_explain_func(lnstat.LNStatAttribution)(model, image.numpy(), np.array([1, 2])))
    with elsewhere():
        assert str(method.describe(image)) == str(method.describe(image))


@pytest.mark.parametrize("large", [False, True])
def test_images_that_are_copied_out_of_the_way(large: bool) -> None:
    size = 640 if large else 32
    model, image = vit(img_size=size, patch_size=size // 4), images(1, size)
    assert_same(lambda: lnstat.LNStatAttribution(model).attribute(image, target=1))


def test_explain(tmp_path: Any) -> None:
    from captum_lnstat import explain, zoo

    model = zoo.load("vit-mini")
    scene = zoo.scenes()[0]
    assert_same(lambda: explain(model, scene.image).relevance)


def test_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(2, 8, 8, generator=generator), torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 3:6] = True
    model, image, black = vit(), images(2), torch.zeros(2, 3, 32, 32)
    maps32 = torch.rand(2, 32, 32, generator=generator)
    with torch.no_grad():
        assert_same(lambda: [metrics.pointing(maps, masks), metrics.energy(maps, masks)])
        assert_same(lambda: metrics.perturbation_curve(model, image, maps32, [1, 2], fill=black).values)
        assert_same(lambda: metrics.perturbation_curve(model, image, maps32, 1, fill=black).auc)
    for kind in (classes.Pointing, classes.Energy, classes.Spearman):
        human = masks.float() if kind is classes.Spearman else masks
        assert_same(lambda kind=kind, human=human: kind()(maps, human))


MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}


def test_every_tensor_is_made_somewhere() -> None:
    """No call in the package that makes a tensor leaves it to a default where it is made."""
    package, found = Path(lnstat.__file__).parent, list[str]()
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if of_torch and not any(keyword.arg in ("device", None) for keyword in node.keywords):
                    found.append(f"{path.relative_to(package)}:{node.lineno} {ast.unparse(node)}")
    assert not found
