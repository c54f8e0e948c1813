"""The test kit passes what is right and fails what is laid out wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from captum_lnstat.layout import Groups
from captum_lnstat.planting import wake
from captum_lnstat.testing import (
    PEAKS,
    check_family,
)
from captum_lnstat.topology import PlainTopology, WindowedTopology
from captum_lnstat.trace import Block, Merging

VIT_SIZE, SWIN_SIZE = (32, 48), (48, 64)


def vit(kind: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    return kind(img_size=VIT_SIZE, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4, **options)


def swin(kind: type[nn.Module] = SwinTransformer, size: tuple[int, int] = SWIN_SIZE) -> nn.Module:
    return kind(
        img_size=size, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=4
    )


MODELS = {
    "vit": (vit, VIT_SIZE),
    "deit": (lambda: vit(VisionTransformerDistilled), VIT_SIZE),
    "swin": (swin, SWIN_SIZE),
    "swinv2": (lambda: swin(SwinTransformerV2), SWIN_SIZE),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_families_pass(name):
    build, size = MODELS[name]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = check_family(model, size)
    assert report.layout == sum(step.kind == "attention" for step in report.description.steps)
    assert set(report.placement) == {"lnstat", "evidence", "rollout", "gradient"}
    for rule in PEAKS:
        placed = report.placement[rule]
        assert placed.hits == placed.regions >= 9
        assert placed.margin > 1.5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training  # it was when it was given


# What a wrong topology would make of the trace of a right one.


def _transposed(trace):
    return replace(trace, grid=(trace.grid[1], trace.grid[0]))


def _order(trace, ids):
    """A consistent but wrong place for every patch token of a plain model."""
    order = torch.cat([torch.arange(trace.prefix), trace.prefix + ids.flatten()])
    layout = Groups(order.argsort()[None])
    blocks = [
        replace(
            block,
            layout=layout,
            before=block.before[:, order],
            between=block.between[:, order],
            after=block.after[:, order],
        )
        for block in trace.blocks
    ]
    return replace(trace, steps=tuple(blocks), tokens=trace.tokens[:, order])


def _ids(trace):
    return torch.arange(trace.grid[0] * trace.grid[1]).reshape(trace.grid)


def _column_by_column(trace):
    return _order(trace, _ids(trace).T.reshape(trace.grid))


def _flipped(trace):
    return _order(trace, _ids(trace).flip(0))


def _with_groups(trace, change):
    return replace(trace, steps=tuple(change(step) for step in trace.steps))


def _windows(trace, move):
    """The tokens of every window moved on the grid of its stage."""

    def change(step):
        if not isinstance(step, Block):
            return step
        rows = int((step.before.shape[1] * trace.grid[0] / trace.grid[1]) ** 0.5)
        ids = torch.arange(step.before.shape[1]).reshape(rows, -1)
        return replace(
            step, layout=Groups(torch.where(step.layout.index < 0, -1, move(ids).flatten()[step.layout.index]))
        )

    return _with_groups(trace, change)


def _shifted_windows(trace):
    return _windows(trace, lambda ids: ids.roll((2, 2), (0, 1)))


def _flipped_windows(trace):
    return _windows(trace, lambda ids: ids.flip(0))


def _swapped_quads(trace):
    def change(step):
        return replace(step, groups=Groups(step.groups.index[:, [3, 2, 1, 0]])) if isinstance(step, Merging) else step

    return _with_groups(trace, change)


def _moved_quads(trace):
    """Every parent is given the children of another one."""

    def change(step):
        return replace(step, groups=Groups(step.groups.index.roll(1, 0))) if isinstance(step, Merging) else step

    return _with_groups(trace, change)


BROKEN = {
    "vit, grid transposed": ("vit", PlainTopology, _transposed),
    "vit, column by column": ("vit", PlainTopology, _column_by_column),
    "vit, rows flipped": ("vit", PlainTopology, _flipped),
    "swin, grid transposed": ("swin", WindowedTopology, _transposed),
    "swin, windows shifted": ("swin", WindowedTopology, _shifted_windows),
    "swin, windows flipped": ("swin", WindowedTopology, _flipped_windows),
    "swin, quads moved": ("swin", WindowedTopology, _moved_quads),
    "swin, quads swapped": ("swin", WindowedTopology, _swapped_quads),
}


def broken(monkeypatch, name):
    model, topology, change = BROKEN[name]
    right = topology.trace
    monkeypatch.setattr(topology, "trace", lambda self, *rest: change(right(self, *rest)))
    build, size = MODELS[model]
    return wake(build()), size


@pytest.mark.parametrize("name", BROKEN)
def test_the_kit_fails_what_is_laid_out_wrongly(monkeypatch, name):
    model, size = broken(monkeypatch, name)
    with pytest.raises(AssertionError):
        check_family(model, size)
