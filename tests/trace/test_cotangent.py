"""Cotangents of few directions against the same written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_lnstat.layout import PADDING, Groups, quads
from captum_lnstat.trace.cotangent import Cotangent, to_children

BATCH, TOKENS, CHANNELS = 2, 6, 8


def _u(kind: str, scores: int) -> Tensor:
    u = torch.randn(BATCH, TOKENS, scores, CHANNELS, dtype=torch.float64)
    if kind == "parallel":
        u = u[:, :1] * torch.randn(BATCH, TOKENS, 1, 1, dtype=torch.float64)
    if kind == "one token":
        u[:, 1:] = 0
    if kind == "two tokens":
        u[:, 2:] = 0
    if kind == "some parallel":
        u = u[:, :1] * torch.randn(BATCH, TOKENS, 1, 1, dtype=torch.float64)
        u[:, 0] = 0
    if kind == "one image has none":
        u = u[:, :1] * torch.randn(BATCH, TOKENS, 1, 1, dtype=torch.float64)
        u[1] = 0
    if kind == "nothing":
        u = torch.zeros_like(u)
    return u


KINDS = {
    "dense": (6, 6),
    "parallel": (1, 6),
    "one token": (1, 1),
    "two tokens": (2, 2),
    "some parallel": (1, 5),
    "one image has none": (1, 6),
    "nothing": (0, 0),
}


@pytest.mark.parametrize("scores", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cotangent_is_what_it_was_made_of(kind: str, scores: int) -> None:
    u = _u(kind, scores)
    cotangent = Cotangent.of(u)
    assert (cotangent.kinds, len(cotangent.at)) == KINDS[kind]
    torch.testing.assert_close(cotangent.spread(cotangent.dense()), u, rtol=1e-12, atol=1e-12)
    x, b = torch.randn(BATCH, TOKENS, CHANNELS, dtype=torch.float64), torch.randn(CHANNELS, dtype=torch.float64)
    read = torch.einsum("bnsc,bnc->bns", u, x)
    torch.testing.assert_close(cotangent.spread(cotangent.read(x)), read, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cotangent.spread(cotangent.read_vector(b)), u @ b, rtol=1e-12, atol=1e-12)
    factor = torch.randn(BATCH, TOKENS, dtype=torch.float64)
    scaled = cotangent.scaled(factor)
    torch.testing.assert_close(scaled.spread(scaled.dense()), u * factor[..., None, None])
    times = cotangent.times(x)
    torch.testing.assert_close(times.spread(times.dense()), u * x[:, :, None])


def test_directions_that_differ_by_more_than_rounding_stay_apart() -> None:
    u = _u("parallel", 1).float()
    assert Cotangent.of(u).kinds == 1
    u[0, 4, 0, 3] *= 1 + 1e-4
    assert Cotangent.of(u).kinds == TOKENS


@pytest.mark.parametrize("scores", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 6), (3, 3)])
def test_a_joined_cotangent_taken_apart(kind: str, scores: int, grid: tuple[int, int]) -> None:
    groups: Groups = quads(grid)
    u = _u(kind, scores)[:, : len(groups.index)]
    children = to_children(Cotangent.of(u), groups)
    expected = torch.zeros(BATCH, grid[0] * grid[1], scores, CHANNELS // 4, dtype=torch.float64)
    for parent, members in enumerate(groups.index.tolist()):
        for place, child in enumerate(members):
            if child != PADDING:
                channels = slice(place * CHANNELS // 4, (place + 1) * CHANNELS // 4)
                expected[:, child] = u[:, parent, :, channels]
    torch.testing.assert_close(children.spread(children.dense()), expected, rtol=1e-12, atol=1e-12)
    if kind == "parallel":
        assert children.kinds == 4


@pytest.mark.parametrize("kind", KINDS)
def test_which_tokens_are_read(kind: str) -> None:
    u = _u(kind, 2)
    assert torch.equal(Cotangent.of(u).reads(), u.ne(0).flatten(2).any(-1))
