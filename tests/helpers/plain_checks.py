"""What every small plain encoder has to hold, whatever it is built of: a harness for ``tests/topology``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_lnstat import LNStatAttribution, UnsupportedModelError
from captum_lnstat.testing.family import check_family
from captum_lnstat.testing.placement import PEAKS
from helpers.contract import untouched
from helpers.models import rule
from helpers.plain_models import Plain

ALL_RULES = ("rollout", "evidence", "lnstat", "gradient")


def as_the_oracle(case: Plain, oracle: type[Any], *, size: float = 1e-9, behind: bool = False) -> Any:
    """Relevance of every token is that of dense float64 matrices, and sums to 1 or to the score; gives the oracle.

    Args:
        case: The model.
        oracle: Class of the dense reference.
        size: How far they may be apart, in their own size.
        behind: The other tokens stand behind the patches.
    """
    model, x, target = case.build(), case.images(), torch.tensor([1, 3])
    dense = oracle(case, model, x)
    for kind, expected in (("rollout", dense.perception()), ("evidence", dense.evidence(target))):
        found = rule(model, kind, x, target)
        grid, largest = found.grid.flatten(1), max(1.0, float(expected.abs().max()))
        tokens = torch.cat([grid, found.prefix] if behind else [found.prefix, grid], 1)
        torch.testing.assert_close(tokens, expected, atol=size * largest, rtol=1e-6)
        whole = torch.ones(2).double() if kind == "rollout" else model(x).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(found.total, whole.detach(), atol=size * largest, rtol=1e-9)
    return dense


def every_rule_in_float32(case: Plain, *, refused: tuple[str, ...] = ()) -> None:
    """Recognised as what it is; no map is flat, a batch is its images one by one, evidence adds up, nothing is changed.

    Args:
        case: The model.
        refused: Rules that are not defined for it.
    """
    model, x = case.build(torch.float32), case.images(3, torch.float32)
    found = LNStatAttribution(model).describe(x)
    assert (found.grid, found.patch, found.prefix_tokens) == (case.grid, case.patch, case.prefix)
    assert (found.pooling, sum(step.kind == "attention" for step in found.steps)) == (case.pooling, 2)
    scores: Tensor = model(x)
    for kind in ALL_RULES:
        method = LNStatAttribution(model, rule=kind)
        with untouched(model, x):
            if kind in refused:
                with pytest.raises(UnsupportedModelError, match="no output that a gradient"):
                    method.relevance(x, 1)
                continue
            grid = method.relevance(x, 1)
        assert float(grid.flatten(1).std(1).max()) > 0
        single = torch.cat([method.relevance(x[i : i + 1], 1) for i in range(3)])
        torch.testing.assert_close(single, grid, atol=1e-4 * float(grid.abs().max()), rtol=0)
    _, delta = LNStatAttribution(model, rule="evidence").attribute(x, 1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4
    assert torch.equal(model(x), scores)


def placed_where_the_stimulus_is(case: Plain) -> None:
    """Trained for some seconds to tell whether a stimulus is there, the maps peak on it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.make()
    report = check_family(model, case.image, rules=PEAKS)  # the other rules are above
    assert all(report.placement[kind].hits >= 9 for kind in ("lnstat", "evidence"))
    assert report.layout == 2
