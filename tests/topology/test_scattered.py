"""Blocks that are not all of one list, post-norm blocks written by hand, and lists with holes in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from helpers.contract import lively
from helpers.models import rule
from helpers.plain_models import CLASSES, WIDTH
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = 3


def layer(norm_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 32, batch_first=True, norm_first=norm_first, activation="gelu", dropout=0.0
    )


def encoder(*layers: nn.Module) -> nn.Module:
    made = nn.TransformerEncoder(layers[0], len(layers), enable_nested_tensor=False)
    made.layers = nn.ModuleList(layers)
    return made


class Attributes(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.lower, self.upper = first, second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.upper(self.lower(x))
        return y


class Backwards(Attributes):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lower(self.upper(x))
        return y


class Dictionary(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.values():
            x = block(x)
        return x


class Mixed(Attributes):
    """Tokens change between the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.upper(self.lower(x) + x)
        return y


class ViT(nn.Module):
    def __init__(self, blocks: nn.Module, norm: bool = True) -> None:
        super().__init__()
        self.cut, self.blocks = nn.Conv2d(3, WIDTH, 8, 8), blocks
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.say = nn.Sequential(nn.LayerNorm(WIDTH) if norm else nn.Identity(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.cat([self.first.expand(len(x), -1, -1), self.cut(x).flatten(2).mT], 1)
        scores: Tensor = self.say(self.blocks(t)[:, 0])
        return scores


KINDS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "attributes": Attributes,
    "dictionary": lambda one, two: Dictionary({"one": one, "two": two}),
    "with a dropout": lambda one, two: nn.Sequential(nn.Dropout(), one, nn.Identity(), two),
    "with names": lambda one, two: nn.Sequential(OrderedDict(one=one, two=two, end=nn.Dropout())),
    "two encoders": lambda one, two: nn.Sequential(encoder(one), encoder(two)),
    "encoders in encoders": lambda one, two: nn.Sequential(nn.Sequential(encoder(one)), nn.Sequential(encoder(two))),
}


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_that_of_the_same_blocks_in_one_list(kind, norm_first):
    one = lively(ViT(nn.Sequential(layer(norm_first), layer(norm_first)))).double()
    other = deepcopy(one)
    other.blocks = KINDS[kind](*other.blocks).eval()
    x = images()
    torch.testing.assert_close(other(x), one(x))
    for name in ("evidence", "lnstat", "rollout", "gradient"):
        expected, found = (rule(model, name, x, torch.tensor([1, 3])) for model in (one, other))
        torch.testing.assert_close(found.grid, expected.grid)
        torch.testing.assert_close(found.prefix, expected.prefix)
    assert float(found.grid.abs().max()) > 0


def test_a_norm_in_the_list_is_the_last_norm():
    model = lively(ViT(nn.Sequential(layer(), layer()))).double()
    other = deepcopy(model)
    other.blocks, other.say = nn.Sequential(*other.blocks, other.say[0]), other.say[1]
    expected, found = (rule(one, "evidence", images(), torch.tensor([1, 3])) for one in (model, other))
    torch.testing.assert_close(found.grid, expected.grid)
    torch.testing.assert_close(found.total, model(images()).gather(1, torch.tensor([[1], [3]]))[:, 0].detach())


def test_a_norm_between_two_encoders():
    """It is a step, as in one list with the blocks."""
    lower, upper = encoder(layer()), encoder(layer())
    lower.norm, upper.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    model, x = lively(ViT(nn.Sequential(lower, upper), norm=False)).double(), images()
    found = LNStatAttribution(model, rule="evidence").describe(x)
    assert [step.name for step in found.steps] == ["blocks.0.layers.0", "blocks.0.norm", "blocks.1.layers.0"]
    before = rule(model, "evidence", x, torch.tensor([1, 3]))
    torch.testing.assert_close(before.total, model(x).gather(1, torch.tensor([[1], [3]]))[:, 0].detach())
    other = nn.Sequential(model.blocks[0].layers[0], model.blocks[0].norm, model.blocks[1].layers[0], upper.norm)
    flat = ViT(other, norm=False)
    flat.cut, flat.first, flat.say = model.cut, model.first, model.say
    torch.testing.assert_close(rule(flat.double().eval(), "evidence", x, torch.tensor([1, 3])).grid, before.grid)


def test_pre_norm_and_post_norm_blocks_in_one_model():
    model = lively(ViT(Attributes(encoder(layer()), encoder(layer(False))))).double()
    found = rule(model, "evidence", images(), torch.tensor([1, 3]))
    torch.testing.assert_close(found.total, model(images()).gather(1, torch.tensor([[1], [3]]))[:, 0].detach())


@pytest.mark.parametrize("kind", [Backwards, Mixed])
def test_another_order_or_something_between_is_refused(kind):
    model = lively(ViT(kind(layer(), layer()))).double()
    with pytest.raises(RecordingError, match="does not read what the step"):
        LNStatAttribution(model).relevance(images(), 1)


class Bert(nn.Module):
    """A post-norm block as BERT's: the norms are in the parts. ``layer`` has its weights."""

    def __init__(self, given: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.attention, self.output = nn.ModuleDict(), nn.ModuleDict()
        for place, name in enumerate(("query", "key", "value")):
            linear = self.attention[name] = nn.Linear(WIDTH, WIDTH)
            linear.weight = nn.Parameter(given.self_attn.in_proj_weight.chunk(3)[place].clone())
            linear.bias = nn.Parameter(given.self_attn.in_proj_bias.chunk(3)[place].clone())
        self.attention["dense"], self.attention["LayerNorm"] = given.self_attn.out_proj, given.norm1
        self.intermediate = given.linear1
        self.output["dense"], self.output["LayerNorm"] = given.linear2, given.norm2

    def forward(self, x: Tensor) -> Tensor:
        own, out = self.attention, self.output
        q, k, v = (own[name](x).unflatten(2, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = own["LayerNorm"](own["dense"](heads.transpose(1, 2).flatten(2)) + x)
        y: Tensor = out["LayerNorm"](out["dense"](nn.functional.gelu(self.intermediate(x))) + x)
        return y


@pytest.mark.parametrize("norm", [True, False])
def test_post_norm_by_hand_is_that_of_pytorch(norm):
    one = lively(ViT(nn.Sequential(layer(False), layer(False)), norm)).double()
    other = deepcopy(one)
    other.blocks = nn.Sequential(*map(Bert, other.blocks))
    other, x = other.double().eval(), images()
    torch.testing.assert_close(other(x), one(x))
    for name in ("evidence", "lnstat", "rollout"):
        expected, found = (rule(model, name, x, torch.tensor([1, 3])) for model in (one, other))
        torch.testing.assert_close(found.grid, expected.grid)
        torch.testing.assert_close(found.constant, expected.constant)


class UpdateBeside(Bert):
    """Its first norm reads the attention's update alone."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.attention["LayerNorm"]
        y: Tensor = super().forward(x) + 0.1 * norm(x.flip(1))
        return y


def test_post_norm_with_something_added_is_refused():
    model = lively(ViT(nn.Sequential(UpdateBeside(layer(False)), UpdateBeside(layer(False))))).double()
    with pytest.raises(RecordingError, match=r"or x' = norm\(x \+ attention\(x\)\)"):
        LNStatAttribution(model).relevance(images(), 1)


def test_a_model_that_is_a_sequence():
    """The stem, the blocks and the head in one list, as ``nn.Sequential(*model.children())`` makes it."""

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).mT

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    blocks, norm, score = [layer(), layer()], nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
    model = lively(nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), Tokens(), *blocks, norm, Mean(), score)).double()
    found = rule(model, "evidence", images(), torch.tensor([1, 3]))
    assert found.grid.shape == (2, 4, 4)
    torch.testing.assert_close(found.total, model(images()).gather(1, torch.tensor([[1], [3]]))[:, 0].detach())


class Holes(nn.Module):
    """Lists with ``None`` in them, where a part is left out."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList([None, *blocks])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = x if step is None else step(x)
        return x


def test_a_list_with_holes():
    one = lively(ViT(nn.Sequential(layer(), layer()))).double()
    other = deepcopy(one)
    other.blocks = Holes(*other.blocks)
    expected, found = (rule(model, "evidence", images(), torch.tensor([1, 3])) for model in (one, other))
    torch.testing.assert_close(found.grid, expected.grid)


def test_a_list_of_holes_alone_is_no_list_of_blocks():
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.ModuleList([None, None]))
    with pytest.raises(UnsupportedModelError, match="holds no attention"):
        LNStatAttribution(model).relevance(images(), 1)


class Pooled(ViT):
    """Tokens are pooled behind the convolutions, as by CCT."""

    def __init__(self, *stem: nn.Module) -> None:
        super().__init__(nn.Sequential(layer(), layer()))
        self.cut = nn.Sequential(*stem)


@pytest.mark.parametrize(
    ("stem", "patch"),
    [
        ((nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.MaxPool2d(2)), (8, 8)),
        ((nn.Conv2d(3, 8, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(8, WIDTH, 4, 4), nn.AvgPool2d(2)), (16, 16)),
        ((nn.Conv2d(3, WIDTH, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)), (8, 8)),
    ],
)
def test_pooling_behind_the_convolutions(stem, patch):
    model, x = lively(Pooled(*stem)).double(), images()
    found = LNStatAttribution(model).describe(x)
    assert (found.patch, found.grid) == (patch, (32 // patch[0], 32 // patch[1]))
    relevance = rule(model, "evidence", x, torch.tensor([1, 3]))
    torch.testing.assert_close(relevance.total, model(x).gather(1, torch.tensor([[1], [3]]))[:, 0].detach())
