"""The way that devices with a queue go, where hardly a number is read: the same maps for every family."""

from __future__ import annotations

import pytest
from helpers.branched_models import BRANCHED
from helpers.contract import images, lively
from helpers.hierarchical_models import MODELS, settled
from helpers.own_models import ENCODERS
from helpers.plain_models import CASES
from helpers.rms_models import RMS
from torch import nn

from captum_lnstat import LNStatAttribution, UnsupportedModelError
from captum_lnstat.recording import devices

PLAIN = {case.name: case for case in [*CASES.values(), *BRANCHED, *RMS, *ENCODERS]}


def _same(model: nn.Module, size: tuple[int, int], rules: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model.double(), images(2, size).double()
    for rule in rules:
        method = LNStatAttribution(model, rule=rule)
        monkeypatch.setattr(devices, "AT_ONCE", {"cpu"})
        try:
            wanted = method.relevance(x, target=1)
        except UnsupportedModelError:  # the one says it for the other
            continue
        monkeypatch.setattr(devices, "AT_ONCE", set())
        found = method.relevance(x, target=1)
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max(), rule


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _same(lively(PLAIN[name].make()), PLAIN[name].image, ("evidence", "gradient"), monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_hierarchical(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, size, *_ = MODELS[name]
    _same(settled(lively(build(size)), images(4, size)), size, ("evidence", "rollout", "gradient"), monkeypatch)
