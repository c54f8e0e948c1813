"""Blocks of tutorials, under any names: read by what ran in them, equal to the dense oracle, or refused."""

from __future__ import annotations

import pytest
import torch
from helpers.contract import lively, untouched
from helpers.plain_checks import as_the_oracle, every_rule_in_float32, placed_where_the_stimulus_is
from helpers.tutorial_models import TUTORIALS, Flat, HeadByHead, Tutorial, TutorialOracle
from torch import nn

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.topology import find_topology

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {case.name: case for case in TUTORIALS}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_that_of_the_oracle(name):
    as_the_oracle(CASES[name], TutorialOracle)


@pytest.mark.parametrize("name", CASES)
def test_every_rule_in_float32(name):
    every_rule_in_float32(CASES[name], refused=("gradient",) if name == "tutorial-head-by-head" else ())


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
    placed_where_the_stimulus_is(CASES[name])
