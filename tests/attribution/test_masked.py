"""RISE and ViTCX against loops over pixels and masks, written from the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.contract import images, swin, untouched, vit
from helpers.models import CASES, build
from helpers.models import images as case_images
from helpers.oracles import Capture
from torch import Tensor, nn

from captum_lnstat.attribution.rise import RISE
from captum_lnstat.attribution.vitcx import ViTCX, clusters


def enlarged(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel by pixel: the centre of each pixel between the centres of the cells."""
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * grid.shape[0] / height - 0.5, 0), grid.shape[0] - 1)
            u = min(max((x + 0.5) * grid.shape[1] / width - 0.5, 0), grid.shape[1] - 1)
            top, left = math.floor(v), math.floor(u)
            below, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
            a, b = v - top, u - left
            above_ = (1 - b) * grid[top, left] + b * grid[top, right]
            found[y, x] = (1 - a) * above_ + a * ((1 - b) * grid[below, left] + b * grid[below, right])
    return found


def score(model: Any, image: Tensor, target: int) -> float:
    """The probability of one image, alone."""
    with torch.no_grad():
        logits = model(image[None])[0]
    return float((logits - logits.max()).exp()[target] / (logits - logits.max()).exp().sum())


@pytest.mark.parametrize("size", [32, (24, 40)])
def test_rise_is_the_sum_over_its_masks(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = vit(img_size=size).double()
    x = images(1, size).double()
    rng = torch.Generator().manual_seed(5)
    grids = (torch.rand(6, 4, 4, generator=rng) < 0.4).double().numpy()
    cell = math.ceil(height / 4), math.ceil(width / 4)
    shifts = [torch.randint(side + 1, (6,), generator=rng).tolist() for side in cell]
    expected = np.zeros((height, width))
    for grid, top, left in zip(grids, *shifts, strict=True):
        mask = enlarged(grid, 5 * cell[0], 5 * cell[1])[top : top + height, left : left + width]
        expected += score(model, x[0] * torch.from_numpy(mask), 3) * mask / (0.4 * 6)
    method = RISE(model, masks=6, cells=4, share=0.4, seed=5)
    with untouched(model, x):
        found = method.attribute(x, target=3)
    assert found.shape == x.shape
    np.testing.assert_allclose(found.sum(1)[0].numpy(), expected, rtol=1e-9)
    other = RISE(model, masks=6, cells=4, share=0.4, seed=6).attribute(x, target=3)
    assert not torch.allclose(other, found, rtol=0.01)


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("kind", [RISE, ViTCX])
def test_a_batch_is_its_images_with_the_same_masks(make, kind):
    model, x, target = make(), images(3), torch.tensor([0, 3, 1])
    method = kind(model, **({"masks": 9} if kind is RISE else {}))
    whole = method.attribute(x, target, perturbations_per_eval=4)
    for i in range(3):
        one = method.attribute(x[i : i + 1], int(target[i]), perturbations_per_eval=4)
        assert torch.equal(whole[i : i + 1], one)
    # How many at a time is no part of the answer.
    assert torch.allclose(method.attribute(x, target, perturbations_per_eval=100), whole, rtol=1e-4)
    assert torch.equal(method.attribute((x,), target, perturbations_per_eval=4)[0], whole)


class Brightness(nn.Module):
    """Two scores; no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        self.largest = max(self.largest, len(x))
        bright = (x[:, :, 8:16, 8:16].mean((1, 2, 3)) - 0.5) * (gain[:, 0] if isinstance(gain, Tensor) else gain)
        return torch.stack([torch.zeros_like(bright), bright], 1)


def test_rise_finds_what_a_black_box_reads_and_keeps_its_bound():
    model = Brightness()
    x = torch.ones(2, 3, 32, 32)
    found = RISE(model, masks=400).attribute(x, 1, torch.tensor([[12.0], [12.0]]), perturbations_per_eval=16)
    assert model.largest == 16
    read = found[0].sum(0)
    assert read[8:16, 8:16].mean() > 1.2 * read.mean()
    assert read.argmax() // 32 in range(6, 18)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": 0}, "masks is 0; expected at least 1"),
        ({"masks": 2.5}, "masks is 2.5; expected an int"),
        ({"share": 1.0}, "share is 1.0; expected a number between 0 and 1"),
        ({"seed": -1}, "seed is -1"),
        ({"probabilities": "no"}, "probabilities is 'no'"),
    ],
)
def test_an_option_of_rise_out_of_range(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RISE(Brightness(), **options)


@pytest.mark.parametrize(
    ("options", "name"), [({"distance": 3}, "distance"), ({"noise": -1}, "noise"), ({"seed": 1.5}, "seed")]
)
def test_an_option_of_vitcx_out_of_range(options, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        ViTCX(vit(), **options)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", [RISE, ViTCX])
def test_an_image_with_a_nan_is_refused(method, batch):
    image = images(batch)
    image[-1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="inputs holds NaN"):
        method(vit()).attribute(image, target=1)


def test_masked_methods_refuse_what_is_no_image():
    with pytest.raises(ValueError, match="expected images"):
        RISE(Brightness(), masks=2).attribute(torch.ones(1, 3, 2, 32, 32), 1)
    with pytest.raises(ValueError, match="perturbations_per_eval is 0"):
        RISE(Brightness(), masks=2).attribute(torch.ones(1, 3, 32, 32), 1, perturbations_per_eval=0)
    with pytest.raises(ValueError, match="at least 7 a side"):
        RISE(Brightness(), masks=2).attribute(torch.ones(1, 3, 6, 32), 1)
    with pytest.raises(TypeError, match="pass the transformer that it runs as model="):
        ViTCX(lambda x: x)


def merged(maps: np.ndarray, distance: float) -> list[list[int]]:
    """Complete linkage by hand: the two nearest clusters are merged while their farthest members are near enough."""
    apart = 1 - (maps @ maps.T) / np.outer(*[np.linalg.norm(maps, axis=1)] * 2)
    groups = [[i] for i in range(len(maps))]
    while len(groups) > 1:
        pairs = [
            (max(apart[i, j] for i in a for j in b), m, n)
            for m, a in enumerate(groups)
            for n, b in enumerate(groups)
            if m < n
        ]
        nearest, m, n = min(pairs)
        if nearest > distance:
            break
        groups[m] += groups.pop(n)
    return groups


def scaled(maps: np.ndarray) -> np.ndarray:
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.3, 2.0])
def test_clusters_are_those_of_complete_linkage(distance):
    maps = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[3] = 2.0  # flat: no mask
    values = scaled(np.delete(maps.numpy(), 3, 0))
    expected = scaled(np.stack([values[group].mean(0) for group in merged(values, distance)]))
    found = clusters(maps, distance).numpy()
    assert len(found) == len(expected)
    for row in expected:
        assert np.abs(found - row).max(1).min() < 1e-12


@pytest.mark.parametrize("name", ["vit-class", "vit-registers", "vit-avg", "swin1-shift", "swin2-shift"])
def test_vitcx_is_the_weighted_mean_over_its_masks(name):
    model, x = build(name), case_images(CASES[name], 1)
    with torch.no_grad():
        capture = Capture(model, x)
    last = model.layers[-1].blocks[-1] if hasattr(model, "layers") else model.blocks[-1]
    post = name.startswith("swin2")
    tokens = capture.inputs[last] if post else capture.outputs[last.norm1]
    if tokens.dim() == 3:
        tokens = tokens[:, CASES[name].prefix :].unflatten(1, CASES[name].grid)
    maps = tokens[0].movedim(-1, 0).numpy()
    values = scaled(maps.reshape(len(maps), -1))
    groups = merged(values, 0.2)
    assert 1 < len(groups) < len(maps)
    low = scaled(np.stack([values[group].mean(0) for group in groups])).reshape(-1, *maps.shape[1:])
    height, width = x.shape[2:]
    noise = 0.3 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    above, below = np.zeros((height, width)), np.zeros((height, width))
    for one in low:
        mask = enlarged(one, height, width)
        shown = x[0] * torch.from_numpy(mask) + noise * torch.from_numpy(1 - mask)
        above += score(model, shown, 2) * mask
        below += mask
    method = ViTCX(model, distance=0.2, noise=0.3, seed=2)
    with untouched(model, x):
        found = method.attribute(x, target=2)
    np.testing.assert_allclose(found.sum(1)[0].numpy(), above / below, rtol=1e-8)
