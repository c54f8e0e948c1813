"""Plain encoders of timm, torchvision and Hugging Face: recognised, placed, and equal to the dense oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers.models import rule
from helpers.plain_models import CASES, CLASSES, Plain
from helpers.plain_oracle import Oracle
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution

RULES = ("rollout", "evidence", "lnstat", "gradient")
pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return CASES[name].build(dtype)


@cache
def oracle(name: str) -> Oracle:
    case = CASES[name]
    return Oracle(case, model_of(name), case.images())


def targets(batch: int) -> Tensor:
    return (torch.arange(batch) * 2 + 1) % CLASSES


def close(case: Plain, found: Tensor, expected: Tensor) -> None:
    # Explicit attention of Hugging Face, and the oracle with it, takes its softmax in float32 in a float64 model too.
    exact = not case.name.startswith("hf-")
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, atol=(1e-9 if exact else 2e-6) * max(1.0, size), rtol=1e-6)


def split(case: Plain, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens[:, case.prefix :].unflatten(1, case.grid), tokens[:, : case.prefix]


@pytest.mark.parametrize("name", CASES)
def test_recognised(name):
    case = CASES[name]
    found = LNStatAttribution(model_of(name)).describe(case.images())
    assert (found.grid, found.patch, found.prefix_tokens) == (case.grid, case.patch, case.prefix)
    assert found.pooling == case.pooling
    assert (found.family, len(found.steps)) == ("plain", 2)


@pytest.mark.parametrize("name", CASES)
def test_perception_is_the_dense_product(name):
    case, found = CASES[name], rule(model_of(name), "rollout", CASES[name].images())
    grid, prefix = split(case, oracle(name).perception())
    close(case, found.grid, grid)
    close(case, found.prefix, prefix)
    torch.testing.assert_close(found.total, torch.ones(2).double())


@pytest.mark.parametrize("name", CASES)
def test_evidence_is_that_of_the_oracle_and_complete(name):
    case, target = CASES[name], targets(2)
    found = rule(model_of(name), "evidence", case.images(), target)
    grid, prefix = split(case, oracle(name).evidence(target))
    close(case, found.grid, grid)
    close(case, found.prefix, prefix)
    with torch.no_grad():
        logits = model_of(name)(case.images())
    score = getattr(logits, "logits", logits).gather(1, target[:, None])[:, 0]
    # The rows of a softmax in float32 sum to one no better than that.
    tolerance = 1e-6 if name.endswith("-eager") else 1e-9
    torch.testing.assert_close(found.total, score, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", CASES)
def test_every_rule_in_float32(name, kind):
    case, target = CASES[name], targets(2)
    model, x = model_of(name, torch.float32), case.images(2, torch.float32)
    method = LNStatAttribution(model, rule=kind)
    attribution = method.attribute(x, target)
    grid = method.relevance(x, target)
    assert attribution.shape == x.shape
    assert grid.shape == (2, *case.grid)
    assert bool(torch.isfinite(attribution).all())
    assert float(grid.flatten(1).std(1).min()) > 0
    torch.testing.assert_close(attribution.sum((1, 2, 3)), grid.sum((1, 2)), atol=1e-4, rtol=1e-4)
    single = torch.cat([method.relevance(x[i : i + 1], target[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(single, grid, atol=1e-3 * float(grid.abs().max()), rtol=0)
    if kind == "rollout":
        assert float((rule(model, kind, x).total - 1).abs().max()) < 1e-5
    if kind == "evidence":
        _, delta = method.attribute(x, target, return_convergence_delta=True)
        assert float(delta.abs().max()) < 1e-4
