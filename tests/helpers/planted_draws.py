"""Random small models whose score is known to come from one place, however they mix, order and read their tokens.

Nothing is trained: one channel of the patch embedding answers to the stimulus, the blocks are near the identity, and
the head reads that channel. Everything else is drawn: the family, the order of tokens and of the batch, the stride of
the patches, what is done to the images first, how the head pools, and what it reads besides the end of the stream.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution

WIDTH, PATCH, GRID = 16, 8, 4
IMAGES = ["as they are", "flipped", "rolled", "turned"]
TOKENS = ["in order", "in order", "shuffled", "flipped", "rolled", "sorted", "there and back"]
ROWS = ["in order", "in order", "permuted", "there and back"]
STRIDES = ["the patch", "the patch", "half the patch", "more than the patch"]
POOLINGS = ["mean", "mean", "max", "mean and max", "square mean", "half of the patches"]
READS = ["the end", "the end", "an earlier block", "both", "a network beside", "a skip"]


@dataclass(frozen=True)
class Draw:
    """One model."""

    seed: int
    family: str
    images: str
    tokens: str
    rows: str
    stride: str
    pooling: str
    reads: str

    @classmethod
    def of(cls, seed: int) -> Draw:
        """The model of a seed."""
        some = random.Random(seed)
        pick = some.choice
        family, stride = pick(["vit", "vit", "swin"]), pick(STRIDES)
        return cls(
            seed, family, pick(IMAGES) if some.random() < 0.3 else IMAGES[0], pick(TOKENS), pick(ROWS),
            stride if family == "vit" else STRIDES[0], pick(POOLINGS), pick(READS),
        )  # fmt: skip


def _mover(kind: str, random_: torch.Generator, count: int, dim: int) -> Callable[[Tensor], Tensor]:
    order = torch.randperm(count, generator=random_)
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "in order": lambda x: x,
        "shuffled": lambda x: x.index_select(dim, order),
        "permuted": lambda x: x.index_select(dim, order),
        "flipped": lambda x: x.flip(dim),
        "rolled": lambda x: x.roll(3, dim),
        "sorted": lambda x: torch.gather(x, dim, x[..., :1].sort(dim).indices.expand_as(x)),
        "there and back": lambda x: x.index_select(dim, order).index_select(dim, order.argsort()),
    }
    return moves[kind]


class Model(nn.Module):
    """The model of a draw."""

    def __init__(self, draw: Draw, tile: Tensor, batch: int) -> None:
        super().__init__()
        self.draw = draw
        torch.manual_seed(draw.seed)
        drawn = torch.Generator().manual_seed(draw.seed)
        if draw.family == "vit":
            self.trunk: Any = VisionTransformer(
                img_size=GRID * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0,
                class_token=False, global_pool="avg", fc_norm=False,
            )  # fmt: skip
        else:
            self.trunk = SwinTransformer(
                img_size=GRID * PATCH, patch_size=PATCH // 2, window_size=GRID, embed_dim=WIDTH, depths=(2, 2),
                num_heads=(2, 2), num_classes=0,
            )  # fmt: skip
        self.trunk.patch_embed.img_size = None  # it takes any
        with torch.no_grad():
            for parameter in self.trunk.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
            for module in self.trunk.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                if hasattr(module, "reduction"):  # the merging passes the first channel of all four children on
                    module.reduction.weight[0] = 0
                    module.reduction.weight[0, ::WIDTH] = 0.5
            embed = self.trunk.patch_embed.proj
            embed.weight.mul_(0.3)
            small = tile[:, : embed.kernel_size[0], : embed.kernel_size[1]]
            embed.weight[0] = 8 * small / small.square().sum()
        if draw.stride != "the patch":
            embed.stride = (PATCH // 2,) * 2 if draw.stride == "half the patch" else (PATCH + 2,) * 2
        self.move = _mover(draw.tokens, drawn, GRID * GRID if draw.family == "vit" else 4 * GRID * GRID, 1)
        self.rows = _mover(draw.rows, drawn, batch, 0)
        self.other = nn.Sequential(nn.Conv2d(3, 1, PATCH, PATCH), nn.ReLU(), nn.Flatten(), nn.Linear(1, 1))
        self.stage = int(torch.randint(2, (), generator=drawn))

    @property
    def side(self) -> int:
        """Height and width of the images."""
        return {"the patch": GRID * PATCH, "half the patch": (GRID + 1) * PATCH // 2}.get(
            self.draw.stride, (GRID - 1) * (PATCH + 2) + PATCH
        )

    def place(self, row: int, column: int) -> tuple[int, int]:
        """The first pixel of the patch at a place of the grid."""
        step = {"the patch": PATCH, "half the patch": PATCH // 2}.get(self.draw.stride, PATCH + 2)
        return row * step, column * step

    def _changed(self, images: Tensor) -> Tensor:
        kind = self.draw.images
        if kind == "flipped":
            return images.flip(-1)
        if kind == "rolled":
            return images.roll(PATCH, -2)
        return images.transpose(-1, -2) if kind == "turned" else images

    def _pooled(self, tokens: Tensor) -> Tensor:
        kind, tokens = self.draw.pooling, tokens.flatten(1, -2)
        if kind == "max":
            return tokens.amax(1)
        if kind == "mean and max":
            return tokens.mean(1) + tokens.amax(1)
        if kind == "square mean":
            return tokens.clamp(min=1e-3).square().mean(1).sqrt()
        return tokens[:, ::2].mean(1) + 0.5 * tokens.mean(1) if kind == "half of the patches" else tokens.mean(1)

    def forward(self, images: Tensor) -> Tensor:
        images = self._changed(images)
        x = self.rows(self.trunk.patch_embed(images))
        x = self.move(x.flatten(1, -2)).reshape(x.shape)
        places = []
        if self.draw.family == "vit":
            for block in self.trunk.blocks:
                x = block(x)
                places.append(x)
        else:
            for layer in self.trunk.layers:
                x = layer(x)
                places.append(x)
        reads, end = self.draw.reads, self._pooled(self.trunk.norm(x))[:, 0]
        score = end
        if reads == "an earlier block":
            score = self._pooled(places[0])[:, 0]
        elif reads == "both":
            score = end + self._pooled(places[0])[:, 0]
        elif reads == "a network beside":
            score = end + 3 * self.other[0](images).relu().flatten(1).amax(1)
        elif reads == "a skip":
            score = end + 3 * images.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


@dataclass(frozen=True)
class Outcome:
    """What came of a draw: ``"found"``, ``"said"`` (a warning), ``"refused"``, ``"wrong"`` or ``"unclear"``.

    ``"unclear"``: the score does not rest on the stimulus, so that no map has to.
    """

    draw: Draw
    kind: str
    text: str = ""


def outcome(seed: int, rule: str = "evidence", batch: int = 2) -> Outcome:
    """Plant a stimulus in every image of a batch, and look for the peak of its map."""
    draw, some = Draw.of(seed), torch.Generator().manual_seed(seed)
    tile = torch.randn(3, PATCH, PATCH, generator=some)
    if draw.family == "swin":  # its patches are half as large: every one of the four under the stimulus answers
        tile = tile[:, : PATCH // 2, : PATCH // 2].repeat(1, 2, 2)
    model = Model(draw, tile, batch).eval()
    without = 0.05 * torch.randn(batch, 3, model.side, model.side, generator=some)
    planted, corners = without.clone(), []
    for image in planted:
        y, x = model.place(*torch.randint(GRID, (2,), generator=some).tolist())
        corners.append((y, x))
        image[:, y : y + PATCH, x : x + PATCH] = tile if draw.images in (IMAGES[0], "rolled") else _as_seen(tile, draw)
    with torch.no_grad():
        without_it = model(without)[:, 1]
        gained = model(planted)[:, 1] - without_it
    # Of a score that is much the same without the stimulus, the rest may peak anywhere.
    if bool((gained < 0.1 + 0.25 * without_it.abs()).any()):
        return Outcome(draw, "unclear")
    if rule == "evidence" and draw.pooling == "half of the patches":
        # Evidence adds up to the score, and what all patches have in common is more where the head weighs them more.
        return Outcome(draw, "unclear")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            maps = LNStatAttribution(model, rule=rule).attribute(planted, target=1).sum(1)
    except Exception as refusal:
        ours = type(refusal).__module__.startswith("captum_lnstat")
        return Outcome(draw, "refused" if ours else "wrong", f"{type(refusal).__name__}: {refusal}")
    if said:
        return Outcome(draw, "said", str(said[0].message))
    for image, (y, x) in zip(maps, corners, strict=True):
        row, column = divmod(int(image.argmax()), image.shape[-1])
        if not (y <= row < y + PATCH and x <= column < x + PATCH):
            return Outcome(draw, "wrong", f"peak at {row}, {column}; stimulus at {y}, {x}")
    return Outcome(draw, "found")


def _as_seen(tile: Tensor, draw: Draw) -> Tensor:
    """The stimulus that the patch embedding answers to, before the model flips or turns it."""
    return tile.flip(-1) if draw.images == "flipped" else tile.transpose(-1, -2)
