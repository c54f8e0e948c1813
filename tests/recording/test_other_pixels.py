"""Images that forward_func turns by what cannot be followed: said, for the map lies on what the transformer saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.contract import images, swin, vit
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution

Turn = Callable[[np.ndarray], np.ndarray]
MOVED: list[Turn] = [lambda x: x[..., ::-1], lambda x: np.roll(x, 8, 2), lambda x: x.transpose(0, 1, 3, 2)]
IN_PLACE: list[Turn] = [lambda x: (x - 0.5) / 0.25, lambda x: -x, lambda x: np.clip(x, 0, 1), lambda x: x * 0]


def _by_numpy(model: nn.Module, turn: Turn) -> Callable[[Tensor], Tensor]:
    return lambda x: model(torch.from_numpy(np.ascontiguousarray(turn(x.detach().numpy()))))


@pytest.mark.parametrize("build", [vit, swin])
@pytest.mark.parametrize(
    "turn", [lambda x: x[..., ::-1], lambda x: np.roll(x, 8, 2), lambda x: x.transpose(0, 1, 3, 2)]
)
def test_moved_pixels_are_said(build: Callable[[], nn.Module], turn: Turn) -> None:
    model = build()
    with pytest.warns(UserWarning, match="other pixels than the images it was given"):
        LNStatAttribution(_by_numpy(model, turn), model).relevance(images(2), target=1)


@pytest.mark.parametrize(
    "turn", [lambda x: (x - 0.5) / 0.25, lambda x: -x, lambda x: np.clip(x, 0, 1), lambda x: x * 0]
)
def test_pixels_in_place_are_not(turn: Turn) -> None:
    model = vit()
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other pixels")
        LNStatAttribution(_by_numpy(model, turn), model).relevance(images(2), target=1)
