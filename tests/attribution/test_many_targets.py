"""Maps of many targets from one pass are those of one target at a time."""

from __future__ import annotations

import pytest
import torch
from helpers.contract import CLASSES, MODELS, CountCalls, images, untouched

from captum_lnstat import LNStatAttribution


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
@pytest.mark.parametrize("family", MODELS)
def test_many_targets_are_each_alone(family: str, rule: str, contrastive: bool) -> None:
    model = MODELS[family]().double()
    image = images(2).double()
    method = LNStatAttribution(model, rule=rule, contrastive=contrastive)
    targets = [*range(CLASSES), [1, 3], torch.tensor([0, 4])]
    with untouched(model, image):
        together = method.relevance_per_target(image, targets)
    assert together.shape == (len(targets), 2, *method.relevance(image, 0).shape[1:])
    for target, grid in zip(targets, together, strict=True):
        torch.testing.assert_close(grid, method.relevance(image, target), rtol=1e-9, atol=1e-10)


def test_many_targets_need_one_forward_pass() -> None:
    counted = CountCalls(MODELS["swin"]())
    LNStatAttribution(counted).relevance_per_target(images(1), range(CLASSES))
    assert counted.count == 1


@pytest.mark.parametrize("rule", ["rollout", "gradient"])
def test_rules_without_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="'lnstat' or 'evidence'"):
        LNStatAttribution(MODELS["vit"](), rule=rule).relevance_per_target(images(1), [0, 1])


def test_no_targets() -> None:
    with pytest.raises(ValueError, match="at least one"):
        LNStatAttribution(MODELS["vit"]()).relevance_per_target(images(1), [])


def test_a_bad_target_among_good_ones() -> None:
    model = MODELS["vit"]()
    with untouched(model), pytest.raises(IndexError):
        LNStatAttribution(model).relevance_per_target(images(1), [0, CLASSES])
