"""Models that return several outputs: one is picked by key, position or function, or the error says how."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from helpers.contract import METHODS, images, swin, untouched, vit
from torch import Tensor, nn

from captum_lnstat import LayerLNStat, LNStatAttribution
from captum_lnstat.attribution.layer import explain_layer
from captum_lnstat.recording.forward import pick_output

Pair = namedtuple("Pair", ["kind", "age"])


class Output(OrderedDict):
    """As Hugging Face's: keys, attributes and positions."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class Holder:
    def __init__(self, kind: Tensor, age: Tensor) -> None:
        self.kind, self.age = kind, age


class TwoHeads(nn.Module):
    """Five kinds from the model's own head, three ages from another one."""

    def __init__(self, backbone: nn.Module, pack: Any) -> None:
        super().__init__()
        self.backbone, self.pack = backbone, pack
        generator = torch.Generator().manual_seed(3)
        self.age = nn.Linear(backbone.num_features, 3)
        self.age.weight.data = torch.randn(self.age.weight.shape, generator=generator)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        features = self.backbone.forward_features(x)
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return self.pack(self.backbone.head(features) if features.dim() == 4 else self.backbone.head(pooled), pooled)


def two_heads(make: Any, pack: Any) -> TwoHeads:
    model = TwoHeads(make(), None)
    model.pack = lambda kind, pooled: pack(kind, model.age(pooled))
    return model


PACKS: dict[str, tuple[Any, Any, Any]] = {
    "tuple": (lambda kind, age: (kind, age), 0, 1),
    "list": (lambda kind, age: [kind, age], -2, -1),
    "dict": (lambda kind, age: {"kind": kind, "age": age}, "kind", "age"),
    "numbered dict": (lambda kind, age: {7: kind, 9: age}, 7, 9),
    "named tuple": (Pair, "kind", "age"),
    "named tuple by position": (Pair, 0, 1),
    "output": (lambda kind, age: Output(kind=kind, age=age), "kind", "age"),
    "output by position": (lambda kind, age: Output(kind=kind, age=age), 0, 1),
    "object": (Holder, "kind", "age"),
    "function": (lambda kind, age: {"a": [kind, {"b": age}]}, lambda y: y["a"][0], lambda y: y["a"][1]["b"]),
}


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize("name", PACKS)
def test_the_picked_output_is_explained(make: Any, name: str) -> None:
    pack, kind, age = PACKS[name]
    model, image = two_heads(make, pack), images(2)
    bare = two_heads(make, lambda kind, age: (kind, age))
    found = []
    for position, output in enumerate((kind, age)):
        with untouched(model):
            found.append(LNStatAttribution(model, output=output).attribute(image, target=2))
        alone = LNStatAttribution(lambda x, i=position: bare(x)[i], bare)
        assert torch.equal(found[-1], alone.attribute(image, target=2))
    assert not torch.allclose(*found)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_it(name: str) -> None:
    model, image = two_heads(vit, lambda kind, age: {"kind": kind, "age": age}), images(2)
    method = METHODS[name](model)
    method.output = "age"
    alone = METHODS[name](lambda x: model(x)["age"], model)
    assert torch.equal(method.attribute(image, target=2), alone.attribute(image, target=2))
    method.describe(image)


def test_completeness_holds_for_the_picked_score() -> None:
    model, image = two_heads(swin, lambda kind, age: (kind, age)), images(2)
    method = LNStatAttribution(model, rule="evidence", output=1)
    delta = method.attribute(image, target=torch.tensor([0, 2]), return_convergence_delta=True)[1]
    assert delta.abs().max() < 1e-4
    layer = LayerLNStat(model, model.backbone.layers[0].blocks[1], rule="evidence", output=1)
    total = explain_layer(layer, image, torch.tensor([0, 2]))[0].total
    torch.testing.assert_close(total, model(image)[1][[0, 1], [0, 2]].detach(), rtol=1e-4, atol=1e-4)


def test_logits_are_taken_unless_something_else_is_asked_for() -> None:
    model, image = two_heads(vit, lambda kind, age: Output(age=age, logits=kind)), images(2)
    expected = LNStatAttribution(lambda x: model(x)["logits"], model).attribute(image, target=2)
    assert torch.equal(LNStatAttribution(model).attribute(image, target=2), expected)
    assert torch.equal(LNStatAttribution(model, output="logits").attribute(image, target=2), expected)
    age = LNStatAttribution(model, output="age").attribute(image, target=2)
    assert torch.equal(age, LNStatAttribution(model, output=0).attribute(image, target=2))
    assert not torch.allclose(age, expected)


def test_a_function_of_one_tensor() -> None:
    model, image = vit(), images(2)
    half = LNStatAttribution(model, rule="evidence", output=lambda y: y / 2).attribute(image, target=1)
    torch.testing.assert_close(2 * half, LNStatAttribution(model, rule="evidence").attribute(image, target=1))


@pytest.mark.parametrize(
    ("pack", "listed"),
    [
        (
            lambda kind, age: (kind, age),
            r"returned a tuple of \{0: \(2, 5\), 1: \(2, 3\)\}; expected a tensor of scores",
        ),
        (lambda kind, age: [kind, None], r"returned a list of \{0: \(2, 5\), 1: NoneType\}"),
        (lambda kind, age: {"kind": kind, "age": age}, r"returned a dict of \{'kind': \(2, 5\), 'age': \(2, 3\)\}"),
        (lambda kind, age: Output(age=age), r"returned a Output of \{'age': \(2, 3\)\}"),
        (Holder, r"returned a Holder of \{'kind': \(2, 5\), 'age': \(2, 3\)\}"),
        (lambda kind, age: (), r"returned a tuple; expected"),
    ],
)
def test_the_error_lists_what_can_be_picked(pack: Any, listed: str) -> None:
    model = two_heads(vit, pack)
    with untouched(model), pytest.raises(TypeError, match=listed) as error:
        LNStatAttribution(model).attribute(images(2), target=1)
    assert "output=" in str(error.value)


@pytest.mark.parametrize("output", ["size", 2, -3, "0"])
def test_what_is_not_there(output: Any) -> None:
    model = two_heads(vit, lambda kind, age: (kind, age))
    with pytest.raises(ValueError, match=r"not in the tuple .* of \{0: \(2, 5\), 1: \(2, 3\)\}"):
        LNStatAttribution(model, output=output).attribute(images(2), target=1)
    model = two_heads(vit, lambda kind, age: {"kind": kind})
    with pytest.raises(ValueError, match=r"not in the dict .* of \{'kind': \(2, 5\)\}"):
        LNStatAttribution(model, output=output).attribute(images(2), target=1)


def test_what_is_no_tensor() -> None:
    for returned, output, seen in (
        (("a", 1), 0, r"output=0 picks a str from the tuple of \{0: str, 1: int\}"),
        ({"a": None}, "a", "output='a' picks a NoneType"),
        ({"a": 1}, lambda y: y["a"], "output=the function picks a int"),
    ):
        with pytest.raises(TypeError, match=seen):
            pick_output(returned, output)
    with pytest.raises(TypeError, match=r"one tensor of shape \(2, 5\); leave output out"):
        LNStatAttribution(vit(), output=0).attribute(images(2), target=1)


@pytest.mark.parametrize("output", [True, 1.0, ["kind"], b"kind"])
def test_what_is_no_way_to_pick(output: Any) -> None:
    with pytest.raises(TypeError, match="expected a key"):
        LNStatAttribution(vit(), output=output)
