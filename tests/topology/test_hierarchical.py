"""MaxViT, CoAtNet, PVT, Twins, NesT, TinyViT and Hiera, of timm, torchvision and transformers, in small."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.contract import images, lively
from helpers.hierarchical_models import (
    MODELS,
    PARTS,
    efficientvit,
    hiera,
    hiera_hf,
    maxvit_torchvision,
    maxxvit,
    mvit_v2,
    nest,
    pvt_hf,
    pvt_v2,
    pvt_v2_hf,
    settled,
    tiny_vit,
    twins,
)
from helpers.hierarchical_oracle import Net, Oracle, caught
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit
from timm.models.nest import blockify
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.attribution.base import explain_batch, record
from captum_lnstat.layout import Cells, Groups
from captum_lnstat.testing.family import (
    check_batch,
    check_completeness,
    check_family,
    check_layout,
    check_mass,
    check_placement,
    check_rule,
    check_untouched,
    ground,
    planted_images,
    wake,
)
from captum_lnstat.testing.placement import PEAKS
from captum_lnstat.topology import find_topology, pooled
from captum_lnstat.topology.anatomy import geometry, units
from captum_lnstat.trace.steps import Block, Transition, Update


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, Tensor, Size, str]:
    build, size, grid, pooling = MODELS[request.param]
    return settled(lively(build(size)), images(4, size)), images(2, size), grid, pooling


def test_is_recognised_and_says_what_it_covers(case):
    model, x, grid, pooling = case
    description = LNStatAttribution(model).describe(x)
    patch = [-(-pixels // cells) for pixels, cells in zip(x.shape[-2:], grid, strict=True)]
    assert description.family in ("hierarchical", "pooled")
    assert (description.grid, list(description.patch)) == (grid, patch)
    assert pooling in description.pooling
    assert "first" in description.covers


def test_rules_mass_completeness_and_batch(case):
    model, x, _, _ = case
    with torch.no_grad():
        logits = model(x)
    target = int(getattr(logits, "logits", logits).sum(0).argmax())  # the map of one that all counts against is zero
    for rule in ("lnstat", "evidence", "rollout", "gradient"):
        check_rule(model, x, rule, target=target)
    check_completeness(model, x)
    check_untouched(model, x, ("lnstat", "gradient"), target=target)
    model.double()
    assert check_mass(model, x.double()) < 1e-12
    check_completeness(model, x.double())
    check_batch(model, x.double(), target=target)


DENSE: dict[str, tuple[Callable[[], nn.Module], Size]] = {
    "maxvit": (lambda: maxxvit("maxvit_tiny_rw", (64, 96), (32, 48, 64), **PARTS), (64, 96)),
    "maxvit_same_padding": (lambda: maxxvit("maxvit_tiny_tf", (64, 96), (32, 48, 64), **PARTS), (64, 96)),
    "pvt_v2": (pvt_v2, (64, 96)),
    "pvt_v2_odd": (pvt_v2, (60, 92)),
    "pvt_v2_li": (lambda: pvt_v2(linear=True), (64, 96)),
    "hiera": (lambda: hiera(img_size=(64, 96)), (64, 96)),
    "hiera_four_stages": (
        lambda: hiera(img_size=(64, 96), stages=(1, 1, 1, 1), q_pool=3, mask_unit_size=(8, 8)),
        (64, 96),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_is_what_dense_matrices_give(name):
    build, size = DENSE[name]
    model, x = lively(build()).double(), images(1, size).double()
    rollout, evidence, constant = Oracle(model, x, 1).explain()
    seen = LNStatAttribution(model, rule="rollout").relevance(x)[0].flatten()
    said = explain_batch(LNStatAttribution(model, rule="evidence"), x, [1])[1]
    torch.testing.assert_close(seen, rollout, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(said.grid[0].flatten(), evidence, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(float(said.constant[0]), constant, rtol=1e-9, atol=1e-12)


PLACED: dict[str, tuple[Callable[[], nn.Module], Size, dict[str, Any]]] = {
    "maxvit": (lambda: maxxvit("maxvit_tiny_tf", (64, 96), (32, 32, 48), **PARTS), (64, 96), {"margin": 4}),
    "pvt_v2": (pvt_v2, (64, 96), {"margin": 4}),
    "hiera": (lambda: hiera(img_size=(64, 96)), (64, 96), {"margin": 4}),
    "twins_svt": (lambda: twins(wss=(3, 3, 3)), (64, 96), {"margin": 4}),
    # Poolings that overlap lie between the levels: a smaller stimulus is seen by several of the last tokens.
    "nest": (nest, (64, 64), {"margin": 8, "stimulus": (32, 32), "step": (16, 16)}),
}


@pytest.mark.parametrize("name", PLACED)
def test_passes_the_kit(name):
    build, size, options = PLACED[name]
    # What else the kit asks of the other rules is asked of all models above.
    report = check_family(build(), size, rules=PEAKS, **options)
    assert report.placement["lnstat"].hits == report.placement["lnstat"].regions


LAID_OUT: dict[str, tuple[Callable[[], nn.Module], Size, dict[str, Any]]] = {
    "coatnet_rw": (lambda: maxxvit("coatnet_nano_rw", (128, 160)), (128, 160), {"margin": 8}),
    "coatnet": (lambda: maxxvit("coatnet_0", (128, 160)), (128, 160), {"margin": 8}),
    "maxvit_torchvision": (maxvit_torchvision, (64, 64), {"margin": 4}),
    "twins_pcpvt": (lambda: twins(wss=None), (64, 96), {"margin": 4}),
    "pvt_hf": (pvt_hf, (64, 64), {"margin": 4}),
    "pvt_v2_hf": (pvt_v2_hf, (64, 96), {"margin": 4}),
    "hiera_hf": (hiera_hf, (64, 64), {"margin": 4}),
    "efficientvit": (efficientvit, (256, 320), {"margin": 32}),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_values_that_a_stimulus_changes_lie_under_it(name):
    build, size, options = LAID_OUT[name]
    model = wake(build())
    place = ground(model, size, **options)
    regions = [region.grown(place.margin) for region in place.regions]
    assert check_layout(model, *planted_images(place), regions) > 1


def _twins_windows(block: Any, grid: Size) -> Tensor:
    block.attn.qkv = Net()
    ids = torch.arange(1, grid[0] * grid[1] + 1).reshape(1, -1, 1)
    return caught(lambda: block.attn(ids, grid)).flatten(0, 2).flatten(1)


def _tiny_windows(block: Any, grid: Size) -> Tensor:
    block.attn = Net()
    return caught(lambda: block(torch.arange(1, grid[0] * grid[1] + 1).reshape(1, *grid, 1)))[..., 0]


def _torchvision_windows(block: Any, grid: Size) -> Tensor:
    ids = torch.arange(1, grid[0] * grid[1] + 1).reshape(1, 1, *grid)
    return block.partition_swap(block.partition_op(ids, block.p))[0, ..., 0]


WINDOWS: dict[str, tuple[Callable[[], nn.Module], Size, Callable[[Any, Size], Tensor]]] = {
    "twins": (lambda: twins(wss=(3, 3, 3)), (64, 96), _twins_windows),
    "tiny_vit": (tiny_vit, (72, 104), _tiny_windows),
    "torchvision": (maxvit_torchvision, (64, 64), _torchvision_windows),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_those_that_the_code_of_the_model_cuts(name):
    build, size, windows = WINDOWS[name]
    model = lively(build())
    trace = record(LNStatAttribution(model), images(1, size), [1]).trace
    grid, checked = trace.grid, 0
    for step in trace.steps:
        if isinstance(step, Transition):
            grid = step.grid
        elif isinstance(step, Block) and isinstance(step.layout, Groups):
            assert torch.equal(step.layout.index, windows(model.get_submodule(step.name), grid) - 1)
            checked += 1
    assert checked > 2


@pytest.mark.parametrize("build", [pvt_v2, lambda: maxxvit("maxvit_tiny_rw", **PARTS), mvit_v2, tiny_vit, nest])
def test_what_is_even_stays_even(build):
    """No transition gathers relevance at a border or in a corner of the image."""
    steps = _steps(lively(build()), images(1, 64))
    under = [step.below for step in steps]
    groups = [one for one in under if one is not None]
    assert groups
    for one in groups:
        assert one.index.flatten().sort().values.tolist() == list(range(one.count))


@pytest.mark.parametrize("grid", [(4, 5), (3, 4), (3, 7)])
@pytest.mark.parametrize("stride", [(1, 2), (2, 1), (3, 2)])
def test_cells_of_a_stride_of_its_own_for_each_axis(grid, stride):
    for after in (
        [-(-n // step) for n, step in zip(grid, stride, strict=True)],
        [n // s for n, s in zip(grid, stride, strict=True)],
    ):
        found = geometry.cells(grid, tuple(after), stride).index.reshape(*after, *stride).tolist()
        for row, column in itertools.product(*map(range, after)):
            for down, right in itertools.product(*map(range, stride)):
                y, x = row * stride[0] + down, column * stride[1] + right
                expected = y * grid[1] + x if y < grid[0] and x < grid[1] else -1
                assert found[row][column][down][right] == expected


def test_nest_blocks_are_those_that_its_code_cuts():
    model = lively(nest())
    trace = record(LNStatAttribution(model), images(1, 64), [1]).trace
    ids = blockify(torch.arange(256).reshape(1, 16, 16, 1), 4).flatten()
    assert trace.place is not None
    assert torch.equal(ids[trace.place], torch.arange(256))
    later = blockify(torch.arange(64).reshape(1, 8, 8, 1), 4).flatten()
    pool = next(step for step in trace.steps if isinstance(step, Transition))
    below = [set(ids[row[row >= 0]].tolist()) for row in pool.below.index]
    for token, under in zip(later.tolist(), below, strict=True):
        row, column = divmod(token, 8)
        assert under == {r * 16 + c for r in (2 * row, 2 * row + 1) for c in (2 * column, 2 * column + 1)}


def test_pooled_keys_and_queries_lie_where_the_stimulus_is():
    """Overlapping poolings and attention spread a stimulus before the last values: the map alone is held against it."""
    model = mvit_v2()
    report, _ = check_placement(model, ground(model, (64, 64), margin=4))
    assert report["lnstat"].hits == report["lnstat"].regions == 9


class Subclass(PyramidVisionTransformerV2):
    """A user's own."""


class Renamed(MaxxVit):
    """Another one."""


class Own(Hiera):
    """A third."""


@pytest.mark.parametrize(
    ("model", "plain", "size"),
    [
        (lambda: pvt_v2(Subclass), pvt_v2, (64, 64)),
        (
            lambda: maxxvit("maxvit_tiny_rw", kind=Renamed, **PARTS),
            lambda: maxxvit("maxvit_tiny_rw", **PARTS),
            (64, 64),
        ),
        (lambda: hiera(Own), hiera, (64, 64)),
    ],
)
def test_a_subclass_in_a_wrapper_is_recognised(model, plain, size):
    wrapped, x = nn.Sequential(nn.Identity(), lively(model())), images(1, size)
    expected = LNStatAttribution(lively(plain())).relevance(x, 1)
    assert torch.equal(LNStatAttribution(wrapped).relevance(x, 1), expected)


def _steps(model: nn.Module, x: Tensor) -> list[Any]:
    return list(record(LNStatAttribution(model), x, [1]).trace.steps)


def test_a_convolution_block_is_a_transition_through_its_shortcut_and_an_update():
    model = lively(maxxvit("maxvit_tiny_rw", (64, 64), (32, 48), **PARTS))
    steps = _steps(model, images(1, 64))
    kinds = [(Block if isinstance(step, Block) else type(step), step.name) for step in steps]
    assert kinds == [
        (Block, "stages.0.blocks.0.attn_block"),
        (Block, "stages.0.blocks.0.attn_grid"),
        (Transition, "stages.1.blocks.0.conv.shortcut"),
        (Update, "stages.1.blocks.0.conv"),
        (Block, "stages.1.blocks.0.attn_block"),
        (Block, "stages.1.blocks.0.attn_grid"),
    ]


def test_reduced_keys_stand_for_the_tokens_under_them():
    first = _steps(lively(pvt_v2()), images(1, 64))[0]
    assert isinstance(first.keys, Cells)
    assert first.keys.groups.index.shape == (16, 16)
    assert first.keys.groups.index[1].reshape(4, 4).tolist() == [
        [row * 16 + c for c in range(4, 8)] for row in range(4)
    ]


def test_transposed_windows_are_noticed(monkeypatch):
    model, x = lively(twins(wss=(2, 2, 2))), images(1, (64, 96))

    def transposed(*args: Any) -> Groups:
        index = geometry.squares(*args).index
        return Groups(index.reshape(-1, 2, 2).transpose(1, 2).reshape(index.shape))

    monkeypatch.setattr("captum_lnstat.topology.readers.residual.squares", transposed)
    with pytest.raises(RecordingError, match=r"adds to the stream is not its attention"):
        LNStatAttribution(model, rule="rollout").relevance(x)


def test_another_order_of_the_tokens_is_noticed(monkeypatch):
    model, x = lively(hiera(img_size=(64, 64))), images(1, 64)
    monkeypatch.setattr(pooled, "_pooling_order", lambda grid, pools, device: torch.arange(grid[0] * grid[1]))
    with pytest.raises(UnsupportedModelError, match="in the order in which they are pooled"):
        LNStatAttribution(model, rule="rollout").relevance(x)


class Squashed(nn.Module):
    """Something between two stages that is no part of it."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x.tanh())


def test_a_function_between_the_stages_is_refused():
    model = lively(pvt_v2())
    model.stages[1] = Squashed(model.stages[1])
    with pytest.raises(RecordingError, match="something between its blocks"):
        LNStatAttribution(model, rule="rollout").relevance(images(1, 64))


@pytest.mark.parametrize(("build", "channel"), [(lambda: maxxvit("coatnet_nano_rw"), 1), (pvt_v2, 2)])
def test_a_layer_is_explained_in_its_own_layout(build, channel):
    model, x = lively(build()), images(1, 64)
    blocks = record(LNStatAttribution(model), x, [1]).trace.blocks
    layer = model.get_submodule(blocks[0].name)
    given = LayerLNStat(model, layer).attribute(x, 1, attribute_to_layer_input=True)
    expected = LNStatAttribution(model).relevance(x, 1)
    at_tokens = given.sum(channel).flatten(1)
    torch.testing.assert_close(at_tokens, expected.flatten(1), rtol=1e-4, atol=1e-7)


def test_heads_that_run_one_after_another():
    model, x = lively(efficientvit()).double(), images(2, (128, 160)).double()
    for rule in ("lnstat", "evidence", "rollout"):
        check_rule(model, x, rule)
    check_mass(model, x)
    check_completeness(model, x)
    check_batch(model, x, ("lnstat", "evidence", "rollout"))
    assert "No LayerNorm" in LNStatAttribution(model).describe(x).covers
    with pytest.raises(UnsupportedModelError, match="expected one of 'lnstat', 'evidence', 'rollout'"):
        LNStatAttribution(model, rule="gradient").relevance(x, 1)


def test_heads_after_another_activation_are_not_recognised():
    model = efficientvit()
    for stage in model.stages:
        for block in stage.blocks:
            block.mixer.m.attn.proj[0] = nn.GELU()
    with pytest.raises(UnsupportedModelError, match="not a vision transformer of a known family"):
        find_topology(model)


def test_where_evidence_is_put_down_is_said():
    assert (
        "At stages.2.downsample evidence is put on"
        in LNStatAttribution(lively(tiny_vit())).describe(images(1, 64)).covers
    )
    assert "evidence is put" not in LNStatAttribution(lively(pvt_v2())).describe(images(1, 64)).covers


def test_a_stream_that_is_widened_at_the_mlp_is_refused():
    with pytest.raises(RecordingError, match="256 tokens of 16 channels and then 256 tokens of 32 channels"):
        LNStatAttribution(lively(mvit_v2(expand_attn=False))).relevance(images(1, 64), 1)


def test_two_attentions_side_by_side_are_not_recognised():
    with pytest.raises(UnsupportedModelError, match="not a vision transformer of a known family"):
        find_topology(maxxvit("maxvit_tiny_pm", **PARTS))


def test_parts_of_tokens_that_are_all_the_same_cannot_be_told():
    tokens = torch.ones(1, 16, 3)
    with pytest.raises(RecordingError, match="the same for windows and for lattices"):
        geometry.partition("block", (4, 4), [(2, 2)], tokens, torch.ones(4, 4, 3))


def test_the_affine_part_of_a_random_module_is_not_trusted():
    model = lively(maxxvit("maxvit_tiny_rw", (64, 64), (32, 48), **PARTS))
    model.stages[1].blocks[0].conv.shortcut.expand = nn.Sequential(nn.Conv2d(32, 48, 1), Noisy())
    with pytest.raises(RecordingError, match="does not return again"):
        LNStatAttribution(model, rule="evidence").relevance(images(1, 64), 1)


class Noisy(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_shortcuts_lead_from_all_channels_to_all():
    conv = maxxvit("maxvit_tiny_rw", (64, 64), (32, 48), **PARTS).stages[1].blocks[0].conv
    names = [name for name, _ in units.shortcuts(conv)]
    assert names[0] == "shortcut"
    assert not any(name.startswith("conv") for name in names)


@pytest.mark.parametrize("build", [nest, lambda: efficientvit(img_size=64)], ids=["nest", "efficientvit"])
def test_in_half_precision(build):
    """What is added in bfloat16 is compared with what it is made of in bfloat16."""
    model, x = lively(build()), images(2, 64)
    exact = LNStatAttribution(model, rule="rollout").relevance(x)
    rounded = LNStatAttribution(model.bfloat16(), rule="rollout").relevance(x.bfloat16())
    assert torch.corrcoef(torch.stack([exact.flatten(), rounded.float().flatten()]))[0, 1] > 0.9
    # The rows of a softmax in bfloat16 sum to one no better than that.
    torch.testing.assert_close(rounded.float().sum((1, 2)), torch.ones(2), atol=0.02, rtol=0)


@pytest.mark.parametrize("wss", [None, (3, 3, 3)], ids=["pcpvt", "svt"])
def test_a_convolution_after_the_only_block_of_the_last_stage(wss):
    model, x = lively(twins(depths=(2, 1, 1), wss=wss)), images(2, 64)
    steps = _steps(model, x)
    assert [step.name for step in steps[-2:]] == ["blocks.2.0", "pos_block.2"]
    assert isinstance(steps[-1], Update)
    check_mass(model, x)
    check_completeness(model, x)


def test_a_stimulus_is_as_large_as_a_token_of_an_odd_grid():
    """9 x 13 patches of 4 px become 5 x 7 and 3 x 4 tokens: 4 x 4 patches a token, fewer at the edge."""
    region = ground(wake(pvt_v2()), (36, 52), step=(8, 8)).regions[0]
    assert (region.height, region.width) == (16, 16)
