"""The reason of every refusal is true: what was seen, and where. One table of models that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from helpers.contract import images, lively, swin, untouched, vit
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")
Row = tuple[Callable[[], nn.Module], type[Exception], str]


class Own(Attention):
    """timm's attention with a way of its own from queries, keys and values to the joined heads."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        batch, count, channels = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = self.mix(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, channels))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Differential(Own):
    """Differential attention: the maps of two halves of the queries and keys, one less the other."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one, other = (
            (a @ b.transpose(-2, -1)).softmax(-1) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        )
        return (one - 0.3 * other) @ v


class Gated(Own):
    """ConViT's kind: a softmax of the content and one of the positions, mixed by a gate."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = q.shape[2]
        places = -(torch.arange(count)[:, None] - torch.arange(count)).abs().float()
        attention = 0.5 * (q @ k.transpose(-2, -1)).softmax(-1) + 0.5 * places.expand_as(q @ k.mT).softmax(-1)
        return attention @ v


class Sigmoid(Own):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).sigmoid() @ v / q.shape[2]


class Relu(Own):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).relu() @ v / q.shape[2]


class LinearAttention(Own):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.elu(q) + 1) @ ((F.elu(k) + 1).transpose(-2, -1) @ v) / q.shape[2]


class Temperature(nn.Module):
    """Locality self-attention: a learned temperature, from token to token, in a block without a second norm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.temperature = 2, nn.Parameter(torch.tensor(1.0))
        self.to_qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(-2, -1) * self.temperature.exp()).softmax(-1) @ v)


class OneNorm(nn.Module):
    """A ViT whose blocks have one norm."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm, self.attention, self.head = (
            nn.Conv2d(3, 32, 8, 8),
            nn.LayerNorm(32),
            attention(),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(self.norm(tokens))).mean(1))


class Encoder(nn.Module):
    """A plain encoder with nothing that timm has."""

    def __init__(self, channels: int = 3, shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, 32, 8, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.head, self.shared = nn.LayerNorm(32), nn.Linear(32, 5), shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(layer(x)) if self.shared else layer(x)
        return self.head(self.norm(x).mean(1))


class Elsewhere(nn.Module):
    """A model that holds a ViT and does not run it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.head = vit(), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x) + self.vit(x.flip(-1))


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = vit(), swin()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def attending(kind: type[Own]) -> Callable[[], nn.Module]:
    """A ViT whose attention is of another class, with the same parameters."""

    def make() -> nn.Module:
        model = vit()
        for block in model.blocks:
            block.attn.__class__ = kind
        return model

    return make


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options).eval()


def of_transformers(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        settings = getattr(transformers, config)(**options)
        settings.num_labels = 5
        return getattr(transformers, kind)(settings).eval()

    return make


NO_ATTENTION = "it holds no attention module"
NO_NORM = "it holds no LayerNorm, whose token statistics say what a block keeps"
NOT_THERE = "its attention and LayerNorms are not where those of a known family are"
SEVERAL = "2 attention maps were seen inside 'blocks.0.attn'; expected one. How a module puts several together"
WITHOUT_SOFTMAX = "no attention was seen inside 'blocks.0.attn'; expected one softmax over the keys"

TABLE: dict[str, Row] = {
    # What holds no attention, or no norm.
    "resnet": (of_timm("resnet10t"), UnsupportedModelError, NO_ATTENTION),
    "convnext": (of_timm("convnext_atto", depths=(1, 1, 1, 1)), UnsupportedModelError, NO_ATTENTION),
    "poolformer": (of_timm("poolformer_s12"), UnsupportedModelError, NO_ATTENTION),
    "ghostnet": (of_timm("ghostnet_050"), UnsupportedModelError, NO_ATTENTION),
    "starnet": (of_timm("starnet_s1"), UnsupportedModelError, NO_ATTENTION),
    "mixer": (of_timm("gmixer_12_224"), UnsupportedModelError, NO_ATTENTION),
    "repvit": (of_timm("repvit_m0_9"), UnsupportedModelError, NO_ATTENTION),
    "transformers' resnet": (
        of_transformers("ResNetForImageClassification", "ResNetConfig", depths=[1], hidden_sizes=[16]),
        UnsupportedModelError,
        NO_ATTENTION,
    ),
    "transformers' poolformer": (
        of_transformers("PoolFormerForImageClassification", "PoolFormerConfig", depths=[1, 1, 1, 1]),
        UnsupportedModelError,
        NO_ATTENTION,
    ),
    "levit": (of_timm("levit_128s"), UnsupportedModelError, NO_NORM),
    "visformer": (of_timm("visformer_tiny"), UnsupportedModelError, NO_NORM),
    "fastvit": (of_timm("fastvit_sa12"), UnsupportedModelError, NO_NORM),
    "mobilenetv4 hybrid": (of_timm("mobilenetv4_hybrid_medium"), UnsupportedModelError, NO_NORM),
    "botnet": (of_timm("botnet26t_256"), UnsupportedModelError, NO_NORM),
    # Another wiring.
    "efficientformer": (of_timm("efficientformer_l1"), UnsupportedModelError, NOT_THERE),
    "efficientvit of mit": (of_timm("efficientvit_b0"), UnsupportedModelError, NOT_THERE),
    "one norm": (lambda: lively(OneNorm(Temperature)), UnsupportedModelError, NOT_THERE),
    # From channel to channel, by what it calls itself or by the shape of its maps.
    "xcit": (
        of_timm("xcit_nano_12_p16_224", depth=1),
        UnsupportedModelError,
        "XCA at 'blocks.0.attn' attends from channel to channel, not token to token",
    ),
    "davit": (
        of_timm("davit_tiny", depths=(1, 1), embed_dims=(32, 64), num_heads=(1, 2)),
        UnsupportedModelError,
        "ChannelAttention at 'stages.0.blocks.0.1.attn' attends from channel to channel",
    ),
    "edgenext": (
        of_timm("edgenext_xx_small"),
        UnsupportedModelError,
        "CrossCovarianceAttn at 'stages.2.blocks.5.xca' attends from channel to channel, 22 x 22 in each head for 4 "
        "tokens",
    ),
    # Several maps, or none that is a softmax.
    "differential": (attending(Differential), RecordingError, SEVERAL),
    "gated positions": (attending(Gated), RecordingError, SEVERAL),
    "convit": (of_timm("convit_tiny", img_size=32), RecordingError, SEVERAL),
    "sigmoid": (attending(Sigmoid), RecordingError, WITHOUT_SOFTMAX),
    "relu": (attending(Relu), RecordingError, WITHOUT_SOFTMAX),
    "linear": (attending(LinearAttention), RecordingError, WITHOUT_SOFTMAX),
    # How often what ran.
    "twice": (lambda: Twice().eval(), RecordingError, "the model ran more than once in one forward_func call"),
    "elsewhere": (lambda: Elsewhere().eval(), RecordingError, "forward_func never ran VisionTransformer"),
    "shared layers": (
        lambda: lively(Encoder(shared=True)),
        RecordingError,
        "'layers.1', where the head of Encoder begins, ran more than once in one pass",
    ),
    "coat": (
        of_timm("coat_lite_tiny", img_size=32),
        RecordingError,
        "module 'cpe1' ran 2 times in the forward pass; expected once. Weights that several places share",
    ),
    "pit": (
        of_timm("pit_ti_224", img_size=32),
        RecordingError,
        "(2, 128, 2, 2) at 'transformers.1.pool' is not what was read after or returned before it",
    ),
    "mobilevit": (
        of_timm("mobilevit_xxs"),
        UnsupportedModelError,
        "'stages.2.1.transformer.0' was given (8, 4, 64), and the convolutions before it left a grid of 4 x 4",
    ),
    "volo": (
        of_timm("volo_d1_224", img_size=32),
        RecordingError,
        "'post_network.0' was given (2, 5, 384) and returned (2, 5, 384); read with the channels last it has 5 tokens",
    ),
    "side by side": (
        lambda: SideBySide().eval(),
        UnsupportedModelError,
        "SideBySide holds 2 transformers side by side (VisionTransformer, SwinTransformer)",
    ),
    # Channels and scores.
    "16 channels": (
        lambda: lively(Encoder(channels=16)),
        UnsupportedModelError,
        "'embed', its first convolution, reads 16 channels; one that reads images is expected to read fewer than 16",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_reason_is_true(name: str) -> None:
    make, error, reason = TABLE[name]
    torch.manual_seed(0)
    model = make()
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    channels = next(part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d))
    image = images(2, size if isinstance(size, tuple) else 32, channels=channels)
    with torch.no_grad(), suppress(Exception):
        model(image)  # some fill a table of their own as they first run
    with untouched(model), pytest.raises(error, match=re.escape(reason)) as caught:
        LNStatAttribution(model).attribute(image, target=1)
    assert type(caught.value) is error


def test_there_are_enough_of_them() -> None:
    assert len(TABLE) >= 30
    assert len({reason for _, _, reason in TABLE.values()}) >= 15
