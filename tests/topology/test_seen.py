"""Blocks of tutorials, under any names: read by what ran in them, equal to the dense oracle, or refused."""

from __future__ import annotations

import pytest
import torch
from helpers.contract import lively, untouched
from helpers.models import rule
from helpers.tutorial_models import TUTORIALS, Flat, HeadByHead, Tutorial, TutorialOracle
from torch import nn

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.testing.family import check_family
from captum_lnstat.topology import find_topology

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {case.name: case for case in TUTORIALS}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_that_of_the_oracle(name):
    case = CASES[name]
    model, x, target = case.build(), case.images(), torch.tensor([1, 3])
    oracle = TutorialOracle(case, model, x)
    for kind, expected in (("rollout", oracle.perception()), ("evidence", oracle.evidence(target))):
        found = rule(model, kind, x, target)
        tokens = torch.cat([found.prefix, found.grid.flatten(1)], 1)
        torch.testing.assert_close(tokens, expected, atol=1e-9 * max(1.0, float(expected.abs().max())), rtol=1e-6)
        whole = torch.ones(2).double() if kind == "rollout" else model(x).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(found.total, whole.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_rule_in_float32(name):
    case = CASES[name]
    model, x = case.build(torch.float32), case.images(3, torch.float32)
    found = LNStatAttribution(model).describe(x)
    assert (found.grid, found.patch, found.prefix_tokens) == (case.grid, case.patch, case.prefix)
    assert (found.pooling, len(found.steps)) == (case.pooling, 2)
    for kind in ("rollout", "evidence", "lnstat", "gradient"):
        method = LNStatAttribution(model, rule=kind)
        if kind == "gradient" and name == "tutorial-head-by-head":
            with untouched(model, x), pytest.raises(UnsupportedModelError, match="no output that a gradient"):
                method.relevance(x, 1)
            continue
        with untouched(model, x):
            grid = method.relevance(x, 1)
        single = torch.cat([method.relevance(x[i : i + 1], 1) for i in range(3)])
        torch.testing.assert_close(single, grid, atol=1e-4 * float(grid.abs().max()), rtol=0)
    _, delta = LNStatAttribution(model, rule="evidence").attribute(x, 1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4


def test_under_other_names():
    case = CASES["tutorial-flat"]
    model, x = case.build(), case.images()
    expected = LNStatAttribution(model).relevance(x, 1)
    for part in list(model.modules()):
        if list(part.children()) and not isinstance(part, nn.Sequential):
            part.__class__ = type("Renamed", (type(part),), {})
    assert torch.equal(LNStatAttribution(nn.Sequential(nn.Identity(), model)).relevance(x, 1), expected)


def test_at_a_layer():
    case = CASES["tutorial-flat"]
    model, x = case.build(), case.images()
    found = LayerLNStat(model, model.layers[0], rule="evidence").attribute(x, 1, attribute_to_layer_input=True)
    whole = LNStatAttribution(model, rule="evidence").relevance(x, 1)
    torch.testing.assert_close(found.sum(-1)[:, 1:].unflatten(1, case.grid), whole)


class Parallel(Flat):
    """Attention and MLP side by side."""

    def forward(self, x):
        q, k, v = (t.unflatten(2, (3, -1)).transpose(1, 2) for t in self.qkv(self.ln_a(x)).chunk(3, 2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.merge(attended) + self.down(self.up(self.ln_b(x)).relu())


class Squared(HeadByHead):
    """Something is done to the update on its way to the stream."""

    def forward(self, x):
        y = self.first(x)
        x = x + self.proj(torch.cat([head(y) for head in self.heads], -1)) ** 2
        return x + self.feed(self.second(x))


@pytest.mark.parametrize("block", [Parallel, Squared])
@pytest.mark.parametrize("kind", ["lnstat", "rollout", "evidence"])
def test_another_wiring_is_refused(block, kind):
    model, x = lively(Tutorial(block)), torch.randn(2, 3, 32, 48)
    with untouched(model, x), pytest.raises(RecordingError, match="with what its attention makes of the values"):
        LNStatAttribution(model, rule=kind).relevance(x, 1)


class Mixing(nn.Module):
    """Two norms, Linears, and no attention: of tokens and of channels, as in an MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.tokens, self.channels = nn.Linear(25, 25), nn.Linear(24, 24)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


def test_what_does_not_attend_is_no_block():
    with pytest.raises(UnsupportedModelError, match="holds no attention"):
        find_topology(Tutorial(Mixing))


@pytest.mark.parametrize("name", ["tutorial-beside", "tutorial-flat"])
def test_the_map_lies_where_the_stimulus_is(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name].make()
    report = check_family(model, CASES[name].image)
    assert all(report.placement[kind].hits >= 9 for kind in ("lnstat", "evidence"))
