"""Vision transformers whose norms are inside attention and MLP, on patches cut in any way; and their dense oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.plain_models import CLASSES, WIDTH, Plain
from helpers.plain_oracle import Oracle, Step

HEADS, INNER = 3, 18


class Added(nn.Module):
    """A branch and what it is added to."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x) + x
        return y


class Normed(nn.Module):
    """A branch that is given the norm of what it is given."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(self.norm(x))
        return y


class Attention(nn.Module):
    """Attention of its own; ``how`` is ``"matmul"``, ``"einsum"`` or ``"fused"``."""

    def __init__(self, how: str = "matmul", heads: int = HEADS, project: bool = True, normed: bool = True) -> None:
        super().__init__()
        inner = INNER if project else WIDTH
        self.how, self.heads = how, heads
        self.first = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.to_qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, WIDTH), nn.Dropout(0.1)) if project else nn.Identity()
        self.seen = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.first(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv)
        if self.how == "fused":
            joined = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            maps = self.seen((torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1))
            joined = torch.einsum("bhij,bhjd->bhid", maps, v)
        else:
            joined = self.seen((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)) @ v
        update: Tensor = self.to_out(joined.transpose(1, 2).flatten(2))
        return update


def _mlp(normed: bool = True) -> nn.Module:
    return nn.Sequential(
        *([nn.LayerNorm(WIDTH)] if normed else []),
        nn.Linear(WIDTH, 32),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(32, WIDTH),
    )


class Pair(nn.Module):
    """Both branches in a module that adds them."""

    def __init__(self, scaled: bool, **options: Any) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(**options), _mlp()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        update = self.attention(x)
        x = x + (update if self.gamma is None else self.gamma * update)
        y: Tensor = x + self.mlp(x)
        return y


class Layers(nn.Module):
    """A list of lists, and the norm behind it."""

    def __init__(self, build: str, norm: bool, **options: Any) -> None:
        super().__init__()
        self.build, self.norm = build, nn.LayerNorm(WIDTH) if norm else None
        self.layers = nn.ModuleList(self._layer(**options) for _ in range(2))

    def _layer(self, **options: Any) -> nn.Module:
        if self.build in ("called", "scaled"):
            return Pair(self.build == "scaled", **options)
        if self.build == "sequence":
            return nn.Sequential(Added(Attention(**options)), Added(_mlp()))
        if self.build == "wrapped":
            attention = Normed(Attention(**options, normed=False))
            return nn.ModuleList([Added(attention), Added(Normed(_mlp(normed=False)))])
        return nn.ModuleList([Attention(**options), _mlp()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not isinstance(layer, nn.ModuleList):
                x = layer(x)
                continue
            attention, mlp = layer
            x = attention(x) if self.build == "wrapped" else attention(x) + x
            x = mlp(x) if self.build == "wrapped" else mlp(x) + x
        return x if self.norm is None else self.norm(x)


class Rearranged(nn.Module):
    """Images cut into patches of 8 x 8."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "unfold":
            return F.unfold(x, 8, stride=8).mT
        cut = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        if self.how == "columns":
            cut = cut.transpose(1, 2)
        return cut if self.how == "map" else cut.flatten(1, 2)


class Branched(nn.Module):
    """A ViT.

    Args:
        cut: ``"linear"``, ``"norms"`` around it, ``"map"`` of patches, ``"unfold"``, ``"inside"`` the forward pass,
            ``"convolution"``; ``"columns"``: patches column by column.
        pool: ``"class"``, or ``"mean"`` over all, or ``"patches"`` beside registers that were joined behind them.
        build: How attention and MLP are held.
        norm: A norm behind the blocks; without, the head has one.
    """

    def __init__(
        self, cut: str = "norms", pool: str = "class", build: str = "list", norm: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.cut, self.pool = cut, pool
        size = 3 * 8 * 8
        if cut == "convolution":
            self.embed: nn.Module = nn.Conv2d(3, WIDTH, 8, 8)
        elif cut == "inside":
            self.embed = nn.Linear(size, WIDTH)
        else:
            around = cut in ("norms", "map")
            parts = [Rearranged(cut), nn.LayerNorm(size) if around else None, nn.Linear(size, WIDTH)]
            parts += [nn.LayerNorm(WIDTH) if around else None]
            self.embed = nn.Sequential(*(part for part in parts if part is not None))
        extra = {"class": 1, "mean": 0, "patches": 3}[pool]
        self.place = nn.Parameter(torch.zeros(24, WIDTH))
        self.extra = nn.Parameter(torch.zeros(extra, WIDTH)) if extra else None
        self.transformer = Layers(build, norm, **options)
        self.head = nn.Sequential(nn.Identity() if norm else nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        if self.cut == "convolution":
            t = self.embed(x).flatten(2).mT
        else:
            t = self.embed(Rearranged("unfold")(x) if self.cut == "inside" else x)
        t = t.flatten(1, -2) + self.place
        if self.extra is not None:
            extra = self.extra.expand(len(x), -1, -1)
            t = torch.cat([extra, t] if self.pool == "class" else [t, extra], 1)
        t = self.transformer(t)
        read = t[:, 0] if self.pool == "class" else t[:, :24].mean(1)
        scores: Tensor = self.head(read)
        return scores


class BranchOracle(Oracle):
    """The dense oracle; other tokens first, whatever their order in the model."""

    def _blocks(self) -> list[Any]:
        return list(self.model.transformer.layers)

    def __init__(self, case: Plain, model: nn.Module, x: Tensor) -> None:
        copied = [m for m in model.modules() if isinstance(m, Attention)]
        how = [m.how for m in copied]
        for m in copied:
            m.how = "matmul" if m.how == "fused" else m.how
        try:
            super().__init__(case, model, x)
        finally:
            for m, was in zip(copied, how, strict=True):
                m.how = was

    def _step(self, block: Any) -> Step:
        blocks = self._blocks()
        number = next(i for i, one in enumerate(blocks) if one is block)
        before, between = (self.seen[branch][0] for branch in self._branches(block))
        if number + 1 < len(blocks):
            after = self.seen[self._branches(blocks[number + 1])[0]][0]
        else:
            norm = self.model.transformer.norm
            after = self.seen[self.model.transformer][1] if norm is None else self.seen[norm][0]
        (attn,) = (m for m in block.modules() if isinstance(m, Attention))
        maps, v = self.seen[attn.seen][1], self.seen[attn.to_qkv][1].chunk(3, -1)[2]
        values = v.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out, offset = torch.eye(WIDTH).double(), torch.zeros(WIDTH).double()
        if isinstance(attn.to_out, nn.Sequential):
            out, offset = attn.to_out[0].weight, attn.to_out[0].bias
        gamma = getattr(block, "gamma", None)
        if gamma is not None:
            out, offset = gamma[:, None] * out, gamma * offset
        shape = self.batch, maps.shape[2]
        step = Step(maps, values, before, between, after, out.expand(*shape, -1, -1), offset.expand(*shape, -1))
        heard = torch.einsum("bhim,bhmd->bihd", maps, values).flatten(2)
        update = torch.einsum("bica,bia->bic", step.out, heard) + step.offset
        torch.testing.assert_close(update, between - before, atol=1e-9, rtol=0)
        return step

    def _branches(self, block: Any) -> list[nn.Module]:
        return [child for child in block.children() if list(child.children())]

    def start(self) -> Tensor:
        weights = torch.zeros(self.batch, self.steps[0].before.shape[1]).double()
        weights[:, : 1 if self.model.pool == "class" else 24] = 1
        return weights / weights.sum(1, keepdim=True)

    def cotangent(self, target: Tensor) -> Tensor:
        end = self.steps[-1].after.detach().requires_grad_()
        norm, read = self.model.transformer.norm, end
        if norm is not None:
            read = self._frozen(norm, end)
        read = read[:, 0] if self.model.pool == "class" else read[:, :24].mean(1)
        first, last = self.model.head
        read = read if isinstance(first, nn.Identity) else self._frozen(first, read)
        logits = last(read)
        torch.testing.assert_close(logits, self.logits)
        (u,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), end)
        return u

    @staticmethod
    def _frozen(norm: Any, x: Tensor) -> Tensor:
        deviation = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
        normed: Tensor = norm.weight * (x - x.mean(-1, keepdim=True)) / deviation + norm.bias
        return normed


def _case(name: str, **options: Any) -> Plain:
    pool = options.get("pool", "class")
    prefix = 1 if pool == "class" else 0
    reads = {"class": "class token", "mean": "mean of the tokens", "patches": "mean of the patches"}[pool]
    return Plain(f"branched-{name}", partial(Branched, **options), (32, 48), (4, 6), (8, 8), prefix, reads)


BRANCHED = [
    _case("list"),
    _case("mean", pool="mean", cut="linear"),
    _case("registers-behind", pool="patches", cut="map"),
    _case("unfold-fused", cut="unfold", how="fused"),
    _case("inside-einsum", cut="inside", how="einsum"),
    _case("convolution", cut="convolution", pool="mean"),
    _case("no-norm-behind", norm=False),
    _case("wrapped-einsum", build="wrapped", how="einsum", pool="mean"),
    _case("wrapped-no-norm-behind", build="wrapped", norm=False),
    _case("called", build="called", how="fused"),
    _case("scaled", build="scaled", cut="linear"),
    _case("sequence", build="sequence", pool="mean"),
    _case("one-head-not-projected", heads=1, project=False, cut="linear"),
]
