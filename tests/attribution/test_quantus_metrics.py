"""Quantus' own metrics on a reference model, where Quantus is installed; it is no dependency of this package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from captum_lnstat import LNStatAttribution, quantus_explain_func, zoo

quantus: Any = pytest.importorskip("quantus", reason="Quantus is not installed: pip install quantus")

pytestmark = pytest.mark.filterwarnings("ignore")  # Quantus warns of its own metrics' parameters
QUIET = {"disable_warnings": True, "display_progressbar": False}


@pytest.fixture(scope="module", params=zoo.names())
def arrays(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A model with three scenes, as Quantus takes them."""
    reference = zoo.load(request.param)
    scenes = [scene for scene in zoo.scenes() if len(scene.labels) == 1][:3]
    return {
        "model": reference.model,
        "x_batch": torch.stack([reference.transform(scene.image) for scene in scenes]).numpy(),
        "y_batch": np.array([scene.labels[0] for scene in scenes]),
        "s_batch": np.stack([scene.masks[0].numpy() for scene in scenes])[:, None].astype(int),
        "device": "cpu",
    }


@pytest.mark.parametrize("sum_channels", [False, True])
@pytest.mark.parametrize(
    "metric",
    [
        lambda: quantus.FaithfulnessCorrelation(nr_runs=4, **QUIET),
        lambda: quantus.MaxSensitivity(nr_samples=2, **QUIET),
    ],
)
def test_faithfulness_and_robustness(arrays: dict[str, Any], metric: Any, sum_channels: bool) -> None:
    explain = quantus_explain_func(LNStatAttribution, sum_channels=sum_channels)
    given = explain(arrays["model"], arrays["x_batch"], arrays["y_batch"])
    for attributions in (None, given):
        values = np.asarray(metric()(**arrays, a_batch=attributions, explain_func=explain), float)
        assert np.isfinite(values).all()


def test_localisation_is_that_of_the_map(arrays: dict[str, Any]) -> None:
    """The share of the mask's size of highest pixels that lies on the mask, counted here too."""
    explain = quantus_explain_func(LNStatAttribution, sum_channels=True)
    found = quantus.RelevanceRankAccuracy(**QUIET)(**arrays, a_batch=None, explain_func=explain)
    maps = explain(arrays["model"], arrays["x_batch"], arrays["y_batch"]).reshape(3, -1)
    for value, pixels, mask in zip(found, maps, arrays["s_batch"].reshape(3, -1).astype(bool), strict=True):
        highest = np.argsort(-pixels, kind="stable")[: mask.sum()]
        assert value == pytest.approx(mask[highest].mean(), abs=0.01)
