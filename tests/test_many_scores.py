"""What values said about many scores, made in pieces, against one sum over everything."""

from __future__ import annotations

import pytest
import torch

from captum_lnstat import many_scores
from captum_lnstat.many_scores import read_many


@pytest.mark.parametrize("shape", [(4, 2, 5, 3, 7), (1, 1, 1, 4, 3), (6, 3, 9, 1, 2), (2, 2, 1, 11, 4)])
@pytest.mark.parametrize(("beside", "held"), [(400, 5 << 15), (1, 1), (4, 60), (7, 13)])
def test_pieces_are_the_sum_over_everything(shape, beside, held, monkeypatch):
    monkeypatch.setattr(many_scores, "SIDE_BY_SIDE", beside)
    monkeypatch.setattr(many_scores, "HELD", held)
    groups, heads, kinds, keys, scores = shape
    images, channels = (2 if groups % 2 == 0 else 1), 4
    rng = torch.Generator().manual_seed(0)
    used = torch.rand(groups, kinds, generator=rng) < 0.5
    heard = torch.randn(groups, heads, kinds, keys, generator=rng, dtype=torch.float64) * used[:, None, :, None]
    values = torch.randn(groups, heads, keys, channels, generator=rng, dtype=torch.float64)
    directions = torch.randn(images, kinds, scores, heads * channels, generator=rng, dtype=torch.float64)
    every = directions.repeat_interleave(groups // images, 0).unflatten(-1, (heads, channels))
    expected = torch.einsum("ghkj,ghjc,gkshc->gjs", heard, values, every)
    found = read_many(heard, values, directions, used)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert found.shape == (groups, keys, scores)


def test_kinds_that_no_group_hears_of_are_left_out():
    heard, values = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 2, 4)
    directions = torch.ones(1, 3, 2, 4)
    directions[:, 1] = torch.nan
    used = torch.tensor([[True, False, True]])
    assert torch.equal(read_many(heard, values, directions, used), torch.full((1, 2, 2), 8.0))
