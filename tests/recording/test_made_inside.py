"""What is made inside blocks is known by identity, and what has the identity of one that is gone is not it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_lnstat.recording.inside import Inside
from captum_lnstat.recording.places import Places


def _outside(inside: Inside, value: Any) -> Any:
    return inside.outside(value, Places(nn.Identity(), (), lambda before, after: None).mark)


def test_a_tensor_with_the_identity_of_an_earlier_one_is_given_as_it_is() -> None:
    inside = Inside()
    for number in range(64):  # each takes the place of the one before, once nothing holds that
        made: Tensor = torch.full((2, 3), float(number))
        inside.made("block", (), made)
        given = _outside(inside, (made,))[0]
        assert given.requires_grad
        assert torch.equal(given, made)
        again = torch.full((1,), -1.0)
        assert _outside(inside, (again,))[0] is again
        del made, given, again
    assert len(inside.read) == 64


class _Pair(NamedTuple):
    one: Tensor
    other: int


def test_what_holds_it_keeps_its_kind() -> None:
    inside, made, plain = Inside(), torch.zeros(2), torch.zeros(2)
    inside.made("block", (), made)
    pair, listed = _outside(inside, (_Pair(made, 3), [plain, made]))
    assert type(pair) is _Pair
    assert pair.other == 3
    assert pair.one.requires_grad
    assert listed[0] is plain
    assert listed[1] is pair.one


def test_a_tensor_that_is_gone_leaves_nothing_behind() -> None:
    inside = Inside()
    made = torch.zeros(2)
    address = id(made)
    inside.made("block", (), made)
    del made
    others = [torch.ones(2) for _ in range(64)]
    taken = [other for other in others if id(other) == address]
    assert taken
    assert all(_outside(inside, other) is other for other in taken)


def test_what_is_handed_through_or_no_number_or_in_a_graph_is_not_taken_for_made() -> None:
    inside = Inside()
    through, index, graph = torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, requires_grad=True)
    inside.made("block", (through,), through)
    inside.made("block", (), (index, graph, 3))
    for one in (through, index, graph):
        assert _outside(inside, {"x": [one]})["x"][0] is one
    assert not inside.read


def test_the_same_tensor_is_marked_once() -> None:
    inside, made = Inside(), torch.zeros(2)
    inside.made("block", (), [made])
    first, second = _outside(inside, [made, made])
    assert first is second
    assert list(inside.read) == ["the inside of block"]
