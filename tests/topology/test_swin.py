"""Swin v1 and v2 of torchvision and of Hugging Face, timm's SwinV2-CR: partition codes, names, norms of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers.choices import pairwise
from helpers.contract import lively
from helpers.models import CLASSES, OPTIONS, Case, enliven, images, targets
from helpers.oracles import Dense
from helpers.swin_oracle import HuggingFace, Library, SwinDense, TimmCr, Torchvision
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn
from torchvision.models import swin_transformer as torchvision_swin

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.attribution.base import explain_batch, record
from captum_lnstat.layout import Groups
from captum_lnstat.rules.engine import run
from captum_lnstat.rules.relevance import Relevance
from captum_lnstat.topology import WindowedTopology, find_topology
from captum_lnstat.trace.trace import Trace

transformers = pytest.importorskip("transformers", reason="Hugging Face models need transformers")

RULES = ("rollout", "evidence", "lnstat", "gradient")


def _torchvision(version: int, **options: Any) -> nn.Module:
    settings = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    if version == 2:
        settings |= {
            "block": torchvision_swin.SwinTransformerBlockV2,
            "downsample_layer": torchvision_swin.PatchMergingV2,
        }
    settings |= {"mlp_ratio": 2.0, "stochastic_depth_prob": 0.0, "num_classes": CLASSES, **options}
    return torchvision_swin.SwinTransformer(**settings)


def _hf_config(version: int, **options: Any) -> Any:
    config = transformers.SwinConfig if version == 1 else transformers.Swinv2Config
    settings = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    settings |= {"window_size": 4, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "num_labels": CLASSES}
    return config(**{**settings, **options})


def _hugging_face(version: int, **options: Any) -> nn.Module:
    config = _hf_config(version, **options)
    kind = transformers.SwinForImageClassification if version == 1 else transformers.Swinv2ForImageClassification
    return kind(config)


@dataclass(frozen=True)
class Model:
    """A model to build and the images it is shown.

    Attributes:
        exact: Attention is computed in float64; Hugging Face's eager softmax is always in float32.
    """

    name: str
    library: Library
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    exact: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def grid(self) -> tuple[int, int]:
        rows = (-(-side // 4) if isinstance(self.library, HuggingFace) else side // 4 for side in self.size)
        return next(rows), next(rows)


def _models() -> list[Model]:
    found, three = [], {"depths": [2, 2, 2], "num_heads": [2, 4, 4]}
    for version in (1, 2):
        library: Library = Torchvision(post=version == 2)
        make = partial(_torchvision, version)
        found += [
            Model(f"torchvision-{version}", library, make, (64, 64)),
            Model(f"torchvision-{version}-flat-windows", library, partial(make, window_size=[3, 5]), (48, 64)),
            # Grids 9 x 13, 5 x 7, 3 x 4: padded windows, odd mergings, windows that cover one axis or both.
            Model(f"torchvision-{version}-odd", library, partial(make, **three), (36, 52)),
            Model(f"torchvision-{version}-rest", library, partial(make, window_size=[7, 7]), (67, 33)),
        ]
    for version, kind in ((1, "sdpa"), (1, "eager"), (2, "eager")):
        library, exact = HuggingFace(post=version == 2), (version, kind) != (1, "eager")
        make = partial(_hugging_face, version, attn_implementation=kind)
        name = f"hf-{version}-{kind}"
        found += [
            Model(name, library, partial(make, image_size=64), (64, 64), exact),
            # Grids 14 x 17, 7 x 9, 4 x 5; the image is not whole patches.
            Model(f"{name}-odd", library, partial(make, image_size=(54, 66), **three), (54, 66), exact),
            Model(f"{name}-larger", library, partial(make, window_size=3), (52, 39), exact),
        ]
    cr = partial(SwinTransformerV2Cr, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=CLASSES, mlp_ratio=2.0)
    found += [
        Model("timm-cr", TimmCr(), partial(cr, img_size=64, window_size=4), (64, 64)),
        # A norm after every stage, and one after every block; grids 18 x 13, 9 x 7, 5 x 4.
        Model(
            "timm-cr-norms-odd",
            TimmCr(),
            partial(cr, img_size=64, window_size=4, extra_norm_stage=True, strict_img_size=False, **three),
            (72, 52),
        ),
        Model(
            "timm-cr-norms-flat",
            TimmCr(),
            partial(cr, img_size=(72, 48), window_size=(3, 4), extra_norm_period=1),
            (72, 48),
        ),
    ]
    return found


MODELS = {model.name: model for model in _models()}
ONE_EACH = [
    "torchvision-1-odd",
    "torchvision-2-odd",
    "hf-1-sdpa-odd",
    "hf-1-eager-odd",
    "hf-2-eager-odd",
    "timm-cr-norms-odd",
]


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    with torch.random.fork_rng():
        model = MODELS[name].build()
    return enliven(model, 0).to(dtype)


def show(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return images(Case(name, nn.Identity, MODELS[name].size, (0, 0), (4, 4), "patches"), batch, dtype=dtype)


def scores(model: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        output = model(x)
        return output if isinstance(output, Tensor) else output.logits

    return forward


def explain(model: Any, rule: str, x: Tensor, target: Tensor, **options: Any) -> Relevance:
    method = LNStatAttribution(scores(model), model, rule=rule, **{**OPTIONS, **options})  # type: ignore[arg-type]
    return explain_batch(method, x, [None if rule == "rollout" else target])[1]


def trace_of(model: Any, x: Tensor) -> Trace:
    return run(scores(model), model, x).trace


@cache
def oracle(name: str) -> SwinDense:
    case = MODELS[name]
    dense = SwinDense(case.library, build(name), show(name), case.grid, graph=True)
    dense.assert_lively()
    return dense


# Against dense matrices.


@pytest.mark.parametrize(
    ("name", "rule", "merging"), pairwise(MODELS, ["rollout", "evidence", "gradient"], ["uniform", "variance"])
)
def test_rules_are_the_dense_products(name, rule, merging):
    target, dense = targets(2), oracle(name)
    # A row of hardly any positive gradient, divided by its sum, is mostly the float error of a softmax in float32.
    normalized = MODELS[name].exact
    with nullcontext() if rule == "gradient" else torch.no_grad():
        arguments = () if rule == "rollout" else (target,)
        options = {"normalize": normalized} if rule == "gradient" else {}
        expected = getattr(dense, rule)(*arguments, merging=merging, **options)
    options = {"normalized": normalized} if rule == "gradient" else {}
    found = explain(build(name), rule, show(name), target, merging=merging, **options)
    grid, _ = expected.split(dense.case)
    tolerance = (1e-9 if MODELS[name].exact else 1e-6) * float(grid.abs().max())
    assert found.grid.shape == grid.shape
    assert float((found.grid - grid).abs().max()) <= tolerance
    assert float((found.padding - expected.padding).abs().max()) <= 10 * tolerance
    if rule == "evidence":
        assert torch.allclose(found.constant, expected.constant, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_those_of_the_blocks_as_they_ran(name):
    case, model, padded = MODELS[name], build(name), 0
    trace, grid = trace_of(model, show(name)), case.grid
    blocks = {block.name: block for block in trace.blocks}
    names = {id(module): dotted for dotted, module in find_topology(model).model.named_modules()}
    for step in case.library.steps(model):
        if hasattr(step, "reduction"):
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
            continue
        expected = case.library.window_ids(step, grid, 1) - 1
        layout = blocks.pop(names[id(step)]).layout
        assert isinstance(layout, Groups)
        assert torch.equal(layout.index, expected)
        padded += int((expected < 0).sum())
    assert not blocks
    assert padded > 0 or name in (
        "torchvision-1",
        "torchvision-2",
        "hf-1-sdpa",
        "hf-1-eager",
        "hf-2-eager",
        "timm-cr",
        "timm-cr-norms-flat",
    )


# What holds for every family.


@pytest.mark.parametrize("name", MODELS)
def test_recognised(name):
    case, model = MODELS[name], build(name)
    topology = find_topology(model)
    assert isinstance(topology, WindowedTopology)
    description = LNStatAttribution(scores(model), model).describe(show(name))
    assert (description.family, description.grid, description.patch) == ("windowed", case.grid, (4, 4))
    assert description.prefix_tokens == 0
    kinds = [step.kind for step in description.steps]
    assert kinds.count("merging") == len(case.library.steps(model)) - kinds.count("attention")
    trailing = [case.library.trailing(step) for step in case.library.steps(model)]
    assert kinds.count("transition") == sum(norm is not None for norm in trailing)
    assert description.pooling == "mean of the tokens"


@pytest.mark.parametrize("name", MODELS)
def test_mass_and_evidence_add_up_in_float32(name):
    model, x, target = build(name, torch.float32), show(name, 3, torch.float32), targets(3)
    assert float((explain(model, "rollout", x, target).total - 1).abs().max()) <= 1e-5
    with torch.no_grad():
        logits = scores(model)(x).gather(1, target[:, None])[:, 0]
    error = (explain(model, "evidence", x, target).total - logits).abs()
    assert bool((error <= 1e-4 * logits.abs().clamp(min=1)).all())


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_its_images_one_by_one(name, rule):
    model, x, target = build(name), show(name, 3), targets(3)
    whole = explain(model, rule, x, target).grid
    single = torch.cat([explain(model, rule, x[i : i + 1], target[i : i + 1]).grid for i in range(3)])
    assert torch.allclose(whole, single, rtol=1e-6, atol=1e-7 * float(whole.abs().max()))
    assert all(len(grid.unique()) > 1 for grid in whole)


@pytest.mark.parametrize("name", ONE_EACH)
def test_attributions_are_input_shaped(name):
    model, x = build(name, torch.float32), show(name, 2, torch.float32)
    method = LNStatAttribution(scores(model), model)
    attributions, grid = method.attribute(x, target=1), method.relevance(x, target=1)
    assert attributions.shape == x.shape
    assert torch.allclose(attributions.sum((1, 2, 3)), grid.sum((1, 2)), rtol=1e-4)


# Structure, not names.


@pytest.mark.parametrize("name", ONE_EACH)
def test_subclasses_under_other_names_are_the_same(name):
    model, x, target = build(name), show(name), targets(2)
    expected = explain(model, "lnstat", x, target).grid
    for number, module in enumerate(model.modules()):
        if type(module).__module__.startswith(("torchvision.models", "transformers.models")):
            module.__class__ = type(f"Mine{number}", (type(module),), {})
    assert torch.equal(explain(model, "lnstat", x, target).grid, expected)


class _OwnHead(nn.Module):
    """A user's classifier on the pooled output of a bare model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.norm, self.classifier = body, nn.LayerNorm(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.body(x).pooler_output))


@pytest.mark.parametrize("version", [1, 2])
def test_a_bare_model_under_a_users_head(version):
    with torch.random.fork_rng():
        body = (transformers.SwinModel if version == 1 else transformers.Swinv2Model)(_hf_config(version))
        model = enliven(_OwnHead(body), 0).double()
    x, target = show("torchvision-1-odd"), targets(2)
    assert find_topology(model).model is body
    found = explain_batch(LNStatAttribution(model, rule="evidence", **{**OPTIONS}), x, [target])[1]
    with torch.no_grad():
        logits = model(x).gather(1, target[:, None])[:, 0]
    # Its norm reads the pooled token: not affine, so what it leaves out is in the constant.
    assert torch.allclose(found.total, logits, rtol=1e-9)


def test_a_window_that_a_small_image_has_changed_for_good():
    """Hugging Face's Swin drops the shift of a block for good once an image fits into its window."""
    model, x, target = build("hf-1-sdpa"), show("hf-1-sdpa"), targets(2)
    before = [block.shift_size for block in HuggingFace(post=False).steps(model) if hasattr(block, "shift_size")]
    model(x[..., :32, :32])
    after = [block.shift_size for block in HuggingFace(post=False).steps(model) if hasattr(block, "shift_size")]
    assert before == [0, 2, 0, 2]
    assert after == [0, 2, 0, 0]
    dense = SwinDense(HuggingFace(post=False), model, x, (16, 16))
    expected, _ = dense.evidence(target).split(dense.case)
    assert torch.allclose(explain(model, "evidence", x, target).grid, expected)


def test_a_position_bias_as_wide_as_the_stream_is_not_taken_for_the_way_back():
    """torchvision's v2 makes its bias with a Linear of 512 outputs; so wide is the stream of a stage, too."""
    model = enliven(_torchvision(2, embed_dim=512, depths=[2], num_heads=[4]), 0).double()
    x, target = show("torchvision-2")[:, :, :16, :16], targets(2)
    dense = SwinDense(Torchvision(post=True), model, x, (4, 4))
    expected, _ = dense.evidence(target).split(dense.case)
    assert torch.allclose(explain(model, "evidence", x, target).grid, expected)


# What is not understood is refused.


class _OtherWay(torchvision_swin.ShiftedWindowAttention):
    """Rolls the other way."""

    def forward(self, x: Tensor) -> Tensor:
        shift, self.shift_size = self.shift_size, [-side for side in self.shift_size]
        try:
            rolled = torch.roll(x, (2 * shift[0], 2 * shift[1]), (1, 2))
            self.shift_size = shift
            return torch.roll(super().forward(rolled), (-2 * shift[0], -2 * shift[1]), (1, 2))
        finally:
            self.shift_size = shift


@pytest.mark.parametrize("rule", RULES)
def test_a_partition_of_ones_own_is_refused(rule, monkeypatch):
    model, x, target = build("torchvision-1-odd"), show("torchvision-1-odd"), targets(2)
    model.features[1][1].attn.__class__ = _OtherWay
    with pytest.raises(UnsupportedModelError, match="tokens are moved"):
        explain(model, rule, x, target)
    # And if the values had not been followed:
    monkeypatch.setattr("captum_lnstat.rules.engine.check_own_values", lambda *_: None)
    with pytest.raises(RecordingError, match="wiring"):
        explain(model, rule, x, target)


def _swin_s3(**options: Any) -> SwinTransformer:
    """As ``swin_s3_tiny_224``: windows of another size in every stage."""
    settings = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "window_size": (4, 8, 3)}
    return SwinTransformer(**{**settings, "num_classes": CLASSES, **options})


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)),
        ({"strict_img_size": False}, (68, 52)),
        ({"strict_img_size": False, "always_partition": True, "window_size": 7}, (72, 52)),
    ],
)
def test_windows_of_another_size_in_every_stage(options, size):
    with torch.random.fork_rng():
        model = enliven(_swin_s3(**options), 0).double()
    case = Case("s3", nn.Identity, size, (size[0] // 4, size[1] // 4), (4, 4), "patches")
    x, target = images(case), targets(2)
    dense = Dense(case, model, x)
    for rule, expected in (("rollout", dense.rollout()), ("evidence", dense.evidence(target))):
        grid, _ = expected.split(case)
        assert torch.allclose(explain(model, rule, x, target).grid, grid, rtol=1e-9, atol=1e-12)


def _bare(pooling: bool) -> Any:
    with torch.random.fork_rng():
        return enliven(transformers.SwinModel(_hf_config(1), add_pooling_layer=pooling), 0).double()


@pytest.mark.parametrize("rule", RULES)
def test_a_mean_over_the_tokens_of_a_model_without_pooling(rule):
    x, target, model, pooled = show("torchvision-1-odd"), targets(2), _bare(False), _bare(True)
    found = LNStatAttribution(lambda x: model(x).last_hidden_state.mean(1), model, rule=rule).relevance(x, target)
    expected = LNStatAttribution(lambda x: pooled(x).pooler_output, pooled, rule=rule).relevance(x, target)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_another_pooling_has_no_start_for_every_class():
    x, target, model = show("torchvision-1-odd"), targets(2), _bare(True)

    def largest(x: Tensor) -> Tensor:
        return model(x).last_hidden_state.amax(1)

    with pytest.raises(UnsupportedModelError, match="neither as their mean"):
        LNStatAttribution(largest, model, rule="rollout").relevance(x, target)
    evidence = LNStatAttribution(largest, model, rule="evidence")
    _, delta = evidence.attribute(x, target=target, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-9


def test_a_rollout_needs_no_graph_where_the_pooling_is_known():
    x, model = show("torchvision-1-odd"), _bare(True)
    found = LNStatAttribution(lambda x: model(x).pooler_output.detach(), model, rule="rollout").relevance(x)
    assert torch.allclose(
        found, LNStatAttribution(lambda x: model(x).pooler_output, model, rule="rollout").relevance(x)
    )
    bare = _bare(False)
    with pytest.raises(UnsupportedModelError, match="average pooling"):
        LNStatAttribution(lambda x: bare(x).last_hidden_state.mean(1).detach(), bare, rule="rollout").relevance(x)


def test_a_convolution_between_the_blocks_is_refused():
    model, x, target = build("torchvision-1"), show("torchvision-1"), targets(2)
    model.features[2] = nn.Sequential(nn.Linear(16, 16).double(), model.features[2])
    with pytest.raises(RecordingError, match="does not read what the step before it returned"):
        explain(model, "rollout", x, target)


@pytest.mark.parametrize("seed", [0, 1])
def test_stochastic_depth_of_post_norm_blocks_is_followed(seed):
    """What was let through of each update is seen, so that evidence of a pass in train mode adds up, too."""
    model, x = lively(_torchvision(2, stochastic_depth_prob=0.5)).train(), torch.randn(3, 3, 32, 48)
    torch.manual_seed(seed)
    with pytest.warns(UserWarning, match="train mode"):
        outcome, relevance = explain_batch(LNStatAttribution(model, rule="evidence"), x, [1])
    blocks = outcome.trace.blocks
    kept = torch.stack([block.attention_update.abs().amax((1, 2)) for block in blocks]) > 1e-5
    assert bool(kept.any())
    assert not bool(kept.all())
    torch.testing.assert_close(relevance.total, outcome.score, rtol=1e-4, atol=1e-4)


def test_the_share_of_a_normalised_update():
    """No LayerNorm reads the stream of a post-norm block: the ratio is of the variances of stream and update."""
    model, x = lively(_torchvision(2)), torch.randn(1, 3, 32, 48)
    method = LNStatAttribution(model)
    for block in record(method, x, [1]).trace.blocks:
        own, update = (t.var(-1, correction=0) for t in (block.before, block.between - block.before))
        torch.testing.assert_close(block.residual_share("ratio"), own / (own + update))
