"""What cannot be explained is refused, by name, and nothing is left behind; nothing wrong is ever drawn."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.choices import pairwise
from helpers.contract import CLASS_AGNOSTIC, EVERY_METHOD, METHODS, WITH_A_GRAPH, images, lively, swin, untouched, vit
from helpers.oracles import Frozen
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError

REFUSED = (RecordingError, UnsupportedModelError)
Make = Callable[..., Any]


# What is wrong with a call is seen before the model is looked at: every method with every mistake, on one model or the
# other.
MODELS = (vit, swin)
BAD_INPUTS: list[tuple[Any, type[Exception], str]] = [
    (images()[0], ValueError, r"shape \(3, 32, 32\); expected \(batch, channels, height, width\)"),
    (images()[None], ValueError, r"expected \(batch, channels, height, width\)"),
    (torch.randn(2, 32), ValueError, "expected"),
    (images()[:0], ValueError, "at least one image"),
    (images(1).mul(torch.nan), ValueError, "NaN or infinite"),
    (images(1).masked_fill(images(1) > 2, torch.inf), ValueError, "NaN or infinite"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"torch\.uint8; expected a floating-point image"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), TypeError, "floating-point"),
    (images(1).to_sparse(), TypeError, r"torch\.sparse_coo tensor; expected a dense one"),
    (images(1).to("meta"), TypeError, "meta tensor; expected a dense one"),
    (
        torch.nested.nested_tensor([*images()], layout=torch.jagged),
        TypeError,
        "nested tensor; expected a dense one",
    ),
    ([images(1)], TypeError, "list; expected a torch.Tensor or a tuple"),
    (images(1).numpy(), TypeError, "ndarray; expected a torch.Tensor or a tuple"),
    (None, TypeError, "NoneType"),
    ((), ValueError, "tuple of 0"),
    ((images(1), images(1)), ValueError, "tuple of 2; expected one image batch"),
    ((images(1).numpy(),), TypeError, "ndarray"),
]


@pytest.mark.parametrize(
    ("make", "number", "model"), pairwise(METHODS, range(len(BAD_INPUTS)), MODELS), indirect=["make", "model"]
)
def test_wrong_inputs(model: nn.Module, make: Make, number: int) -> None:
    inputs, error, message = BAD_INPUTS[number]
    with untouched(model), pytest.raises(error, match=message):
        make(model).attribute(inputs, target=1)
    with untouched(model), pytest.raises(error, match=message):
        make(model).relevance(inputs, target=1)


def test_describe_takes_the_same_inputs(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="tuple of 2"):
        LNStatAttribution(model).describe((images(1), images(1)))


@pytest.mark.parametrize(
    ("make", "model", "height", "width"),
    pairwise(METHODS, MODELS, [(16, 16), (40, 40), (32, 64)]),
    indirect=["make", "model"],
)
def test_wrong_size_and_channels(model: nn.Module, make: Make, height: int, width: int) -> None:
    image = images(1, (height, width))
    with untouched(model, image), pytest.raises(ValueError, match=f"inputs are {height} x {width} .* takes .32, 32."):
        make(model).attribute(image, target=1)
    with untouched(model), pytest.raises(ValueError, match="inputs have 1 channels; the model takes 3"):
        make(model).attribute(images(1, channels=1), target=1)


BAD_TARGETS: list[tuple[Any, type[Exception], str]] = [
    # Said before the class is looked up: on a GPU that would end the process.
    (5, IndexError, "target 5 is none of the 5 classes that forward_func scores: index 5 is out of bounds"),
    (-6, IndexError, "target -6 is none of the 5 classes"),
    (np.int64(99), IndexError, "index 99"),
    ([1, 99], RuntimeError, "index 99 is out of bounds"),
    ([1, -1], RuntimeError, "target -1 is none of the 5 classes"),
    ([1, 5], RuntimeError, "target 5 is none of the 5 classes"),
    (torch.tensor([1, 99]), RuntimeError, "index 99 is out of bounds"),
    ([1], AssertionError, "length does not match"),
    ([], AssertionError, "length does not match"),
    ([1, 2, 3], AssertionError, "length does not match"),
    (torch.tensor([1, 2, 3]), AssertionError, "is not valid"),
    (torch.tensor([[1], [2]]), AssertionError, "is not valid"),
    (torch.tensor([1.0, 2.0]), RuntimeError, "Expected dtype int32/int64"),
    (torch.tensor(1.0), AssertionError, "is not valid"),
    (1.0, AssertionError, "Target type <class 'float'> is not valid"),
    ("1", AssertionError, "Target type <class 'str'> is not valid"),
    (np.array([1, 2]), AssertionError, "is not valid"),
    ((1, 2), AssertionError, "Cannot choose target column"),
    ((9999,) * 20, AssertionError, "Cannot choose target column"),
]


@pytest.mark.parametrize(
    ("make", "number", "model"), pairwise(METHODS, range(len(BAD_TARGETS)), MODELS), indirect=["make", "model"]
)
def test_bad_targets(model: nn.Module, make: Make, number: int) -> None:
    image, (target, error, message) = images(), BAD_TARGETS[number]
    with untouched(model, image), pytest.raises(error, match=message):
        make(model).attribute(image, target=target)


@pytest.mark.parametrize("name", ["lnstat", "evidence", *WITH_A_GRAPH])
def test_no_target(model: nn.Module, name: str) -> None:
    with untouched(model), pytest.raises(AssertionError, match="Target not provided when necessary"):
        METHODS[name](model).attribute(images())
    for agnostic in ("rollout", "AttentionRollout"):
        method = METHODS[agnostic](model)
        assert torch.equal(method.attribute(images()), method.attribute(images(), target=1))


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("rule", ["lnstat", "evidence", "rollout", "gradient"]),
        ("residual", ["deviation", "update", "ratio", "half"]),
        ("head_fusion", ["deviation", "variance", "mean", "max", "min"]),
        ("merging", ["uniform", "variance"]),
        ("interpolation", ["bilinear", "nearest"]),
    ],
)
@pytest.mark.parametrize("value", ["nonsense", None, 3, [], {}, np.array(["mean", "ratio"])])
def test_constructor_names_the_options(model: nn.Module, option: str, names: list[str], value: Any) -> None:
    if option == "head_fusion" and value is None:
        pytest.skip("None is what the rule takes by itself")
    with pytest.raises(ValueError, match=option) as raised:
        LNStatAttribution(model, **{option: value})
    assert all(name in str(raised.value) for name in [*names, repr(value)])


def test_constructor_needs_the_model(model: nn.Module, make: Make) -> None:
    with pytest.raises(TypeError, match="model="):
        make(lambda x: model(x))
    with pytest.raises(TypeError):
        LNStatAttribution(model, None, "evidence")  # type: ignore[misc]


@pytest.mark.parametrize("forward_func", [None, "vit", 3])
def test_constructor_needs_a_function(model: nn.Module, make: Make, forward_func: Any) -> None:
    with pytest.raises(TypeError, match=f"forward_func is a {type(forward_func).__name__}"):
        make(forward_func, model)
    for wrong in ("vit", 3, lambda x: x, VisionTransformer):
        with pytest.raises(TypeError, match=f"model is a {type(wrong).__name__}; expected the module"):
            make(model, wrong)


@pytest.mark.parametrize("value", ["no", 0, 1, None, []])
@pytest.mark.parametrize("option", ["contrastive", "normalized"])
def test_switches_are_true_or_false(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{option} is {re.escape(repr(value))}; expected True or False"):
        LNStatAttribution(vit(), **{option: value})


@pytest.mark.parametrize("name", ["lnstat", "evidence", "GenericAttention", "FrozenLayerNorm", "LayerLNStat"])
def test_relevance_too_large_for_the_dtype_of_the_images(name: str) -> None:
    other = vit()
    method = EVERY_METHOD[name](lambda x: other(x) * 1e10, other)
    with untouched(other), pytest.raises(RecordingError, match=r"does not fit into torch\.float16"):
        method.attribute(images().half(), target=1)
    assert torch.isfinite(method.attribute(images(), target=1)).all()


def test_head_fusion_callable_is_checked(model: nn.Module) -> None:
    for fusion in (lambda a: a, lambda a: -a.mean(1), lambda a: None):
        with untouched(model), pytest.raises(ValueError, match="head_fusion callable"):
            LNStatAttribution(model, head_fusion=fusion).attribute(images(), target=1)


# Models of other families: never a wrong picture.


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_convnext",
        "levit_128s",
        "test_mambaout",
        "xcit_nano_12_p16_224",
    ],
)
def test_other_families_are_refused(name: str) -> None:
    options = {"depth": 2} if name.startswith("xcit") else {}
    other = timm.create_model(name, num_classes=5, **options).eval()
    image = images(1, other.default_cfg["input_size"][-1])
    for rule in ("lnstat", "rollout", "gradient"):
        with untouched(other, image), pytest.raises(REFUSED) as raised:
            LNStatAttribution(other, rule=rule).attribute(image, target=1)
    if raised.type is UnsupportedModelError:
        assert type(other).__name__ in str(raised.value)
        assert "to do: " in str(raised.value)


@pytest.mark.parametrize("pool", ["max", "avgmax", "prr"])
def test_a_pooling_without_a_start_is_refused_by_methods_that_need_one(pool: str, make: Make) -> None:
    method = make(vit(global_pool=pool))
    if method.method.class_specific:
        assert bool(method.relevance(images(), target=1).flatten(1).any(1).all())
    else:
        with pytest.raises(UnsupportedModelError, match="class-agnostic relevance starts is not defined"):
            method.attribute(images(), target=1)


def test_unpooled_output_is_refused(make: Make) -> None:
    with pytest.raises((UnsupportedModelError, ValueError, AssertionError)):
        make(vit(global_pool="")).attribute(images(), target=1)


@pytest.mark.parametrize("kind", [Eva, Beit])
@pytest.mark.parametrize("scale", [None, 0.1, 1.0])
def test_evidence_of_relatives_is_complete_or_refused(kind: type[nn.Module], scale: float | None) -> None:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    relative = lively(kind(**size, init_values=scale))
    evidence = LNStatAttribution(relative, rule="evidence")
    try:
        _, delta = evidence.attribute(images(), target=1, return_convergence_delta=True)
    except REFUSED:
        return
    assert delta.abs().max() <= 1e-4 * max(1.0, float(relative(images())[:, 1].detach().abs().max()))


class HalvedAttention(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + 0.5 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SecondResidual(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Parallel(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class NoResidual(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MlpFirst(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.mlp(self.norm1(x))
        return x + self.attn(self.norm2(x))


class Reversed(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.attn(self.norm1(x)).flip(1)
        return x + self.mlp(self.norm2(x))


class FlipBetween(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)
        return self.norm(x)


class LongSkip(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = begin = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x + begin)


class ExtraAttention(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
            q = x[:, None]
            x = x + nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
        return self.norm(x)


class GatedAttention(Attention):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        batch, count, channels = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) * torch.linspace(0, 1, count)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, count, channels))


class ChannelAttention(Attention):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        batch, count, channels = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(batch, count, channels))


WIRINGS: dict[str, dict[str, Any]] = {
    "halved attention": {"block_fn": HalvedAttention},
    "second residual": {"block_fn": SecondResidual},
    "parallel": {"block_fn": Parallel},
    "no residual": {"block_fn": NoResidual},
    "mlp first": {"block_fn": MlpFirst},
    "reversed": {"block_fn": Reversed},
    "flip between blocks": {"kind": FlipBetween},
    "extra attention": {"kind": ExtraAttention},
    "gate after the softmax": {"attn_layer": GatedAttention},
    "channel attention": {"attn_layer": ChannelAttention},
    "channel attention, square": {"attn_layer": ChannelAttention, "embed_dim": 34},
}


AFFINE_WIRINGS = (
    "halved attention",
    "second residual",
    "no residual",
    "mlp first",
    "reversed",
    "gate after the softmax",
    "channel attention",
    "channel attention, square",
)


# Attention over channels: no patch says a word to the class token. The map of FrozenLayerNorm is zero, and says so.
@pytest.mark.filterwarnings("ignore:.*zero everywhere")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_other_wirings_are_refused(wiring: str, name: str) -> None:
    options = WIRINGS[wiring]
    other = vit(**options)
    for block in other.blocks:
        if "attn_layer" in options:
            block.attn.fused_attn = False
    if name == "FrozenLayerNorm" and wiring in AFFINE_WIRINGS:
        # It knows no blocks: with everything frozen these are affine too, and it has to be as exact for them.
        other = other.double()
        found = METHODS[name](other).attribute(images().double(), target=1)
        torch.testing.assert_close(found, Frozen(other, images().double(), [1, 1]).attribution)
        return
    with untouched(other), pytest.raises(REFUSED):
        METHODS[name](other).attribute(images(), target=1)


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout", "gradient"])
def test_a_skip_around_all_blocks_is_said(rule: str, pooling: str) -> None:
    other = vit(kind=LongSkip, global_pool=pooling, class_token=pooling == "token")
    if pooling == "token" and rule != "gradient":
        # Of the skip, only the class token is read, which is the same for every image.
        LNStatAttribution(other, rule=rule).relevance(images(), target=1)
        return
    with pytest.warns(UserWarning, match=r"another path than|besides the end of the residual stream"):
        LNStatAttribution(other, rule=rule).relevance(images(), target=1)


def test_small_scores_are_checked_as_strictly() -> None:
    other = vit(block_fn=HalvedAttention)
    with torch.no_grad():
        other.head.weight.mul_(1e-2)
        other.head.bias.mul_(1e-2)
    with pytest.raises(REFUSED):
        LNStatAttribution(other, rule="evidence").attribute(images(), target=1)


def test_shared_modules(make: Make) -> None:
    twice = vit()
    twice.blocks = nn.Sequential(twice.blocks[0], twice.blocks[0], twice.blocks[1])
    with pytest.raises(RecordingError, match="2 times"):
        make(twice).attribute(images(), target=1)
    attention = vit()
    attention.blocks[1].attn = attention.blocks[0].attn
    with pytest.raises(RecordingError):
        make(attention).attribute(images(), target=1)
    mlp = vit()
    mlp.blocks[1].mlp = mlp.blocks[0].mlp
    separate = vit()
    separate.blocks[1].mlp = copy.deepcopy(separate.blocks[0].mlp)
    shared, apart = (make(m).attribute(images(), target=1) for m in (mlp, separate))
    assert torch.equal(shared, apart)


# Forward functions.


def test_forward_function_that_runs_the_model_twice_or_never(model: nn.Module, make: Make) -> None:
    with untouched(model), pytest.raises(RecordingError, match="more than once"):
        make(lambda x: model(x) + model(x.flip(-1)), model).attribute(images(), target=1)
    with untouched(model), pytest.raises(RecordingError, match="never ran"):
        make(lambda x: x.mean((2, 3)), model).attribute(images(), target=1)
    other = copy.deepcopy(model)
    with untouched(model, other), pytest.raises(RecordingError, match="never ran"):
        make(lambda x: other(x), model).attribute(images(), target=1)


@pytest.mark.parametrize("name", ["lnstat", "evidence", *WITH_A_GRAPH])
def test_forward_function_that_leaves_the_graph(model: nn.Module, name: str) -> None:
    with untouched(model), pytest.raises(RecordingError, match="no gradient"):
        METHODS[name](lambda x: model(x).detach(), model).attribute(images(), target=1)


def test_forward_function_without_grad(model: nn.Module, make: Make) -> None:
    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        return model(x)

    method = make(forward, model)
    with untouched(model):
        if make in [METHODS[name] for name in WITH_A_GRAPH]:
            with pytest.raises(RecordingError, match="without no_grad"):
                method.attribute(images(), target=1)
        else:
            assert torch.equal(method.attribute(images(), target=1), make(model).attribute(images(), target=1))


@pytest.mark.parametrize("name", METHODS)
def test_forward_function_in_inference_mode(model: nn.Module, name: str) -> None:

    @torch.inference_mode()
    def forward(x: Tensor) -> Tensor:
        return model(x)

    with untouched(model), pytest.raises(RecordingError):
        METHODS[name](forward, model).attribute(images(), target=1)


def test_forward_function_that_returns_no_tensor(model: nn.Module, make: Make) -> None:
    for wrap in (lambda y: (y, y), lambda y: {"out": y}, lambda y: y.detach().numpy(), lambda y: None):
        with untouched(model), pytest.raises(TypeError, match="expected a tensor of scores"):
            make(lambda x, wrap=wrap: wrap(model(x)), model).attribute(images(), target=1)


@pytest.mark.parametrize("target", [None, 0])
@pytest.mark.parametrize("name", METHODS)
def test_forward_function_that_returns_one_number(model: nn.Module, name: str, target: Any) -> None:
    method = METHODS[name](lambda x: model(x).sum(), model)
    if target is None and name in CLASS_AGNOSTIC:
        assert torch.equal(method.attribute(images()), METHODS[name](model).attribute(images()))
        return
    with untouched(model), pytest.raises(ValueError, match=r"output per image|at least two classes"):
        method.attribute(images(), target=target)


@pytest.mark.parametrize("size", [16, 64])
def test_forward_function_that_resizes(make: Make, size: int) -> None:
    model = swin()
    with pytest.raises(RecordingError, match="Resize, crop or repeat them before"):
        make(lambda x: model(nn.functional.interpolate(x, (32, 32))), model).attribute(images(2, size), target=1)


@pytest.mark.parametrize("batch", [1, 2])
def test_forward_function_that_runs_another_batch(model: nn.Module, make: Make, batch: int) -> None:
    def flipped_too(x: Tensor) -> Tensor:
        return model(torch.cat([x, x.flip(-1)])).reshape(2, len(x), -1).mean(0)

    with untouched(model), pytest.raises(RecordingError):
        make(flipped_too, model).attribute(images(batch), target=1)


# Models in a state that cannot be explained.


def test_model_made_in_inference_mode(make: Make) -> None:
    with torch.inference_mode():
        made = vit()
    with pytest.raises(RecordingError, match="outside inference_mode"):
        make(made).attribute(images(), target=1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["NaN in a weight", "overflow"])
def test_nothing_non_finite_is_drawn(model: nn.Module, name: str, case: str) -> None:
    broken, image = copy.deepcopy(model), images()
    if case == "overflow":
        image = image * 1e25
    else:
        with torch.no_grad():
            next(p for key, p in broken.named_parameters() if "qkv" in key)[0, 0] = torch.nan
    with untouched(broken, image), pytest.raises(REFUSED):
        METHODS[name](broken).attribute(image, target=1)


def test_a_nan_is_called_a_nan(model: nn.Module) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(p for key, p in broken.named_parameters() if "qkv" in key)[0, 0] = torch.nan
    with pytest.raises(REFUSED, match="finite"):
        LNStatAttribution(broken).attribute(images(), target=1)


def test_train_mode_warns_and_stays(make: Make) -> None:
    for model in (vit(drop_rate=0.3, attn_drop_rate=0.3), swin(drop_path_rate=0.3)):
        model.train()
        model.blocks[1].eval() if hasattr(model, "blocks") else model.layers[0].eval()
        training = [module.training for module in model.modules()]
        with pytest.warns(UserWarning, match=r"train mode.*model\.eval\(\)"):
            attribution = make(model).attribute(images(), target=1)
        assert [module.training for module in model.modules()] == training
        assert torch.isfinite(attribution).all()


def test_dropped_patches_are_refused(make: Make) -> None:
    model = vit(patch_drop_rate=0.5).train()
    with pytest.warns(UserWarning, match="train mode"), pytest.raises(RecordingError, match="patch dropout"):
        make(model).attribute(images(), target=1)
    model.eval()
    assert torch.isfinite(make(model).attribute(images(), target=1)).all()


@cache
def _made(model: nn.Module, how: str) -> Any:
    with torch.no_grad():
        if how == "trace":
            return torch.jit.trace(model, images())
        if how == "script":
            return torch.jit.script(model)
        if how == "fx":
            return torch.fx.symbolic_trace(model)
        return torch.export.export(model, (images(),)).module()


# torch.jit warns of its own deprecation, tracing of Python values in timm.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("model", "make", "how"),
    pairwise(MODELS, METHODS, ["trace", "script", "fx", "export"]),
    indirect=["model", "make"],
)
def test_scripted_and_exported_models(model: nn.Module, make: Make, how: str) -> None:
    made = _made(model, how)
    with pytest.raises(UnsupportedModelError):
        make(made).attribute(images(), target=1)
    with untouched(model), pytest.raises(RecordingError):
        make(made, model).attribute(images(), target=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_scripted_models_are_called_that() -> None:
    model = vit()
    for made in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        with pytest.raises(UnsupportedModelError, match=re.compile("script|trace|export", re.I)):
            LNStatAttribution(made).attribute(images(), target=1)


@pytest.mark.parametrize("part", ["proj_drop", "head_drop", "drop_path"])
def test_a_part_in_train_mode_warns_and_is_named(part: str) -> None:
    """Dropout may be switched on by itself, to see how sure a model is: what it makes random is said."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7,
        drop_rate=0.5, proj_drop_rate=0.1, drop_path_rate=0.3,
    ).eval()  # fmt: skip
    parts = {name: module for name, module in vit.named_modules() if part in name}
    for module in parts.values():
        module.train()
    for rule in ("lnstat", "evidence", "rollout"):
        with pytest.warns(UserWarning, match=f"VisionTransformer is in train mode, in '.*{part}.*' at least"):
            LNStatAttribution(vit, rule=rule).relevance(torch.randn(1, 3, 32, 32), 1)
    assert all(module.training for module in parts.values())


@pytest.mark.filterwarnings("error")
def test_a_new_head_in_train_mode_is_no_train_mode() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()
    vit.head = nn.Linear(192, 3)
    assert vit.head.training
    assert LNStatAttribution(vit).relevance(torch.randn(1, 3, 32, 32), 1).isfinite().all()


def test_a_student_and_its_teacher_are_two() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = (
                timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7)
                for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.student(x)
            return scores

    pair, x = Pair().eval(), torch.randn(1, 3, 32, 32)
    for rule in ("lnstat", "rollout", "gradient"):
        with pytest.raises(
            UnsupportedModelError, match=r"2 transformers side by side .* Pass the one to explain as model="
        ):
            LNStatAttribution(pair, rule=rule).relevance(x, 1)
        assert LNStatAttribution(pair, pair.student, rule=rule).relevance(x, 1).isfinite().all()


def test_a_transform_of_torch_func_is_named() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()
    mapped = torch.vmap(lambda one: vit(one[None])[0])
    with pytest.raises(UnsupportedModelError, match=r"inside a transform of torch.func .* takes a whole batch"):
        LNStatAttribution(mapped, vit).relevance(torch.randn(2, 3, 32, 32), 1)


def test_images_that_forward_func_crops_are_not_said_to_be_of_a_wrong_size() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()
    with pytest.raises(
        RecordingError, match=r"given images of shape \(1, 3, 32, 32\), forward_func of \(1, 3, 40, 40\)"
    ):
        LNStatAttribution(lambda x: vit(x[..., 4:36, 4:36]), vit).relevance(torch.randn(1, 3, 40, 40), 1)


def test_one_target_is_no_list_of_targets() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()
    with pytest.raises(TypeError, match=r"targets is 3; expected several, such as range\(7\) or \[3\]"):
        LNStatAttribution(vit).relevance_per_target(torch.randn(1, 3, 32, 32), 3)
