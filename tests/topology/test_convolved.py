"""GCViT: windows without shift, global queries, convolutions before and between the stages."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from helpers.models import CLASSES, OPTIONS, Case, enliven, images, targets
from helpers.oracles import Answer, Capture, DenseMerging, _Echo
from helpers.swin_oracle import Library, SwinDense
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn
from torch.nn import functional as F

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.attribution.base import explain_batch
from captum_lnstat.rules.engine import run
from captum_lnstat.rules.relevance import Relevance
from captum_lnstat.topology import ConvolvedTopology, find_topology

RULES = ("rollout", "evidence", "lnstat", "gradient")
SIZES = {"square": (64, 64), "non-square": (64, 128), "layer-scale": (64, 64), "other-size": (128, 96)}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    options: dict[str, Any] = {"img_size": SIZES[name], "window_size": (4, 4, 2)}
    if name == "non-square":
        options = {"img_size": (64, 128), "window_size": None, "window_ratio": 16}
    elif name == "layer-scale":
        options |= {"layer_scale": 0.5}
    elif name == "other-size":
        options = {"img_size": (128, 96), "window_size": None, "window_ratio": (32, 32, 16)}
    settings = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "mlp_ratio": 2.0, "num_classes": CLASSES}
    with torch.random.fork_rng():
        model = GlobalContextVit(**{**settings, **options})
    return enliven(model, 0).to(dtype)


def show(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return images(Case(name, nn.Identity, SIZES[name], (0, 0), (4, 4), "patches"), batch, dtype=dtype)


def explain(model: nn.Module, rule: str, x: Tensor, target: Tensor) -> Relevance:
    method = LNStatAttribution(model, rule=rule, **{**OPTIONS})  # type: ignore[arg-type]
    return explain_batch(method, x, [None if rule == "rollout" else target])[1]


class _Gc(Library):
    post = False

    def steps(self, model: Any) -> list[Any]:
        steps = [step for stage in model.stages for step in (stage.downsample, *stage.blocks)]
        return [step for step in steps if not isinstance(step, nn.Identity)]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def out(self, block: Any) -> nn.Linear:
        return block.attn.proj

    def scale(self, block: Any) -> Tensor | None:
        return getattr(block.ls1, "gamma", None)

    def values(self, block: Any, x: Tensor) -> Tensor:
        size = x.shape[-1]
        return F.linear(x, block.attn.qkv.weight[-size:], block.attn.qkv.bias[-size:])

    def window_ids(self, block: Any, grid: tuple[int, int], batch: int) -> Tensor:
        ids = torch.arange(1, batch * grid[0] * grid[1] + 1, dtype=torch.float64).reshape(batch, *grid, 1)
        double = copy.deepcopy(block)
        double.attn = _Echo()
        assert torch.equal(double._window_attn(ids), ids)
        return double.attn.seen[..., 0].long()

    def merging_ids(self, merging: Any, grid: tuple[int, int]) -> Tensor:
        # A strided convolution halves the grid: under token (i, j) lie (2i, 2j) and its neighbours right and below.
        parents = [(2 * i, 2 * j) for i in range((grid[0] + 1) // 2) for j in range((grid[1] + 1) // 2)]
        places = [[(i + k, j + m) for k in (0, 1) for m in (0, 1)] for i, j in parents]
        return torch.tensor(
            [[i * grid[1] + j if i < grid[0] and j < grid[1] else -1 for i, j in place] for place in places]
        )

    def end(self, model: Any, capture: Capture) -> Tensor:
        return capture.outputs[model.stages[-1].blocks[-1]]

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.head.fc(model.stages[-1].norm(tokens).mean((1, 2)))


class _GcDense(SwinDense):
    def _merging(self, module: Any) -> DenseMerging:
        ids = self.library.merging_ids(module, self._grid)
        self._grid = (self._grid[0] + 1) // 2, (self._grid[1] + 1) // 2
        nothing = torch.zeros(())
        return DenseMerging(ids, self.capture.inputs[module].flatten(2).mT, nothing, nothing, nothing)

    def evidence(self, target: Tensor, **_: Any) -> Answer:  # type: ignore[override]
        """The last stage's own, found on its tokens, then rolled down by the relations of the stages below."""
        steps = self.steps
        last = max(place for place, step in enumerate(steps) if isinstance(step, DenseMerging))
        try:
            self.steps = steps[last + 1 :]
            found = super().evidence(target)
            self.steps = steps[: last + 1]
            row = F.pad(found.tokens, (0, 1))[:, None]
            for relation in reversed(self.relations("deviation", "deviation", "uniform")):
                row = row @ relation
        finally:
            self.steps = steps
        return Answer(row[:, 0, :-1], row[:, 0, -1] + found.padding, found.constant)


@cache
def oracle(name: str) -> _GcDense:
    height, width = SIZES[name]
    dense = _GcDense(_Gc(), build(name), show(name), (height // 4, width // 4), graph=True)
    found = dense.liveliness
    assert found["share spread"] > 0.3
    assert found["lowest relative entropy"] < 0.9
    assert found["logit spread"] > 0.3
    return dense


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("rule", ["rollout", "evidence", "gradient"])
def test_rules_are_the_dense_products(name, rule):
    target, dense = targets(2), oracle(name)
    options = {"normalize": True} if rule == "gradient" else {}
    expected = dense.rollout() if rule == "rollout" else getattr(dense, rule)(target, **options)
    found = explain(build(name), rule, show(name), target)
    grid, _ = expected.split(dense.case)
    grid = grid.detach()
    assert float((found.grid - grid).abs().max()) <= 1e-9 * float(grid.abs().max())
    if rule == "evidence":
        assert torch.allclose(found.constant, expected.constant)


@pytest.mark.parametrize("name", SIZES)
def test_recognised_and_what_it_covers(name):
    model, x = build(name), show(name)
    assert isinstance(find_topology(nn.Sequential(nn.Identity(), model)), ConvolvedTopology)
    description = LNStatAttribution(model).describe(x)
    assert description.grid == (x.shape[2] // 4, x.shape[3] // 4)
    assert description.patch == (4, 4)
    assert [step.kind for step in description.steps].count("transition") == 2
    assert description.pooling == "mean of the tokens"
    covers = run(model, model, x).trace.covers
    assert "convolutions" in covers
    assert f"{x.shape[2] // 16} x {x.shape[3] // 16} tokens" in covers


@pytest.mark.parametrize("name", SIZES)
def test_mass_and_evidence_add_up_in_float32(name):
    model, x, target = build(name, torch.float32), show(name, 3, torch.float32), targets(3)
    assert float((explain(model, "rollout", x, target).total - 1).abs().max()) <= 1e-5
    with torch.no_grad():
        logits = model(x).gather(1, target[:, None])[:, 0]
    error = (explain(model, "evidence", x, target).total - logits).abs()
    assert bool((error <= 1e-4 * logits.abs().clamp(min=1)).all())


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_its_images_one_by_one(rule):
    model, x, target = build("square"), show("square", 3), targets(3)
    whole = explain(model, rule, x, target).grid
    single = torch.cat([explain(model, rule, x[i : i + 1], target[i : i + 1]).grid for i in range(3)])
    assert torch.allclose(whole, single, rtol=1e-6, atol=1e-7 * float(whole.abs().max()))
    assert all(len(grid.unique()) > 1 for grid in whole)


def test_subclasses_under_other_names_are_the_same():
    model, x, target = build("square"), show("square"), targets(2)
    expected = explain(model, "lnstat", x, target).grid
    for number, module in enumerate(model.modules()):
        if type(module).__module__.startswith("timm.models"):
            module.__class__ = type(f"Mine{number}", (type(module),), {})
    assert torch.equal(explain(model, "lnstat", x, target).grid, expected)


class _OtherWindows(nn.Module):
    """A block that reads its map upside down."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.window_size = block.window_size
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.partition = [block]

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        x = x + self.partition[0]._window_attn(self.norm1(x).roll(1, 1), q).roll(-1, 1)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("rule", RULES)
def test_windows_of_ones_own_are_refused(rule, monkeypatch):
    model, x, target = build("square"), show("square"), targets(2)
    model.stages[0].blocks[1] = _OtherWindows(model.stages[0].blocks[1])
    with pytest.raises(UnsupportedModelError, match="tokens are moved"):
        explain(model, rule, x, target)
    # And if the values had not been followed:
    monkeypatch.setattr("captum_lnstat.rules.engine.check_own_values", lambda *_: None)
    with pytest.raises(RecordingError, match="wiring"):
        explain(model, rule, x, target)


def test_another_pooling_is_refused():
    model, x, target = build("square"), show("square"), targets(2)
    model.reset_classifier(CLASSES, "max")
    with pytest.raises(UnsupportedModelError, match="neither as their mean"):
        explain(enliven(model, 0).double(), "rollout", x, target)


def test_a_stage_that_does_not_halve_the_grid_is_refused():
    model, x, target = build("square"), show("square"), targets(2)
    model.stages[2].downsample.reduction.stride = (1, 1)
    model.stages[2].global_block = nn.AdaptiveAvgPool2d(2)  # queries as many as a window has places
    with pytest.raises(UnsupportedModelError, match="half as many"):
        explain(model, "rollout", x, target)
