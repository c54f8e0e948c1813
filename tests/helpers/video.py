"""Small models of videos, and their dense oracles: those of images, with one axis more."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from captum_lnstat.testing.planting import CONTRAST, GREY, Region, Scenes
from helpers.models import CLASSES, enliven, generator
from helpers.plain_models import Plain
from helpers.plain_oracle import Oracle, first
from helpers.swin_oracle import SwinDense, Torchvision, _FirstLinear


def video_swin(**options: Any) -> nn.Module:
    """torchvision's Video Swin: windows of 2 x 4 x 4 tubelets of 2 x 4 x 4 pixels."""
    settings = {"patch_size": [2, 4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 2.0}
    settings |= {"window_size": [2, 4, 4], "stochastic_depth_prob": 0.0, "num_classes": CLASSES, **options}
    with torch.random.fork_rng():
        return SwinTransformer3d(**settings).eval()


_SIZES = {
    "image_size": 32,
    "num_frames": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "num_labels": CLASSES,
    "attn_implementation": "eager",
}


def video_mae(**options: Any) -> nn.Module:
    """Hugging Face's VideoMAE: 4 x 4 x 4 tubelets of 2 x 8 x 8 pixels, frames before channels."""
    config = transformers.VideoMAEConfig(**{**_SIZES, "patch_size": 8, "tubelet_size": 2, **options})
    with torch.random.fork_rng():
        return transformers.VideoMAEForVideoClassification(config).eval()


def vivit(**options: Any) -> nn.Module:
    """Hugging Face's ViViT: a class token before 4 x 2 x 4 tubelets of 2 x 16 x 8 pixels."""
    config = transformers.VivitConfig(**{**_SIZES, "tubelet_size": [2, 16, 8], **options})
    with torch.random.fork_rng():
        return transformers.VivitForVideoClassification(config).eval()


def timesformer(**options: Any) -> nn.Module:
    """Hugging Face's TimeSformer: a class token before 4 x 2 x 2 patches of 8 x 8 pixels, frames before channels."""
    sizes = {**_SIZES, "image_size": 16, "num_frames": 4, "patch_size": 8}
    del sizes["attn_implementation"]
    config = transformers.TimesformerConfig(**{**sizes, **options})
    with torch.random.fork_rng():
        return transformers.TimesformerForVideoClassification(config).eval()


class Tubelets(nn.Module):
    """A user's encoder of videos, whose tokens may be in any order of frames, rows and columns."""

    def __init__(self, order: tuple[int, int, int] = (0, 1, 2), count: int = 24, bend: bool = False) -> None:
        super().__init__()
        self.cut, self.order, self.bend = nn.Conv3d(3, 24, (2, 8, 8), (2, 8, 8)), order, bend
        self.place = nn.Parameter(torch.randn(1, count, 24, generator=generator(3)))
        layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, norm_first=True, activation="gelu")
        self.mix = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False)
        self.say = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).permute(0, *(axis + 2 for axis in self.order), 1).flatten(1, 3)
        tokens = tokens.sigmoid() if self.bend else tokens
        scores: Tensor = self.say(self.mix(tokens + self.place).mean(1))
        return scores


def lively(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """With parameters that all matter; attention of Hugging Face is made peaky, too."""
    enliven(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and any(part in name for part in ("query", "key", "q_proj", "k_proj")):
                p *= 2
    return model.to(dtype)


def videos(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise whose contrast and colour vary over time and place; the last three axes of ``shape`` are those."""
    rng = generator(7)
    rough = torch.randn(shape[0], 2, 3, 5, 5, generator=rng, dtype=torch.float64)
    smooth = nn.functional.interpolate(rough, (shape[2], *shape[3:]), mode="trilinear")
    noise = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return (noise * smooth[:, :1].exp() + smooth[:, 1:]).to(dtype)


class TorchvisionVideo(Torchvision):
    """``features`` of stages and mergings in turn."""

    def steps(self, model: Any) -> list[Any]:
        return [step for part in model.features for step in (part if isinstance(part, nn.Sequential) else [part])]

    def window_ids(self, block: Any, grid: tuple[int, ...], batch: int) -> Tensor:
        qkv = block.attn.qkv
        ids = torch.arange(1, batch * math.prod(grid) + 1, dtype=qkv.weight.dtype).reshape(batch, *grid, 1)
        with _FirstLinear(qkv.weight) as mode:
            block.attn(ids.expand(*ids.shape[:-1], qkv.in_features))
        assert mode.seen is not None
        return mode.seen[..., 0].long()

    def merging_ids(self, merging: Any, grid: tuple[int, ...]) -> Tensor:
        double = copy.deepcopy(merging)
        double.norm = double.reduction = nn.Identity()
        ids = torch.arange(1, math.prod(grid) + 1).reshape(1, *grid, 1)
        return double(ids).flatten(0, 3) - 1

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.head(model.norm(tokens).mean((1, 2, 3)))


def swin_oracle(model: nn.Module, x: Tensor, grid: tuple[int, ...], *, post: bool = False) -> SwinDense:
    """The dense matrices of a Video Swin."""
    return SwinDense(TorchvisionVideo(post=post), model, x, grid, graph=True)


class PlainVideo(Oracle):
    """The dense matrices of VideoMAE and ViViT, whose head reads the tokens with the weights ``start``."""

    def __init__(self, model: nn.Module, x: Tensor, start: Tensor) -> None:
        super().__init__(Plain("video", lambda: model, (0, 0), (0, 0), (0, 0), 0, ""), model, x)
        self._start = start

    def start(self) -> Tensor:
        return self._start.expand(self.batch, -1)

    def _attention(self, block: Any, attn: Any) -> tuple[Tensor, Tensor]:
        if first(attn, "attention.value") is None:
            return super()._attention(block, attn)
        attention = self.seen[attn.attention][1][1]
        return attention, self._heads(self.seen[attn.attention.value][1], attention.shape[1])


@dataclass(frozen=True)
class Moment(Region):
    """A rectangle of pixels in some frames of a video, channels first."""

    first: int = 0
    frames: int = 0

    def cut(self, images: Tensor) -> Tensor:
        return super().cut(images)[..., self.first : self.first + self.frames, :, :]

    def holds_token(self, place: tuple[int, ...], patch: tuple[int, ...]) -> bool:
        """Whether the middle of a token lies inside."""
        frame, y, x = ((at + 0.5) * side for at, side in zip(place, patch, strict=True))
        return self.holds(y, x) and self.first <= frame < self.first + self.frames


class VideoScenes(Scenes):
    """Grey videos with faint noise, in which a stimulus and a distractor can be put; sizes have the frames first."""

    def _texture(self, region: Any, patch: Any) -> Tensor:
        tile = torch.randn(self.channels, *patch, generator=self.random)
        repeats = [side // part for side, part in zip(region, patch, strict=True)]
        return (GREY + CONTRAST * tile.repeat(1, *repeats)).to(self.dtype)


class FramesFirst(nn.Module):
    """A model that takes the frames first, given the channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x.transpose(1, 2))
