"""Norms inside attention and MLP, patches cut by a rearrangement: equal to the dense oracle, placed, or refused."""

from __future__ import annotations

import pytest
import torch
from helpers.branched_models import BRANCHED, Branched, BranchOracle
from helpers.contract import lively, untouched
from helpers.plain_checks import as_the_oracle, every_rule_in_float32, placed_where_the_stimulus_is
from torch import nn

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {case.name: case for case in BRANCHED}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_that_of_the_oracle(name):
    as_the_oracle(CASES[name], BranchOracle, behind=name == "branched-registers-behind")


@pytest.mark.parametrize("name", CASES)
def test_every_rule_in_float32(name):
    every_rule_in_float32(CASES[name])


@pytest.mark.parametrize("name", ["branched-list", "branched-registers-behind", "branched-wrapped-einsum"])
def test_the_map_lies_where_the_stimulus_is(name):
    placed_where_the_stimulus_is(CASES[name])


def test_patches_that_are_not_square():
    class Wide(Branched):
        def forward(self, x):
            t = x.unflatten(3, (-1, 16)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            return self.head(self.transformer(self.embed(t) + self.place).mean(1))

    model, x = lively(Wide(cut="inside", pool="mean")), torch.randn(2, 3, 32, 48)
    found = LNStatAttribution(model).describe(x)
    assert (found.grid, found.patch) == ((8, 3), (4, 16))


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_patches_in_another_order_are_refused(size):
    model = lively(Branched(cut="columns"))
    for kind in ("lnstat", "rollout", "gradient"):
        with pytest.raises(UnsupportedModelError, match="row by row, each with the pixels of its cell"):
            LNStatAttribution(model, rule=kind).relevance(torch.randn(1, 3, *size), 1)


def test_patches_of_a_reshaped_image_are_refused():
    """The mistake of many tutorials: rows of pixels, not patches."""

    class Reshaped(Branched):
        def forward(self, x):
            return self.head(self.transformer(self.embed(x.reshape(len(x), 24, -1)) + self.place).mean(1))

    with pytest.raises(UnsupportedModelError, match="not the image cut into patches"):
        LNStatAttribution(lively(Reshaped(cut="inside", pool="mean"))).relevance(torch.randn(1, 3, 32, 48), 1)


def test_tokens_that_show_the_image_beside_the_patches_are_refused():
    """As of a transform of the image: what they show is nowhere on the grid."""

    class Twice(Branched):
        def __init__(self) -> None:
            super().__init__(cut="linear", pool="mean")
            self.other = nn.Linear(48, 24)

        def forward(self, x):
            t = torch.cat([self.other(x.mean(1)), self.embed(x) + self.place], 1)
            return self.head(self.transformer(t)[:, 32:].mean(1))

    model, x = lively(Twice()), torch.randn(2, 3, 32, 48)
    for kind in ("lnstat", "rollout"):
        with pytest.raises(UnsupportedModelError, match="made 32 tokens beside the patches"):
            LNStatAttribution(model, rule=kind).relevance(x, 1)


class Otherwise(Branched):
    """Something more between the blocks."""

    def __init__(self, what: str) -> None:
        super().__init__(pool="mean")
        self.transformer.forward = self._forward
        self.what = what

    def _forward(self, x):
        for attention, mlp in self.transformer.layers:
            if self.what == "beside":
                x = attention(x) + mlp(x) + x
                continue
            x = attention(x) + x
            if self.what == "halved":
                x = mlp(x) + x / 2
            elif self.what == "shuffled":
                x = (mlp(x) + x).roll(1, 1)
            elif self.what == "dropped":
                x = (mlp(x) + x)[:, ::2]
            elif self.what == "pooled":
                x = mlp(x) + x + x.mean(1, keepdim=True)
        return self.transformer.norm(x)


@pytest.mark.parametrize("what", ["beside", "halved", "shuffled", "dropped", "pooled"])
@pytest.mark.parametrize("kind", ["lnstat", "rollout", "evidence", "gradient"])
def test_another_wiring_is_refused(what, kind):
    model, x = lively(Otherwise(what)), torch.randn(2, 3, 32, 48)
    with untouched(model, x), pytest.raises((RecordingError, UnsupportedModelError)):
        LNStatAttribution(model, rule=kind).relevance(x, 1)


def test_at_a_layer_that_is_called():
    case = CASES["branched-called"]
    model, x = case.build(), case.images()
    layer = model.transformer.layers[0]
    found = LayerLNStat(model, layer, rule="evidence").attribute(x, 1, attribute_to_layer_input=True)
    whole = LNStatAttribution(model, rule="evidence").relevance(x, 1)
    torch.testing.assert_close(found.sum(-1)[:, 1:].unflatten(1, case.grid), whole)


def test_a_head_that_mixes_its_maps_is_refused():
    """Re-attention: maps mixed over the heads after the softmax are no average of values."""
    model = lively(Branched(how="matmul"))
    mix = nn.Parameter(torch.randn(3, 3))
    for attention in (m for m in model.modules() if hasattr(m, "to_qkv")):
        attention.seen = nn.Identity()
        attention.seen.forward = lambda maps: torch.einsum("bhij,hg->bgij", maps, mix)
    with pytest.raises(RecordingError, match="but not the product of its output with the values"):
        LNStatAttribution(model).relevance(torch.randn(1, 3, 32, 48), 1)
