"""internal_batch_size: the same numbers as for the whole batch, whatever is split with the images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel
from helpers.choices import diagonal
from helpers.contract import METHODS, images, swin, untouched, vit
from torch import Tensor, nn

from captum_lnstat import LayerLNStat, LNStatAttribution

Make = Callable[..., Any]
COUNT = 5
# Kernels differ from one batch size to the next by a rounding.
same = {"rtol": 1e-4, "atol": 1e-6}
# A batch is cut before any method sees it: every method on every model, with the ways of cutting it in turn.
BOTH = list(product((vit, swin), METHODS))


class Sizes(nn.Module):
    """Notes how many images came at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.model(x)


@pytest.mark.parametrize(
    ("model", "make", "size", "chunks"),
    diagonal(BOTH, [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (9, [5])]),
    indirect=["model", "make"],
)
def test_same_as_the_whole_batch(model: nn.Module, make: Make, size: int, chunks: list[int]) -> None:
    noted, image, target = Sizes(model), images(COUNT), [0, 1, 2, 3, 4]
    whole = make(model).attribute(image, target=target)
    with untouched(model, image):
        found = make(noted).attribute(image, target=target, internal_batch_size=size)
    assert noted.seen == chunks
    torch.testing.assert_close(found, whole, **same)
    assert found.is_contiguous()
    assert not found.requires_grad
    noted.seen.clear()
    grid = make(noted).relevance(image, target=target, internal_batch_size=size)
    assert noted.seen == chunks
    torch.testing.assert_close(grid, make(model).relevance(image, target=target), **same)


@pytest.mark.parametrize(
    ("model", "make", "mode"),
    diagonal(BOTH, [torch.enable_grad, torch.no_grad, torch.inference_mode]),
    indirect=["model", "make"],
)
def test_in_every_grad_mode_and_in_tuples(model: nn.Module, make: Make, mode: Any) -> None:
    image = images(3)
    whole = make(model).attribute(image, target=1)
    with mode():
        found = make(model).attribute((image,), target=1, internal_batch_size=2)
    assert type(found) is tuple
    assert not found[0].is_inference()
    torch.testing.assert_close(found[0], whole, **same)


TARGETS: dict[str, Any] = {
    "int": 2,
    "tuple": (2,),
    "1-element tensor": torch.tensor([2]),
    "list": [4, 3, 2, 1, 0],
    "list of tuples": [(4,), (3,), (2,), (1,), (0,)],
    "tensor": torch.tensor([4, 3, 2, 1, 0]),
}


@pytest.mark.parametrize("form", TARGETS)
def test_targets_go_with_their_images(model: nn.Module, form: str) -> None:
    method, image = LNStatAttribution(model), images(COUNT)
    found = method.attribute(image, target=TARGETS[form], internal_batch_size=2)
    torch.testing.assert_close(found, method.attribute(image, target=TARGETS[form]), **same)


@pytest.mark.parametrize(
    ("model", "make", "target"),
    diagonal(BOTH, [[0, 1, 2, 3], [0, 1, 2, 3, 4, 0], torch.zeros(6, dtype=torch.int64), [0], [1, 2]]),
    indirect=["model", "make"],
)
def test_targets_that_are_not_as_many_as_the_images(model: nn.Module, make: Make, target: Any) -> None:
    with untouched(model), pytest.raises(AssertionError, match="does not match with the number of targets"):
        make(model).attribute(images(COUNT), target=target, internal_batch_size=2)


def test_delta_of_every_image(model: nn.Module) -> None:
    method, image = LNStatAttribution(model, rule="evidence"), images(COUNT)
    found, delta = method.attribute(image, target=1, internal_batch_size=2, return_convergence_delta=True)
    whole, _ = method.attribute(image, target=1, return_convergence_delta=True)
    torch.testing.assert_close(found, whole, **same)
    assert delta.shape == (COUNT,)
    assert delta.abs().max() < 1e-4


def test_arguments_with_a_row_an_image_are_split(model: nn.Module, make: Make) -> None:
    image = images(COUNT)
    seen: list[Any] = []

    def forward(x: Tensor, rows: Tensor, one_row: Tensor, scalar: Tensor, word: str) -> Tensor:
        seen.append((tuple(rows.shape), tuple(one_row.shape), tuple(scalar.shape), word))
        return model(x) * rows * one_row * scalar

    rows = torch.arange(1.0, COUNT + 1)[:, None]
    args = (rows, torch.full((1, 1), 3.0), torch.tensor(0.5), "plain")
    method = make(forward, model)
    found = method.attribute(image, 1, args, internal_batch_size=2)
    assert seen == [((n, 1), (1, 1), (), "plain") for n in (2, 2, 1)]
    torch.testing.assert_close(found, method.attribute(image, 1, args), **same)
    single = make(lambda x, rows: model(x) * rows, model)
    torch.testing.assert_close(
        single.attribute(image, 1, rows, internal_batch_size=2), single.attribute(image, 1, rows), **same
    )


def test_arguments_that_cannot_be_split(model: nn.Module, make: Make) -> None:
    method = make(lambda x, weights: model(x) * weights[:1], model)
    with (
        untouched(model),
        pytest.raises(ValueError, match=r"additional_forward_args\[0\] has shape \(3,\), the batch 5"),
    ):
        method.attribute(images(COUNT), 1, torch.ones(3), internal_batch_size=2)


NO_SIZES = [
    (0, ValueError, "internal_batch_size is 0; expected at least 1"),
    (-3, ValueError, "internal_batch_size is -3; expected at least 1"),
    (2.0, TypeError, r"internal_batch_size is 2\.0; expected a positive int"),
    (True, TypeError, "internal_batch_size is True"),
    ("2", TypeError, "internal_batch_size is '2'"),
]


@pytest.mark.parametrize(
    ("model", "make", "size", "error", "message"), diagonal(BOTH, NO_SIZES), indirect=["model", "make"]
)
def test_sizes_that_are_none(model: nn.Module, make: Make, size: Any, error: type[Exception], message: str) -> None:
    method = make(model)
    for call in (method.attribute, method.relevance):
        with untouched(model), pytest.raises(error, match=message):
            call(images(1), target=1, internal_batch_size=size)


def test_all_images_are_checked_first(model: nn.Module, make: Make) -> None:
    noted, image = Sizes(model), images(3)
    image[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        make(noted).attribute(image, target=1, internal_batch_size=1)
    assert not noted.seen


def test_noise_tunnel_hands_it_on(model: nn.Module) -> None:
    noted = Sizes(model)
    torch.manual_seed(1)
    found = NoiseTunnel(LNStatAttribution(noted)).attribute(
        images(2), nt_samples=3, target=[1, 2], internal_batch_size=4
    )
    assert noted.seen == [4, 2]
    torch.manual_seed(1)
    whole = NoiseTunnel(LNStatAttribution(model)).attribute(images(2), nt_samples=3, target=[1, 2])
    torch.testing.assert_close(found, whole, **same)


@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout"])
@pytest.mark.parametrize("into", [False, True])
def test_layer(rule: Any, into: bool) -> None:
    for model, block in ((m := vit(), m.blocks[1]), (s := swin(), s.layers[1].blocks[0])):
        layer, image, target = LayerLNStat(model, block, rule=rule), images(COUNT), [0, 1, 2, 3, 4]
        found = layer.attribute(image, target, None, into, internal_batch_size=2)
        torch.testing.assert_close(found, layer.attribute(image, target, None, into), **same)
        (inside,) = layer.attribute((image,), target, None, into, internal_batch_size=2)
        assert torch.equal(inside, found)
        with pytest.raises(ValueError, match="at least 1"):
            layer.attribute(image, target, internal_batch_size=0)
