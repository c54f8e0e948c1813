import copy

import pytest
import torch
from torch import nn

from captum_lnstat import LNStatAttribution, zoo
from captum_lnstat.metrics import cascade, map_correlation, randomised


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6))
        self.blocks = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
        self.norm = nn.LayerNorm(6)
        self.act = nn.GELU()
        self.head = nn.Linear(6, 12)  # a bias of three could be shuffled into itself


def same(one, other):
    """Names of the parameters that are equal."""
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return {name for (name, a), (_, b) in pairs if torch.equal(a, b)}


def test_the_cascade_goes_from_the_head_to_the_embedding():
    assert cascade(Small()) == ("head", "norm", "blocks.3", "blocks.2", "blocks.1", "blocks.0", "")
    for name in zoo.names():
        model = zoo.load(name).model
        order = cascade(model)
        assert order[0].startswith("head")
        places = {part: index for index, part in enumerate(order)}
        assert places["patch_embed.proj"] > len(order) - 4
        # Every layer with a parameter once.
        assert {parameter.rpartition(".")[0] for parameter, _ in model.named_parameters()} == set(order)


@pytest.mark.parametrize("manner", ["reset", "shuffle"])
def test_the_upper_part_is_replaced_and_the_model_stays(manner):
    model = Small().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # a LayerNorm before training would be shuffled into itself
    before, state = copy.deepcopy(model), torch.get_rng_state()
    other = randomised(model, 0.5, manner=manner)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(model, before) == {name for name, _ in model.named_parameters()}
    assert not other.training
    # Half of seven layers, rounded up: head, norm and the two upper blocks.
    kept = {"token", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"}
    assert same(model, other) == kept
    if manner == "shuffle":
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)


@pytest.mark.parametrize("manner", ["reset", "shuffle"])
def test_shares_are_nested_and_seeds_count(manner):
    model = Small()
    quarter, all_of_it = randomised(model, 0.25, manner=manner), randomised(model, 1.0, manner=manner)
    assert {"head.weight", "head.bias"} <= same(quarter, all_of_it)
    assert "token" not in same(model, all_of_it)
    assert same(quarter, randomised(model, 0.25, manner=manner)) == {name for name, _ in model.named_parameters()}
    assert "head.weight" not in same(quarter, randomised(model, 0.25, manner=manner, seed=1))


def test_names_take_what_is_below_them():
    model = Small()
    assert same(model, randomised(model, ["blocks"], manner="shuffle")) == {
        "token",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    assert "blocks.2.weight" not in same(model, randomised(model, "blocks.2"))
    assert "token" not in same(model, randomised(model, [""]))


def test_what_cannot_be_right_is_refused():
    model = Small()
    for layers, match in ((["blocks.9"], "'blocks.9', which is no module"), (["act"], "no parameters")):
        with pytest.raises(ValueError, match=match):
            randomised(model, layers)
    for share in (0, 1.5, True):
        with pytest.raises(ValueError, match="expected a share"):
            randomised(model, share)
    with pytest.raises(ValueError, match="manner is 'zero'"):
        randomised(model, 0.5, manner="zero")
    model.head = nn.Linear(6, 6)
    model.head.weight = model.blocks[0].weight
    with pytest.raises(ValueError, match="shared by a layer"):
        randomised(model, ["head"])
    tied = randomised(model, 1.0)
    assert tied.head.weight is tied.blocks[0].weight


def test_maps_of_a_model_that_forgot_are_others():
    vit = zoo.load("vit-mini")
    scenes = zoo.scenes()[:4]
    images, target = torch.stack([vit.transform(scene.image) for scene in scenes]), [s.labels[0] for s in scenes]
    maps = LNStatAttribution(vit.model).attribute(images, target=target).sum(1)
    other = LNStatAttribution(randomised(vit.model, 1.0)).attribute(images, target=target).sum(1)
    again = LNStatAttribution(randomised(vit.model, 1.0)).attribute(images, target=target).sum(1)
    assert map_correlation(maps, maps).tolist() == pytest.approx([1.0] * 4)
    assert map_correlation(maps, other).mean() < 0.5
    assert torch.equal(other, again)
