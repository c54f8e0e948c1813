"""Blocks as tutorials write them: other names, heads as modules, a projection beside the attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.plain_models import CLASSES, WIDTH, Plain
from helpers.plain_oracle import Oracle, Step

HEADS = 3


def _split(t: Tensor, heads: int = HEADS) -> Tensor:
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)


def _maps(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


class Flat(nn.Module):
    """Everything is in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.ln_a, self.ln_b = HEADS, nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 32)
        self.down, self.merge = nn.Linear(32, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen = nn.Identity()

    def value(self, x: Tensor) -> Tensor:
        return _split(self.qkv(self.ln_a(x)).chunk(3, 2)[2])

    out = property(lambda self: (self.merge.weight, self.merge.bias))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(_split, self.qkv(self.ln_a(x)).chunk(3, 2))
        x = x + self.merge(_joined(self.seen(_maps(q, k)) @ v))
        y: Tensor = x + self.down(F.gelu(self.up(self.ln_b(x))))
        return y


class _OneHead(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, size, bias=False) for _ in range(3))
        self.seen = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seen(_maps(self.query(x), self.key(x))) @ self.value(x)
        return y


class HeadByHead(nn.Module):
    """Each head is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_OneHead(WIDTH // HEADS) for _ in range(HEADS))
        self.proj, self.feed = nn.Linear(WIDTH, WIDTH), _mlp()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def value(self, x: Tensor) -> Tensor:
        return torch.stack([head.value(self.first(x)) for head in self.heads], 1)

    out = property(lambda self: (self.proj.weight, self.proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.proj(torch.cat([head(y) for head in self.heads], -1))
        z: Tensor = x + self.feed(self.second(x))
        return z


class _Queries(nn.Module):
    """Attention without a projection, as of a library whose block has it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.n_heads, self.seen = HEADS, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(linear(x)) for linear in (self.proj_q, self.proj_k, self.proj_v))
        return _joined(self.seen(_maps(q, k)) @ v)


class Beside(nn.Module):
    """The projection stands beside the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.proj, self.norm1 = _Queries(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.pwff, self.norm2, self.drop = _mlp(), nn.LayerNorm(WIDTH), nn.Dropout(0.1)

    def value(self, x: Tensor) -> Tensor:
        return _split(self.attn.proj_v(self.norm1(x)))

    out = property(lambda self: (self.proj.weight, self.proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.proj(self.attn(self.norm1(x))))
        y: Tensor = x + self.drop(self.pwff(self.norm2(x)))
        return y


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head, self.seen = HEADS, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(_split, self.c_attn(x).split(WIDTH, 2))
        y: Tensor = self.c_proj(_joined(self.seen(_maps(q, k)) @ v))
        return y


class Small(nn.Module):
    """Names of small language models."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), _Causal(), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 32), "c_proj": nn.Linear(32, WIDTH)})

    def value(self, x: Tensor) -> Tensor:
        return _split(self.attn.c_attn(self.ln_1(x)).chunk(3, 2)[2])

    out = property(lambda self: (self.attn.c_proj.weight, self.attn.c_proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return y


class Nameless(nn.Module):
    """One head, and nothing that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.feed, self.seen = _mlp(), nn.Identity()

    def value(self, x: Tensor) -> Tensor:
        return self.wv(self.a(x))[:, None]

    out = property(lambda self: (self.wo.weight, self.wo.bias))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = x + self.wo(self.seen(_maps(self.wq(y), self.wk(y))) @ self.wv(y))
        z: Tensor = x + self.feed(self.b(x))
        return z


class Turned(nn.Module):
    """``nn.MultiheadAttention`` of tokens before the batch in a block of the batch before the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.linear = nn.MultiheadAttention(WIDTH, HEADS), _mlp()

    def value(self, x: Tensor) -> Tensor:
        weight, bias = (p.chunk(3)[2] for p in (self.tokens.in_proj_weight, self.tokens.in_proj_bias))
        return _split(F.linear(self.layer_norm_1(x), weight, bias))

    out = property(lambda self: (self.tokens.out_proj.weight, self.tokens.out_proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm_1(x).transpose(0, 1)
        x = x + self.tokens(y, y, y, need_weights=False)[0].transpose(0, 1)
        z: Tensor = x + self.linear(self.layer_norm_2(x))
        return z


class Tutorial(nn.Module):
    """A ViT of such blocks."""

    def __init__(self, block: Callable[[], nn.Module], pool: str = "class") -> None:
        super().__init__()
        self.pool = pool
        self.cut, self.layers = nn.Conv2d(3, WIDTH, 8, 8), nn.Sequential(block(), block())
        self.first, self.end = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.LayerNorm(WIDTH)
        self.say = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        t = self.cut(x).flatten(2).mT
        t = torch.cat([self.first.expand(len(x), -1, -1), t], 1) if self.pool == "class" else t
        t = self.end(self.layers(t))
        scores: Tensor = self.say(t[:, 0] if self.pool == "class" else t.mean(1))
        return scores


class TutorialOracle(Oracle):
    """The dense oracle: each block says its values and its projection itself."""

    def _step(self, block: Any) -> Step:
        before, after = self.seen[block]
        norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm)]
        between = self.seen[norms[1]][0]
        maps = [self.seen[m][1] for m in block.modules() if m in self.seen and type(m) is nn.Identity]
        if isinstance(block, Turned):
            y = block.layer_norm_1(before).transpose(0, 1)
            maps = [block.tokens(y, y, y, need_weights=True, average_attn_weights=False)[1]]
        attention = maps[0] if maps[0].dim() == 4 else torch.stack(maps, 1)
        weight, bias = block.out
        shape = self.batch, attention.shape[2]
        out, offset = weight.expand(*shape, -1, -1), bias.expand(*shape, -1)
        step = Step(attention, block.value(before), before, between, after, out, offset)
        heard = torch.einsum("bhim,bhmd->bihd", attention, step.values).flatten(2)
        update = torch.einsum("bica,bia->bic", out, heard) + offset
        torch.testing.assert_close(update, between - before, atol=1e-9, rtol=0)
        return step


def _case(name: str, block: Callable[[], nn.Module], pool: str = "class") -> Plain:
    prefix, reads = (1, "class token") if pool == "class" else (0, "mean of the tokens")
    make = partial(Tutorial, block, pool)
    return Plain(f"tutorial-{name}", make, (32, 48), (4, 6), (8, 8), prefix, reads)


TUTORIALS = [
    _case("flat", Flat),
    _case("head-by-head", HeadByHead, "mean"),
    _case("beside", Beside),
    _case("small", Small, "mean"),
    _case("nameless", Nameless),
    _case("turned", Turned, "mean"),
]
