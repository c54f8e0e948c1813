"""Every refusal has a message of its own: what was seen, and what to do. One table."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
from helpers.contract import distilled, images, swin, untouched, vit
from timm.layers import LayerNorm
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT
from torchvision.models.feature_extraction import create_feature_extractor

from captum_lnstat import AttentionRollout, LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.topology.anatomy.refusal import no_family

# torch.jit warns of its own deprecation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*train mode:UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
Rows = tuple[Callable[[], nn.Module], Callable[[], Any], Any, type[Exception], str, str]


class _Hidden(torch.autograd.Function):
    """As a kernel of its own would look to a recorder."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)).exp() / (q @ k.transpose(-2, -1)).exp().sum(-1, keepdim=True)) @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, None


class OwnKernel(Attention):
    hidden = True

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        batch, count, channels = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.hidden:
            mixed = _Hidden.apply(0.1 * q, k, v)
        else:
            weights = (0.1 * q @ k.transpose(-2, -1)).exp()
            mixed = (weights / weights.sum(-1, keepdim=True)) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, channels))


class NoSoftmax(OwnKernel):
    hidden = False


class TwoSideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = vit(), swin()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def of_timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=5, **options).eval()


def scripted() -> nn.Module:
    return torch.jit.script(vit())


def exported() -> nn.Module:
    return torch.export.export(vit(), (images(),)).module()


def as_graph(last: str) -> nn.Module:
    model = TorchvisionViT(32, 8, 1, 3, 24, 32)
    return nn.Sequential(create_feature_extractor(model, [last]), First(last)).eval()


class First(nn.Module):
    """The first token of features as scores."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features[self.name][:, 0]


class InWindows(nn.Module):
    """A plain ViT whose tokens are cut into four windows before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(class_token=False, global_pool="avg", pos_embed="none")

    def forward(self, x: Tensor) -> Tensor:
        t = self.vit.patch_embed(x)
        t = self.vit.blocks(t.unflatten(1, (4, -1)).flatten(0, 1)).unflatten(0, (-1, 4)).flatten(1, 2)
        scores: Tensor = self.vit.forward_head(self.vit.norm(t))
        return scores


def big() -> Tensor:
    return images(1, 224)


def spoilt(value: float) -> Tensor:
    image = images()
    image[1, 0, 3, 3] = value
    return image


# Name: (model, images, target, error, what was seen, what to do)
TABLE: dict[str, Rows] = {
    "ResNet": (
        partial(of_timm, "resnet18"),
        big,
        1,
        UnsupportedModelError,
        "ResNet .* no attention module",
        "LayerGradCam",
    ),
    "ConvNeXt": (
        partial(of_timm, "convnext_atto"),
        big,
        1,
        UnsupportedModelError,
        r"ConvNeXt .* no attention module\nseen: no attention module; LayerNorms: 17",
        "IntegratedGradients",
    ),
    "PoolFormer": (
        partial(of_timm, "poolformer_s12"),
        big,
        1,
        UnsupportedModelError,
        "MetaFormer .* no attention module",
        "LayerGradCam",
    ),
    "LeViT": (
        partial(of_timm, "levit_128s"),
        big,
        1,
        UnsupportedModelError,
        r"LevitDistilled .* no LayerNorm.*\nseen: 9 Attention \(first at 'stages\.0\.blocks\.0\.attn'\)",
        "LayerGradCam",
    ),
    "XCiT": (
        partial(of_timm, "xcit_nano_12_p16_224", depth=2),
        big,
        1,
        UnsupportedModelError,
        r"Xcit .* XCA at 'blocks\.0\.attn' attends from channel to channel",
        "no map from token to token",
    ),
    "DaViT": (
        partial(of_timm, "davit_tiny", depths=(1, 1, 1, 1)),
        big,
        1,
        UnsupportedModelError,
        r"DaVit .* ChannelAttention at 'stages\.0\.blocks\.0\.1\.attn' attends from channel",
        "no map from token to token",
    ),
    "another wiring": (
        partial(nn.TransformerEncoderLayer, 8, 2),
        images,
        1,
        UnsupportedModelError,
        r"TransformerEncoderLayer .* not where .*\nseen: 1 MultiheadAttention \(first at 'self_attn'\); LayerNorms: 2",
        r"known families:\n.*  plain: patch_embed.*register_topology",
    ),
    "two transformers": (
        TwoSideBySide,
        images,
        1,
        UnsupportedModelError,
        r"2 transformers side by side \(VisionTransformer, Swin",
        "model=",
    ),
    "scripted": (
        scripted,
        images,
        1,
        UnsupportedModelError,
        "scripted, traced or exported",
        "pass the model that it was",
    ),
    "exported": (
        exported,
        images,
        1,
        UnsupportedModelError,
        "scripted, traced or exported",
        "pass the model that it was",
    ),
    "graph": (
        partial(as_graph, "encoder.ln"),
        images,
        1,
        UnsupportedModelError,
        r"a graph \(torch\.fx, .* runs no block as a module",
        "pass the model that it was made from",
    ),
    "windows": (
        InWindows,
        images,
        1,
        RecordingError,
        r"was given 8 rows of \d+ tokens for 2 images: they were cut into windows",
        "one row an image",
    ),
    "own kernel": (
        partial(vit, attn_layer=OwnKernel),
        images,
        1,
        RecordingError,
        r"no attention was seen inside 'blocks\.0\.attn'",
        "switched to PyTorch's own",
    ),
    "no softmax": (
        partial(vit, attn_layer=NoSoftmax),
        images,
        1,
        RecordingError,
        r"no attention was seen inside 'blocks\.0\.attn'",
        "switched to PyTorch's own",
    ),
    "rank": (vit, lambda: images()[0], 1, ValueError, r"shape \(3, 32, 32\)", r"\(batch, channels, height, width\)"),
    "height": (vit, lambda: images(1, (40, 32)), 1, ValueError, r"40 x 32 pixels; .* takes \(32, 32\)", "Resize"),
    "size of a window model": (swin, lambda: images(1, 64), 1, ValueError, "64 x 64 pixels", "Resize"),
    "not whole patches": (
        partial(vit, dynamic_img_size=True),
        lambda: images(1, (36, 32)),
        1,
        ValueError,
        r"36 x 32 pixels; the model takes multiples of its patch size \(8, 8\)",
        "Resize",
    ),
    "channels": (vit, lambda: images(1, channels=1), 1, ValueError, "1 channels; the model takes 3", "in_chans="),
    "dtype": (vit, lambda: images().to(torch.uint8), 1, TypeError, r"torch\.uint8", "floating-point image, normalised"),
    "NaN": (vit, lambda: spoilt(torch.nan), 1, ValueError, "NaN or infinite", "expected finite ones"),
    "inf": (swin, lambda: spoilt(-torch.inf), 1, ValueError, "NaN or infinite", "expected finite ones"),
    "empty batch": (vit, lambda: images()[:0], 1, ValueError, r"shape \(0, 3, 32, 32\)", "at least one image"),
    "a list": (vit, lambda: [images()], 1, TypeError, "inputs is a list", "tuple with one"),
    "two inputs": (vit, lambda: (images(), images()), 1, ValueError, "tuple of 2", "additional_forward_args"),
    "target": (vit, images, 5, IndexError, "target 5 is none of the 5 classes", "Expected 0 to 4"),
    "target from the end": (vit, images, -6, IndexError, "target -6 is none of the 5 classes", "Expected 0 to 4"),
    "target in a tensor": (vit, images, torch.tensor(9), IndexError, "target 9 is none of the 5", "Expected 0 to 4"),
    "target of one image": (vit, images, [1, 7], RuntimeError, "target 7 is none of the 5 classes", "Expected 0 to 4"),
    "targets in a tensor": (
        swin,
        images,
        torch.tensor([-1, 2]),
        RuntimeError,
        "target -1 is none of the 5 classes",
        "Expected 0 to 4",
    ),
    "no target": (vit, images, None, AssertionError, "Target not provided when necessary", "multiple outputs"),
    "several outputs": (
        lambda: distilled().train().requires_grad_(False),
        images,
        1,
        TypeError,
        r"returned a tuple of \{0: \(2, 5\), 1: \(2, 5\)\}",
        "with output=",
    ),
}


def build_distilled_for_training(model: nn.Module) -> None:
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)


@pytest.mark.parametrize("case", TABLE)
def test_says_what_was_seen_and_what_to_do(case: str) -> None:
    build, given, target, error, seen, advice = TABLE[case]
    model, inputs = build(), given()
    build_distilled_for_training(model)
    with nullcontext() if case in ("scripted", "exported") else untouched(model), pytest.raises(error) as raised:
        LNStatAttribution(model).attribute(inputs, target=target)
    text = str(raised.value)
    assert re.search(seen, text, re.S), text
    assert re.search(advice, text, re.S), text
    assert len(text.splitlines()[0]) <= (160 if error is UnsupportedModelError else 320)
    assert all(len(line) <= 250 for line in text.splitlines()[1:])


def test_no_two_cases_share_a_message() -> None:
    """But those that are the same mistake made in another way."""
    texts: dict[str, list[str]] = {}
    for case in ("ResNet", "LeViT", "XCiT", "another wiring", "two transformers", "scripted"):
        with pytest.raises(UnsupportedModelError) as raised:
            LNStatAttribution(TABLE[case][0]()).attribute(images(), target=1)
        texts.setdefault(str(raised.value).splitlines()[0].partition(": ")[2] or str(raised.value), []).append(case)
    assert all(len(cases) == 1 for cases in texts.values()), texts


def test_every_method_says_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    texts = set()
    for method in (LNStatAttribution(model), LNStatAttribution(model, rule="rollout"), AttentionRollout(model)):
        for call in (method.attribute, method.relevance, method.describe):
            with pytest.raises(UnsupportedModelError) as raised:
                call(images(), target=1)
            texts.add(str(raised.value))
    assert len(texts) == 1


class Claims(nn.Module):
    """Called attention, built of nothing that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)


class SpatialAttention(Claims):
    pass


class WithTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.temperature = nn.Linear(4, 12), nn.Parameter(torch.ones(2, 1, 1))


class XCA(WithTemperature):
    pass


class RMSNorm(nn.Module):
    pass


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "it holds no attention module"),
        ([nn.LayerNorm(4), Claims()], "it holds no attention module"),
        ([SpatialAttention()], "it holds no LayerNorm"),
        ([SpatialAttention(), nn.BatchNorm1d(4)], "it holds no LayerNorm"),
        ([nn.MultiheadAttention(4, 1), LayerNorm(4)], "not where those of a known family are"),
        ([nn.MultiheadAttention(4, 1), RMSNorm()], "not where those of a known family are"),
        ([WithTemperature(), nn.LayerNorm(4)], "not where those of a known family are"),
        ([XCA(), nn.LayerNorm(4)], "XCA at '0' attends from channel to channel"),
    ],
)
def test_read_off_the_structure(parts: list[nn.Module], reason: str) -> None:
    assert reason in no_family(nn.Sequential(*parts), {}).splitlines()[0]
