"""What is recognised in a model, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import timm
import torch
from helpers.models import CASES, CLASSES, FEW, SWINS, VITS, build, enliven, explain, images, rule, targets
from helpers.oracles import DenseBlock, DenseMerging, dense, window_ids
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, RecordingError, Topology, UnsupportedModelError, register_topology
from captum_lnstat.layout import Groups, WholeImage
from captum_lnstat.rules.engine import run
from captum_lnstat.topology import PlainTopology, WindowedTopology, find_topology
from captum_lnstat.topology import base as registry
from captum_lnstat.trace.steps import Block, Merging
from captum_lnstat.trace.trace import Trace

ALL = [*VITS, *SWINS]


def _trace(name: str, model: nn.Module | None = None) -> Trace:
    model = build(name) if model is None else model
    return run(model, model, images(CASES[name])).trace


@pytest.mark.parametrize("name", ALL)
def test_what_is_traced_is_what_ran(name):
    case, trace, oracle = CASES[name], _trace(name), dense(name)
    assert trace.family == ("plain" if name in VITS else "windowed")
    assert (trace.grid, trace.prefix, trace.patch) == (case.grid, case.prefix, case.patch)
    kinds = {DenseBlock: Block, DenseMerging: Merging}
    assert len(trace.steps) == len(oracle.steps)
    assert all(isinstance(found, kinds[type(step)]) for found, step in zip(trace.steps, oracle.steps, strict=True))
    assert [block.name for block in trace.blocks] == [block.name for block in oracle.blocks]
    assert torch.allclose(trace.tokens, oracle.steps[0].before, atol=1e-9)
    for found, expected in zip(trace.blocks, oracle.blocks, strict=True):
        assert torch.allclose(found.before, expected.before, atol=1e-9)
        assert torch.allclose(found.attention_update, expected.update, atol=1e-9)
        assert torch.allclose(found.after - found.between, expected.mlp, atol=1e-9)


@pytest.mark.parametrize("name", SWINS)
def test_windows_are_those_of_the_blocks_as_they_ran(name):
    """Token ids through every block's own partition code, at the grid that the block really saw."""
    trace, oracle = _trace(name), dense(name)
    shifts, padded = set(), 0
    for found in trace.blocks:
        block = oracle.model.get_submodule(found.name)
        seen = oracle.capture.inputs[block]
        expected = window_ids(block, (seen.shape[1], seen.shape[2])) - 1
        assert isinstance(found.layout, Groups)
        assert torch.equal(found.layout.index, expected)
        shifts.add(tuple(block.shift_size))
        padded += int((expected < 0).sum())
    # The geometry that the case is there for.
    if not name.endswith("odd-grids"):
        assert len(shifts) > 1
    if "one-axis" in name:
        assert (0, 4) in shifts
    if "padded" in name:
        assert padded > 0


@pytest.mark.parametrize("name", FEW)
def test_plain_models_have_one_group(name):
    plain = [isinstance(block.layout, WholeImage) for block in _trace(name).blocks]
    assert all(plain) if name in VITS else not any(plain)


@pytest.mark.parametrize("name", ["vit-class", "vit-map-registers", "swin1-padded-4"])
@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_the_start_is_what_the_head_reads(name, fusion):
    start = _trace(name).start(fusion)
    assert torch.allclose(start, dense(name).start(fusion), atol=1e-12)
    assert torch.allclose(start.sum(1), torch.ones(2).double())


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("vit-class", "class token"),
        ("vit-distilled", "class and distillation token"),
        ("vit-avg", "mean of the patches"),
        ("vit-avg-of-all", "mean of the tokens"),
        ("vit-map", "attention pooling"),
        ("swin1-shift", "mean of the tokens"),
    ],
)
def test_pooling_is_named(name, start):
    assert _trace(name).pooling.name == start


# Images that are not whole patches.


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_pixels_past_the_last_whole_patch_are_part_of_the_attribution(kind, interpolation):
    """timm takes a 70 px image in patches of 16 (or 67 in patches of 4) and never reads what is left over."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": CLASSES, "embed_dim": 24, "patch_size": 16 if kind == "vit" else 4}
    if kind == "vit":
        model: nn.Module = VisionTransformer(img_size=70, depth=1, num_heads=2, **options).eval()
        size, read = 70, 64
    else:
        model = SwinTransformer(img_size=67, depths=(2,), num_heads=(2,), window_size=4, **options).eval()
        size, read = 67, 64
    x = torch.randn(2, 3, size, size)
    method = LNStatAttribution(model, rule="evidence", interpolation=interpolation)
    attribution, grid = method.attribute(x, 1), method.relevance(x, 1)
    assert attribution.shape == x.shape
    assert torch.allclose(attribution.sum((1, 2, 3)), grid.sum((1, 2)), atol=1e-4)
    assert float(attribution[..., read:, :].abs().max()) == float(attribution[..., read:].abs().max()) == 0


# Finding the model.


def _tiny_vit(**options: Any) -> VisionTransformer:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return VisionTransformer(**{**settings, **options}).eval()


def _tiny_swin(**options: Any) -> SwinTransformer:
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
    return SwinTransformer(**{**settings, "window_size": 2, "num_classes": CLASSES, **options}).eval()


class _Wrapper(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return sum(model(x * 0.5) for model in self.inner)


def test_a_model_inside_a_wrapper_is_found():
    model = build("vit-class")
    wrapper = nn.Sequential(nn.Identity(), nn.ModuleDict({"deep": nn.Sequential(model)})["deep"])
    assert find_topology(wrapper).model is model
    x = images(CASES["vit-class"])
    assert torch.allclose(rule(wrapper, "evidence", x, targets(2)).grid, rule(model, "evidence", x, targets(2)).grid)


def test_models_side_by_side_are_refused():
    with pytest.raises(UnsupportedModelError, match="2 transformers side by side"):
        find_topology(_Wrapper(_tiny_vit(), _tiny_swin()))


def test_one_of_two_can_be_named():
    one, two = _tiny_vit(), _tiny_vit()
    method = LNStatAttribution(lambda x: one(x) + two(x).detach() * 0, one, rule="evidence")
    x = torch.randn(1, 3, 16, 16)
    assert torch.allclose(method.relevance(x, 1), LNStatAttribution(one, rule="evidence").relevance(x, 1))


@pytest.mark.parametrize("make", [_tiny_vit, _tiny_swin])
def test_a_block_that_is_compiled_alone_is_read_as_it_was(make):
    model, x = make(), torch.randn(1, 3, 16, 16)
    expected = LNStatAttribution(model).relevance(x, 1)
    blocks = model.blocks if hasattr(model, "blocks") else model.layers[0].blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    assert torch.equal(LNStatAttribution(model).relevance(x, 1), expected)


def test_families():
    assert isinstance(find_topology(_tiny_vit()), PlainTopology)
    assert isinstance(find_topology(_tiny_swin()), WindowedTopology)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 4), nn.Sequential(), timm.create_model("resnet18"), nn.TransformerEncoderLayer(8, 2)],
    ids=["linear", "nothing", "resnet", "encoder layer"],
)
def test_other_models_are_refused_in_words(model):
    with pytest.raises(UnsupportedModelError, match="not a vision transformer of a known family") as error:
        find_topology(model)
    assert type(model).__name__ in str(error.value)


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_a_rollout_of_poolings_without_a_start_is_refused(pool):
    for model in (_tiny_vit(global_pool=pool), _tiny_swin(global_pool=pool)):
        with pytest.raises(UnsupportedModelError, match="neither as their mean"):
            LNStatAttribution(enliven(model, 0), rule="rollout").relevance(torch.randn(1, 3, 16, 16), 1)


def test_two_attentions_in_a_block_are_refused():
    model = _tiny_vit(attn_layer="diff", num_heads=2)
    with pytest.raises((UnsupportedModelError, RecordingError)):
        LNStatAttribution(model).relevance(torch.randn(1, 3, 16, 16), 1)


@pytest.mark.parametrize("make", [_tiny_vit, _tiny_swin])
def test_rms_norms_are_read_as_what_they_are(make):
    """The oracle is in ``test_rms``; here, completeness, and the share of a child in what the merging divides by."""
    model, x = make(norm_layer=RmsNorm).eval(), torch.randn(2, 3, 16, 16)
    evidence = LNStatAttribution(model, rule="evidence")
    _, delta = evidence.attribute(x, 1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4
    trace = run(model, model, x).trace
    assert not any(block.centred for block in trace.blocks)
    for merging in (step for step in trace.steps if isinstance(step, Merging)):
        children = merging.below.gather(merging.before).unflatten(0, (2, -1))
        squares = children.square().sum(-1)
        torch.testing.assert_close(merging.shares("variance"), squares / squares.sum(-1, keepdim=True))


@pytest.mark.filterwarnings("ignore:.*train mode")
def test_dropped_patches_are_refused():
    model = _tiny_vit(patch_drop_rate=0.5).train()
    with pytest.raises(RecordingError, match="patch dropout"):
        LNStatAttribution(model, rule="rollout").relevance(torch.randn(1, 3, 16, 16))


class _OtherWiring(nn.Module):
    """A block with a block's parts, wired as neither pre-norm nor post-norm."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class _Parallel(_OtherWiring):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


# In _Parallel norm2 reads the stream before the attention's update: there is nothing between the two.
@pytest.mark.parametrize("wiring", [_OtherWiring, _Parallel])
def test_blocks_of_another_wiring_are_refused(wiring):
    model = _tiny_vit()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wiring(block)
    for name in ("rollout", "evidence", "gradient"):
        with pytest.raises(RecordingError):
            rule(model, name, torch.randn(1, 3, 16, 16), targets(1))


@pytest.fixture
def _families(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))


@pytest.mark.usefixtures("_families")
def test_a_registered_family_is_asked_first():
    @register_topology
    class Mine(PlainTopology):
        family = "mine"

    model = _tiny_vit()
    assert find_topology(model).family == "mine"
    assert issubclass(Mine, Topology)
    assert find_topology(_tiny_swin()).family == "windowed"
    with pytest.raises(UnsupportedModelError, match="mine: "):
        find_topology(nn.TransformerEncoderLayer(8, 2))
    found = explain(LNStatAttribution(enliven(model, 0), rule="rollout"), torch.randn(1, 3, 16, 16))
    assert float(found.total) == pytest.approx(1, abs=1e-5)


def test_what_was_found_in_a_model_is_asked_once(monkeypatch):
    asked: list[nn.Module] = []
    matches = WindowedTopology.matches.__func__
    monkeypatch.setattr(
        WindowedTopology, "matches", classmethod(lambda cls, model: asked.append(model) or matches(cls, model))
    )
    model, x = _tiny_swin(), torch.randn(1, 3, 16, 16)
    method = LNStatAttribution(model, rule="rollout")
    first = method.relevance(x)
    count = len(asked)
    assert count > 0
    assert torch.equal(method.relevance(x), first)
    assert len(asked) == count


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "blocks", nn.Sequential(nn.Identity())),
        lambda model: model.blocks[0].register_module("attn", nn.Linear(8, 8)),
        lambda model: delattr(model.blocks[0].attn, "num_heads"),
        lambda model: model.blocks[1].add_module("more", nn.LayerNorm(8)),
        lambda model: setattr(model, "norm", nn.BatchNorm1d(8)),
    ],
)
def test_what_was_found_in_a_model_is_looked_for_again_when_it_is_changed(change):
    model, twin = _tiny_vit(), _tiny_vit()
    assert find_topology(model).family == "plain"
    for one in (model, twin):
        change(one)

    def outcome(one: nn.Module) -> str:
        try:
            return find_topology(one).family
        except UnsupportedModelError as error:
            return str(error).splitlines()[0]

    assert outcome(model) == outcome(twin)


def test_a_model_that_was_explained_can_be_freed():
    model = enliven(_tiny_vit(), 0)  # as it is initialised no attention adds more to the class token than float error
    LNStatAttribution(model, rule="rollout").relevance(torch.randn(1, 3, 16, 16))
    gone = weakref.ref(model)
    assert model in registry._seen
    del model
    gc.collect()
    assert gone() is None


def test_registrations_of_a_test_are_gone_after_it():
    assert find_topology(_tiny_vit()).family == "plain"
