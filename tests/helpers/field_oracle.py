"""A slow oracle for images of any size: fields of one number a token, sent through the model's own code.

``oracles.py`` writes every relation out as a matrix of all tokens against all tokens, which does not fit for large
images. Here one field at a time goes through the model's own roll, padding, partition and merging, with attention
replaced by the maps that were seen, and autograd says what a row vector before a step is. The model runs without fused
attention, and again block by block from the streams that were kept. Neither the package's layouts nor its statistics
or rules are used. For one image; timm's ViT with a class token and Swin of the first version.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from helpers.oracles import DetachedNorm


class Mixing(nn.Module):
    """Stands in for attention: a field mixed by maps, (window, query, key)."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, field: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.maps @ field


class Speaking(nn.Module):
    """Stands in for attention: the last channel is a field that the values, less their mean, are multiplied with."""

    def __init__(self, attn: Any, maps: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.attn, self.maps, self.mean = attn, maps, mean
        assert isinstance(getattr(attn, "norm", None), nn.Identity | None)
        assert getattr(attn, "gate", None) is None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x, field = x[..., :-1], x[..., -1:]
        values = (values_of(self.attn, x) - self.mean) * field[:, None] + self.mean
        update = self.attn.proj((self.maps @ values).transpose(1, 2).flatten(2))
        return torch.cat([update, torch.zeros_like(field)], -1)  # as many channels as came


class Averaging(nn.Module):
    """Stands in for attention: the mean value of all places at which the last channel is one, head by head."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        values, real = values_of(self.attn, x[..., :-1]), x[:, None, :, -1:]
        self.mean = (values * real).sum((0, 2), keepdim=True) / real.sum()
        return x


class Weighing(nn.Module):
    """Stands in for attention, and is given ``gamma`` times what the update of every token is apart from its mean.

    Keeps the maps in which every source has its share of the update's variance.
    """

    def __init__(self, attn: Any, maps: Tensor, mean: Tensor, gamma: Tensor, channels: int) -> None:
        super().__init__()
        self.attn, self.maps, self.mean, self.gamma, self.channels = attn, maps, mean, gamma, channels

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens, update = x[..., : self.channels], x[..., self.channels :]
        apart = values_of(self.attn, tokens) - self.mean
        total = torch.zeros_like(self.maps[:, 0])
        width = apart.shape[-1]
        for head in range(apart.shape[1]):
            told = apart[:, head] @ self.attn.proj.weight[:, head * width : (head + 1) * width].T * self.gamma
            told = told - told.mean(-1, keepdim=True)
            total += self.maps[:, head] * (update @ told.transpose(-2, -1))
        total = total.clamp(min=0)
        rows = total.sum(-1, keepdim=True)
        # Padded places have no update: what they take from whom is nothing that reaches a token.
        self.weighed = torch.where(rows > 0, total / torch.where(rows > 0, rows, 1), self.maps.mean(1))
        return x


def values_of(attn: Any, x: Tensor) -> Tensor:
    """(window, head, place, channel)."""
    return attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))[..., 2, :, :].transpose(1, 2)


class Sharing(nn.Module):
    """Stands in for the LayerNorm of a merging: the share-weighted sum of the children's field."""

    def __init__(self, shares: Tensor) -> None:
        super().__init__()
        self.shares = shares

    def forward(self, children: Tensor) -> Tensor:
        return (children * self.shares).sum(-1, keepdim=True)


@dataclass
class Field:
    """Relevance of the patches, and of the prefix tokens."""

    grid: Tensor
    prefix: Tensor


def spread(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)


def slope(y: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, at)


def one_by_one(weights: Tensor, maps: Tensor) -> Tensor:
    """``E_h[(dA * A)^+]``, rows divided by their sum; one head at a time."""
    total = torch.zeros_like(maps[:, 0])
    for head in range(maps.shape[1]):
        total += (weights[:, head] * maps[:, head]).clamp(min=0)
    rows = total.sum(-1, keepdim=True)
    return total / rows.clamp(min=1e-24)  # less than that is nothing


class FieldOracle:
    """Rollout, evidence, ``lnstat`` and ``gradient`` with the settings that are not given, in the model's dtype."""

    def __init__(self, model: nn.Module, x: Tensor, target: int) -> None:
        assert len(x) == 1
        self.model: Any = copy.deepcopy(model).eval()
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if hasattr(self.model, "layers"):
            stages = [(stage.downsample, *stage.blocks) for stage in self.model.layers]
            self.steps = [step for stage in stages for step in stage if not isinstance(step, nn.Identity)]
            self.prefix = 0
        else:
            assert self.model.global_pool == "token"
            self.steps, self.prefix = list(self.model.blocks), self.model.num_prefix_tokens
        self.streams: dict[nn.Module, Tensor] = {}
        self._keep_streams(x)
        self.size = self.model.patch_embed.dynamic_feat_size(x.shape[-2:])
        self.target = target

    def _keep_streams(self, x: Tensor) -> None:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.streams[module] = inputs[0]

        read = [*self.steps, *(step.norm2 for step in self.steps if hasattr(step, "norm2")), self.model.norm]
        handles = [module.register_forward_pre_hook(keep) for module in read]
        with torch.no_grad():
            self.logits = self.model(x)
        for handle in handles:
            handle.remove()
        # A stream after one step is the one before the next, or what the final LayerNorm read.
        self.after = {s: self.streams[t] for s, t in zip(self.steps, [*self.steps[1:], self.model.norm], strict=True)}

    def _at_the_head(self, frozen: bool) -> Tensor:
        """Gradient of the score in the stream after the last block."""
        model = self.model
        if frozen:
            model = copy.copy(model)
            model._modules = dict(model._modules, norm=DetachedNorm(model.norm))
            assert isinstance(getattr(model, "fc_norm", None), nn.Identity | None)
        x = self.streams[self.model.norm].clone().requires_grad_()
        logits = model.forward_head(model.norm(x))
        assert torch.allclose(logits.detach(), self.logits, rtol=1e-4, atol=1e-4)
        return slope(logits[0, self.target], x)[0]

    def start(self) -> Tensor:
        tokens = torch.zeros_like(self.streams[self.model.norm][..., :1])
        if self.prefix:
            tokens[:, 0] = 1
            return tokens
        return torch.ones_like(tokens) / tokens.numel()

    def share(self, block: Any, mean: Tensor) -> Tensor:
        """``var(x - mean x) / (var(x - mean x) + var(e))``."""
        x = self.streams[block]
        own = spread(x - x.mean(tuple(range(1, x.dim() - 1)), keepdim=True))
        return own / (own + spread(self._update(block) - self._common(block, mean)))

    def _common(self, block: Any, value: Tensor) -> Tensor:
        """The update that a value would make if all tokens had it."""
        return getattr(block, "ls1", nn.Identity())(block.attn.proj(value.flatten()))

    def _update(self, block: Any) -> Tensor:
        x = self.streams[block]
        return self.streams[block.norm2].reshape(x.shape) - x

    def _mean_value(self, block: Any) -> Tensor:
        x, averaging = block.norm1(self.streams[block]), Averaging(block.attn)
        self.through(block, averaging, torch.cat([x, torch.ones_like(x[..., :1])], -1))
        return averaging.mean

    def _weighed(self, block: Any, maps: Tensor, common: Tensor) -> Tensor:
        """What each source accounts for of the variance of a token's update, what all have in common left out."""
        x, d = block.norm1(self.streams[block]), self._update(block)
        d = d - self._common(block, common)
        gamma = getattr(getattr(block, "ls1", None), "gamma", torch.ones_like(d[0, 0]).flatten()[: d.shape[-1]])
        weighing = Weighing(block.attn, maps, common, gamma, x.shape[-1])
        self.through(block, weighing, torch.cat([x, d - d.mean(-1, keepdim=True)], -1))
        return weighing.weighed

    def merging_shares(self, joined: Tensor, real: Tensor) -> Tensor:
        """(.., parent, child): of the sum over all children of ``(x - mean)^2``; nothing for what was padded."""
        squares = (joined - joined.mean(-1, keepdim=True)).square().unflatten(-1, (4, -1)).sum(-1) * real
        return squares / squares.sum(-1, keepdim=True)

    def through(self, block: Any, attention: nn.Module, field: Tensor) -> Tensor:
        """A field through the block's own way to its attention and back, the attention replaced."""
        if not hasattr(block, "_attn"):
            return attention(field)
        own, block.attn = block.attn, attention
        try:
            return block._attn(field)
        finally:
            block.attn = own

    def run(self) -> dict[str, Field]:
        """All rules at once: the maps of a block are made, used and dropped."""
        self.u, self.g = self._at_the_head(frozen=True), self._at_the_head(frozen=False)
        self.seen, self.shown = self.start(), self.start()
        self.said = self.counted = torch.zeros_like(self.seen)
        self.peaks: list[float] = []
        for step in reversed(self.steps):
            (self._merging if hasattr(step, "reduction") else self._block)(step)
        tokens = self.streams[self.steps[0]]
        self.said = self.said + (self.u * tokens).sum(-1, keepdim=True)
        found = {
            "rollout": self._split(self.seen),
            "evidence": self._split(self.said),
            "gradient": self._split(self.shown),
        }
        grid = self._in_favour(self._split(self.counted if self.prefix else self.said).grid)
        return {**found, "lnstat": Field(grid, torch.zeros_like(found["rollout"].prefix))}

    def _block(self, block: Any) -> None:
        before = self.streams[block].clone().requires_grad_()
        handle = block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: live.append(output))
        live: list[Tensor] = []
        after = block(before)
        handle.remove()
        assert torch.allclose(after.detach(), self.after[block], rtol=1e-3, atol=1e-3)
        pulled, weights = slope((self.g * after).sum(), before, live[0])
        maps = live.pop().detach()
        del after
        self.g = pulled
        positive = one_by_one(weights, maps)
        del weights, pulled
        with torch.no_grad():
            mean = self._mean_value(block)
            alpha = self.share(block, mean)
            weighed, whole = (self._weighed(block, maps, common) for common in (mean, torch.zeros_like(mean)))
        self.shown = self._roll(block, positive, self.shown, alpha)
        del positive
        self.peaks.append(float(maps.mean(1).amax(-1).mean()))
        between = self.streams[block.norm2].reshape(self.u.shape)
        mlp = (self.u * (self.after[block] - between)).sum(-1, keepdim=True)
        spoken = self._spoken(block, maps, mean)
        self.seen = self._roll(block, whole, self.seen, alpha)
        self.said = self._roll(block, weighed, self.said + mlp, alpha) + spoken
        if self.prefix:  # of a ViT, what the upper third of the blocks contributed
            upper, share = self.steps.index(block) >= 2 * len(self.steps) // 3, alpha.clone()
            if not upper:
                share[:, self.prefix :] = 1 / (1 + ((1 - alpha) / alpha).sqrt())[:, self.prefix :]
            self.counted = self._roll(block, weighed, self.counted + mlp * upper, share) + spoken * upper

    def _roll(self, block: Any, maps: Tensor, row: Tensor, alpha: Tensor) -> Tensor:
        """``alpha r + ((1 - alpha) r) A``: what a field before the block has to do with it after the block."""
        field = torch.zeros_like(row).requires_grad_()
        (handed,) = slope((self.through(block, Mixing(maps), field) * (1 - alpha) * row).sum(), field)
        return alpha * row + handed

    def _spoken(self, block: Any, maps: Tensor, mean: Tensor) -> Tensor:
        """What every token's values, less their mean, did to ``<u, update>``."""
        x = self.streams[block]
        field = torch.ones_like(x[..., :1]).requires_grad_()
        told = torch.cat([block.norm1(x), field], -1)
        update = getattr(block, "ls1", nn.Identity())(
            self.through(block, Speaking(block.attn, maps, mean), told)[..., :-1]
        )
        window = getattr(block, "window_size", (1, 1))
        if x.dim() == 3 or not any(n % w for n, w in zip(x.shape[1:3], window, strict=True)):
            # With the field as it is nothing is changed; padded places are multiplied with zero.
            assert torch.allclose(x + update.detach(), self.streams[block.norm2].reshape(x.shape), rtol=1e-3, atol=1e-3)
        return slope((self.u * update).sum(), field)[0]

    def _merging(self, merging: Any) -> None:
        x = self.streams[merging].clone().requires_grad_()
        (self.g,) = slope((self.g * merging(x)).sum(), x)
        frozen = copy.copy(merging)
        frozen._modules = dict(merging._modules, norm=DetachedNorm(merging.norm))
        joins = copy.copy(merging)
        joins._modules = dict(merging._modules, norm=nn.Identity(), reduction=nn.Identity())
        (self.u,) = slope((self.u * frozen(x)).sum(), x)
        x = x.detach()
        shares = self.merging_shares(joins(x), joins(torch.ones_like(x[..., :1])))
        joins._modules["norm"] = Sharing(shares)
        rows = []
        for row in (self.seen, self.said, self.shown):
            field = torch.zeros_like(x[..., :1]).requires_grad_()
            rows += slope((row * joins(field)).sum(), field)
        self.seen, self.said, self.shown = rows

    def _split(self, row: Tensor) -> Field:
        row = row.reshape(1, -1)
        return Field(row[:, self.prefix :].reshape(1, *self.size), row[:, : self.prefix])

    def _in_favour(self, said: Tensor) -> Tensor:
        """``max(G, 0)``, ``G`` the evidence, smoothed by a 28th of its sides."""
        return out_of_focus(said[0], [n / 28 for n in self.size])[None].clamp(min=0)


def out_of_focus(grid: Tensor, sigma: list[float]) -> Tensor:
    """Mean around every patch, weighted by a Gaussian, nothing beyond the border; through Fourier space in float64."""
    rows, columns = grid.shape
    size = (2 * rows, 2 * columns)
    down, across = ((torch.arange(2 * n).double() + n) % (2 * n) - n for n in (rows, columns))
    kernel = torch.exp(-((down[:, None] / sigma[0]) ** 2 + (across[None] / sigma[1]) ** 2) / 2)
    weights = torch.fft.rfft2(kernel)
    both = torch.stack([grid.double(), torch.ones_like(grid).double()])
    total, weight = torch.fft.irfft2(torch.fft.rfft2(both, s=size) * weights, s=size)[:, :rows, :columns]
    return (total / weight).to(grid.dtype)
