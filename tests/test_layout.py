"""Layouts against the partition code of timm's own blocks."""

from __future__ import annotations

import pytest
import torch
from helpers.oracles import merging_ids, window_ids
from timm.models import swin_transformer, swin_transformer_v2

from captum_lnstat.layout import PADDING, Groups, WholeImage, quads, windows

GEOMETRIES = [
    # grid, window, shift
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((9, 9), (4, 4), (2, 2)),
    ((18, 18), (7, 7), (3, 3)),
    ((18, 18), (7, 7), (0, 0)),
    ((4, 4), (7, 7), (3, 3)),
    ((6, 10), (2, 4), (1, 2)),
    ((7, 5), (3, 2), (1, 1)),
    ((5, 9), (4, 3), (0, 1)),
    ((9, 5), (3, 4), (1, 0)),
    ((1, 6), (1, 4), (0, 2)),
    ((6, 1), (4, 1), (2, 0)),
    ((3, 3), (1, 1), (0, 0)),
]


def _block(version: int, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> torch.nn.Module:
    cls = swin_transformer.SwinTransformerBlock if version == 1 else swin_transformer_v2.SwinTransformerV2Block
    return cls(4, grid, num_heads=1, window_size=window, shift_size=shift, always_partition=True)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("grid", "window", "shift"), GEOMETRIES)
def test_windows_are_those_of_the_block(version, grid, window, shift):
    block = _block(version, grid, window, shift)
    assert (tuple(block.window_size), tuple(block.shift_size)) == (window, shift)
    assert torch.equal(windows(grid, window, shift).index, window_ids(block, grid) - 1)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (9, 9), (5, 8), (8, 5), (1, 1), (3, 7)])
def test_quads_are_those_of_the_merging(version, grid):
    merging = (swin_transformer if version == 1 else swin_transformer_v2).PatchMerging(4)
    assert torch.equal(quads(grid).index, merging_ids(merging, grid))


@pytest.mark.parametrize(("grid", "window", "shift"), GEOMETRIES)
def test_windows_hold_every_token_once(grid, window, shift):
    index = windows(grid, window, shift).index
    held = index[index != PADDING].sort().values
    assert torch.equal(held, torch.arange(grid[0] * grid[1]))


def _layouts() -> list[tuple[Groups, int]]:
    found = [(windows(*geometry), geometry[0][0] * geometry[0][1]) for geometry in GEOMETRIES]
    return found + [(quads(grid), grid[0] * grid[1]) for grid in [(4, 4), (5, 4), (5, 3)]]


@pytest.mark.parametrize(("layout", "count"), _layouts())
def test_gather_then_scatter_is_the_identity(layout, count):
    tokens = torch.randn(3, count, 2)
    back, lost = layout.scatter(layout.gather(tokens), 3)
    assert torch.equal(back, tokens)
    assert torch.equal(lost, torch.zeros(3, 2))


@pytest.mark.parametrize(("layout", "count"), _layouts())
def test_scatter_loses_nothing(layout, count):
    groups = torch.randn(3 * layout.index.shape[0], layout.index.shape[1], 2, dtype=torch.float64)
    tokens, lost = layout.scatter(groups, 3)
    assert tokens.shape == (3, count, 2)
    everything = groups.reshape(3, -1, 2).sum(1)
    assert torch.allclose(tokens.sum(1) + lost, everything, atol=1e-12)
    padded = layout.index.flatten() == PADDING
    assert torch.allclose(lost, groups.reshape(3, -1, 2)[:, padded].sum(1), atol=1e-12)


@pytest.mark.parametrize("version", [1, 2])
def test_groups_are_counted_image_by_image(version):
    grid, window, shift = (6, 7), (4, 3), (2, 1)
    block = _block(version, grid, window, shift)
    seen = window_ids(block, grid, batch=3)
    ids = torch.arange(1, 3 * 42 + 1).reshape(3, 42, 1)
    assert torch.equal(windows(grid, window, shift).gather(ids)[..., 0], seen)


def test_padded_places_are_gathered_as_zeros():
    layout = windows((3, 3), (2, 2), (1, 1))
    gathered = layout.gather(torch.ones(2, 9, 1))
    padded = (layout.index == PADDING).repeat(2, 1)
    assert padded.any()
    assert torch.equal(gathered[..., 0], (~padded).float())


def test_whole_image_is_one_group():
    tokens = torch.randn(2, 5, 3)
    layout = WholeImage()
    assert torch.equal(layout.gather(tokens), tokens)
    back, lost = layout.scatter(tokens, 2)
    assert torch.equal(back, tokens)
    assert torch.equal(lost, torch.zeros(2, 3))
