"""Slow oracles: dense matrices between all tokens, built without the package's layouts, statistics or rules.

The model runs once more, as a float64 copy without fused kernels, under plain forward hooks. Where a token goes is
found by pushing token ids through the model's own partition code. Every relation is written out as a matrix of all
tokens against all tokens, with one more absorbing state for what padded places take.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from captum_lnstat.rules.relevance import Relevance
from helpers.models import CASES, Case, build, images

Fusion = str | Callable[[Tensor], Tensor]


class DetachedNorm(nn.Module):
    """LayerNorm from its formula, the standard deviation a constant for autograd."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = ((centred**2).mean(-1, keepdim=True) + self.eps).sqrt().detach()
        return centred / deviation * self.weight + self.bias


class DetachedGate(nn.Module):
    """``x * (f(x) / x)``, the second factor a constant for autograd."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        assert bool((x != 0).all())
        return x * (self.function(x) / x).detach()


class DetachedAttention(TorchFunctionMode):
    """Softmax and sigmoid as constants for autograd, and no fused attention."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._explicit(*args, **kwargs)
        output = function(*args, **kwargs)
        if function in (F.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid, F.sigmoid):
            return output.detach()
        return output

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        assert not any(options.values())
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).detach() @ v


class Frozen:
    """Input times gradient through a copy of a model whose norms, gates and attention are detached by hand.

    Attributes:
        attribution: Input times gradient.
        added: What every additive parameter adds to the score, by name: parameter times gradient, image by image.
    """

    ADDITIVE = ("bias", "v_bias", "cls_token", "reg_token", "dist_token", "pos_embed")

    def __init__(self, model: nn.Module, x: Tensor, target: Any) -> None:
        frozen = copy.deepcopy(model)
        for parent in list(frozen.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, DetachedNorm(child))
                elif type(child).__name__ in ("GELU", "SiLU"):  # timm has a GELU of its own
                    setattr(parent, name, DetachedGate(child))
        parameters = {name: p for name, p in frozen.named_parameters() if name.rpartition(".")[2] in self.ADDITIVE}
        images, added = [], []
        for image, c in zip(x, target, strict=True):
            leaf = image[None].clone().requires_grad_()
            with DetachedAttention():
                logits = frozen(leaf)
            torch.testing.assert_close(logits, model(leaf))
            slope, *slopes = torch.autograd.grad(logits[0, c], [leaf, *parameters.values()], allow_unused=True)
            images.append(leaf.detach() * slope)
            parts = zip(parameters.items(), slopes, strict=True)
            added.append({name: float((p.detach() * s).sum()) for (name, p), s in parts if s is not None})
        self.attribution = torch.cat(images)
        self.added = {name: torch.tensor([row[name] for row in added], dtype=x.dtype) for name in added[0]}


def variance(x: Tensor) -> Tensor:
    return ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1)


def deviation(x: Tensor, norm: Any) -> Tensor:
    return (variance(x) + norm.eps).sqrt()


def norm_matrix(x: Tensor, norm: Any) -> Tensor:
    """``diag(gamma / sigma) (I - 1 1^T / n)`` for each token of ``x``: (batch, token, n, n)."""
    n = x.shape[-1]
    centring = torch.eye(n, dtype=x.dtype) - torch.full((n, n), 1 / n, dtype=x.dtype)
    return (norm.weight / deviation(x, norm)[..., None])[..., None] * centring


@dataclass(eq=False)
class DenseBlock:
    """One block. Columns of ``attention`` and ``values``: the tokens, then the padded places of the windows."""

    name: str
    attention: Tensor  # (batch, head, token, column)
    values: Tensor  # (batch, head, column, channel)
    before: Tensor
    update: Tensor
    mlp: Tensor
    out: Tensor  # (batch, token, channel, head * channel): from the joined heads to the update
    offset: Tensor  # (batch, token, channel): what that map adds
    live: Tensor  # probabilities as they were in the model's graph
    place: Callable[[Tensor], Tensor]  # windowed (.., head, query, key) to dense (batch, head, token, column)
    post: bool = False  # the update was normalised, and no norm reads the stream

    @property
    def mean(self) -> Tensor:
        """The mean value of the tokens, padded places left out: (batch, head, channel)."""
        return self.values[:, :, : self.before.shape[1]].mean(2)

    @property
    def apart(self) -> Tensor:
        return self.values - self.mean[:, :, None]

    def by_variance(self, common: Tensor) -> Tensor:
        """What every column accounts for of the variance of every token's update, the positive part, rows to one.

        ``common``, (batch, head, channel), is taken out of all values, and what becomes of it out of the updates.
        """
        heads, channels = self.values.shape[1], self.values.shape[-1]
        total = torch.zeros_like(self.attention[:, 0])
        d = self.update - torch.einsum("bica,ba->bic", self.out, common.flatten(1)) - self.offset
        d = d - d.mean(-1, keepdim=True)
        for h in range(heads):
            out, apart = self.out[..., h * channels : (h + 1) * channels], self.values[:, h] - common[:, None, h]
            for query in range(total.shape[1]):
                f = apart @ out[:, query].transpose(1, 2)  # what every column would add to this token: (b, column, c)
                f = f - f.mean(-1, keepdim=True)
                total[:, query] += self.attention[:, h, query] * (f @ d[:, query, :, None])[..., 0]
        positive = total.clamp(min=0)
        return normalised(torch.where(positive.any(-1, keepdim=True), positive, self.attention.mean(1)))

    @lru_cache(64)  # noqa: B019 - tests of one model follow one another
    def fused(self, fusion: Fusion) -> Tensor:
        if fusion in ("deviation", "variance"):
            return self.by_variance(self.mean if fusion == "deviation" else torch.zeros_like(self.mean))
        if callable(fusion):
            fused = fusion(self.attention)
        else:
            fused = {"mean": Tensor.mean, "max": Tensor.amax, "min": Tensor.amin}[fusion](self.attention, 1)
        return normalised(fused)

    def share(self, form: str) -> Tensor:
        own = variance(self.before)
        if form == "deviation":
            common = torch.einsum("bica,ba->bic", self.out, self.mean.flatten(1)) + self.offset
            own = variance(self.before - self.before.mean(1, keepdim=True))
            return own / (own + variance(self.update - common))
        if form == "half":
            return torch.full_like(own, 0.5)
        if form == "ratio" and not self.post:
            return torch.minimum(own / variance(self.before + self.update), torch.ones_like(own))
        return own / (own + variance(self.update))


@dataclass
class DenseMerging:
    """``children[parent, k]``: the k-th child's token, or -1. ``maps[k]``: from the child to the parent, frozen."""

    children: Tensor
    x: Tensor
    maps: Tensor  # (batch, parent, 4, out, channel)
    offset: Tensor  # (out,)
    variances: Tensor  # (batch, parent, 4)

    def matrix(self, form: str) -> Tensor:
        """(batch, parent, child), rows summing to one."""
        batch, count = len(self.x), self.x.shape[1]
        matrix = self.x.new_zeros(batch, len(self.children), count)
        for parent, children in enumerate(self.children.tolist()):
            for k, child in enumerate(children):
                if child >= 0:
                    matrix[:, parent, child] = 1 if form == "uniform" else self.variances[:, parent, k]
        return normalised(matrix)


def normalised(rows: Tensor) -> Tensor:
    total = rows.sum(-1, keepdim=True)
    return torch.where(total > 0, rows / total.clamp(min=1e-300), rows)


@dataclass
class Answer:
    """What an oracle says: relevance of every token, of padding, and what belongs to no token."""

    tokens: Tensor
    padding: Tensor
    constant: Tensor

    def split(self, case: Case) -> tuple[Tensor, Tensor]:
        """The grid and the prefix."""
        grid = self.tokens[:, case.prefix :].reshape(len(self.tokens), *case.grid)
        return grid, self.tokens[:, : case.prefix]


class Capture:
    """Inputs and outputs of all modules of one forward pass, by module."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        handles = [module.register_forward_hook(self._hook) for module in model.modules()]
        try:
            self.logits = model(x)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self.inputs[module], self.outputs[module] = inputs[0], output


class _Echo(nn.Module):
    """Stands in for attention: remembers what it is given and returns it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen = x
        return x


def window_ids(block: nn.Module, grid: tuple[int, int], batch: int = 1) -> Tensor:
    """Ids in every window of a Swin block, (batch * windows, places): image * tokens + token + 1, and 0 for padding."""
    count = grid[0] * grid[1]
    ids = torch.arange(1, batch * count + 1, dtype=torch.float64).reshape(batch, *grid, 1)
    double = copy.deepcopy(block)
    double.attn = _Echo()
    back = double._attn(ids)
    assert torch.equal(back, ids)  # the block's own way back undoes its way there
    return double.attn.seen[..., 0].long()


def merging_ids(merging: nn.Module, grid: tuple[int, int]) -> Tensor:
    """Tokens that a PatchMerging joins, (parents, 4), in its order; -1 for padding."""
    double = copy.deepcopy(merging)
    double.norm = double.reduction = nn.Identity()
    ids = torch.arange(1, grid[0] * grid[1] + 1, dtype=torch.float64).reshape(1, *grid, 1)
    return double(ids).flatten(0, 2).long() - 1


class Dense:
    """A model on a batch of images as a chain of dense matrices."""

    def __init__(self, case: Case, model: nn.Module, x: Tensor, *, graph: bool = False) -> None:
        self.case = case
        self.model: Any = copy.deepcopy(model).double()
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with torch.set_grad_enabled(graph):
            self.capture = Capture(self.model, x.double())
        self.logits = self.capture.logits
        self.batch = len(x)
        with torch.no_grad():
            self.steps = [self._step(module) for module in self._modules()]

    @property
    def blocks(self) -> list[DenseBlock]:
        return [step for step in self.steps if isinstance(step, DenseBlock)]

    def _modules(self) -> list[nn.Module]:
        if hasattr(self.model, "layers"):
            return [
                module
                for stage in self.model.layers
                for module in (stage.downsample, *stage.blocks)
                if not isinstance(module, nn.Identity)
            ]
        return list(self.model.blocks)

    def _step(self, module: Any) -> DenseBlock | DenseMerging:
        return self._merging(module) if hasattr(module, "reduction") else self._block(module)

    def _merging(self, module: Any) -> DenseMerging:
        x = self.capture.inputs[module]
        ids = merging_ids(module, (x.shape[1], x.shape[2]))
        channels = x.shape[-1]
        x = x.flatten(1, 2)
        weight = module.reduction.weight
        joined = F.pad(x, (0, 0, 0, 1))[:, ids].flatten(2)  # -1 reads the zeros appended
        parts = weight.reshape(len(weight), 4, channels)
        if module.norm.normalized_shape[0] == 4 * channels:
            assert torch.allclose(joined, self.capture.inputs[module.norm].flatten(1, 2))
            whole = weight @ norm_matrix(joined, module.norm)
            offset = weight @ module.norm.bias
            spread = (joined - joined.mean(-1, keepdim=True)).reshape(*joined.shape[:2], 4, channels)
            variances = (spread**2).sum(-1)
        else:
            reduced = joined @ weight.T
            assert torch.allclose(reduced, self.capture.inputs[module.norm].flatten(1, 2))
            whole = norm_matrix(reduced, module.norm) @ weight
            offset = module.norm.bias
            variances = variance(
                torch.stack([joined.unflatten(-1, (4, -1))[..., k, :] @ parts[:, k].T for k in range(4)], 2)
            )
        maps = whole.reshape(*whole.shape[:3], 4, channels).transpose(2, 3)
        return DenseMerging(ids, x, maps, offset, variances)

    def _block(self, block: Any) -> DenseBlock:
        capture, attn = self.capture, block.attn
        before = capture.inputs[block]
        after = capture.outputs[block]
        live = capture.outputs[attn.attn_drop]
        if before.dim() == 4:
            ids = window_ids(block, (before.shape[1], before.shape[2]), self.batch)
        else:
            count = before.shape[1]
            ids = torch.arange(1, self.batch * count + 1).reshape(self.batch, count)
        before, after = before.flatten(1, -2), after.flatten(1, -2)
        place, place_values = _placers(ids, self.batch, before.shape[1])
        post = isinstance(block, ResPostBlock | SwinTransformerV2Block)
        if post:
            update, mlp = capture.outputs[block.norm1].flatten(1, -2), capture.outputs[block.norm2].flatten(1, -2)
        else:
            between = capture.inputs[block.norm2].flatten(1, -2)
            update, mlp = between - before, after - between
        attention, values = place(live), place_values(_values(attn, capture.inputs[attn]))
        out, offset = self._out(block, attention, values, post)
        heard = torch.einsum("bhim,bhmd->bihd", attention, values).flatten(2)
        # The oracle checks itself: the update is what the maps make of attention and values.
        assert torch.allclose(torch.einsum("bica,bia->bic", out, heard) + offset, update, atol=1e-9)
        assert torch.allclose(before + update + mlp, after, atol=1e-9)
        name = next(name for name, module in self.model.named_modules() if module is block)
        return DenseBlock(name, attention, values, before, update, mlp, out, offset, live, place, post)

    def _out(self, block: Any, attention: Tensor, values: Tensor, post: bool) -> tuple[Tensor, Tensor]:
        """The affine map of every token from its joined heads to its attention update: matrices and offsets."""
        attn = block.attn
        heard = torch.einsum("bhim,bhmd->bihd", attention, values).flatten(2)
        size = heard.shape[-1]
        matrix = torch.eye(size, dtype=heard.dtype).expand(*heard.shape, size)
        offset = torch.zeros_like(heard)
        if isinstance(getattr(attn, "norm", None), nn.LayerNorm):
            matrix, offset = norm_matrix(heard, attn.norm), attn.norm.bias.expand_as(heard)
        if getattr(attn, "gate", None) is not None:
            gate = self.capture.outputs[attn.gate].sigmoid()
            matrix, offset = gate[..., None] * matrix, gate * offset
        weight = attn.proj.weight
        matrix, offset = weight @ matrix, offset @ weight.T
        if attn.proj.bias is not None:
            offset = offset + attn.proj.bias
        if hasattr(getattr(block, "ls1", None), "gamma"):
            matrix, offset = block.ls1.gamma[:, None] * matrix, offset * block.ls1.gamma
        if post:
            x = torch.einsum("bica,bia->bic", matrix, heard) + offset
            norm = norm_matrix(x, block.norm1)
            matrix, offset = norm @ matrix, torch.einsum("bicd,bid->bic", norm, offset) + block.norm1.bias
        return matrix, offset

    # The head.

    def score(self, target: Tensor, contrastive: bool = False, logits: Tensor | None = None) -> Tensor:
        logits = self.logits if logits is None else logits
        rows = []
        for row, c in zip(logits, target.tolist(), strict=True):
            value = row[c]
            if contrastive:
                p = row.detach().exp() / row.detach().exp().sum()
                for k in range(len(row)):
                    if k != c:
                        value = value - p[k] / (1 - p[c]) * row[k]
            rows.append(value)
        return torch.stack(rows)

    @cached_property
    def _detached(self) -> Any:
        """The model with detached norms."""
        model = copy.deepcopy(self.model)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, DetachedNorm(child))
        return model

    def cotangent(self, target: Tensor, contrastive: bool = False) -> tuple[Tensor, Tensor]:
        """``u`` of the stream after the last block, from autograd through detached norms, and what the head adds."""
        head = self._detached
        x = self.capture.inputs[self.model.norm].detach().requires_grad_()
        with torch.enable_grad():
            logits = head.forward_head(head.norm(x))
            score = self.score(target, contrastive, logits)
            (u,) = torch.autograd.grad(score.sum(), [x])
        assert torch.allclose(logits, self.logits)
        constant = score.detach() - (u * x.detach()).flatten(1).sum(1)
        return u.flatten(1, -2), constant

    def start(self, fusion: Fusion) -> Tensor:
        case, last = self.case, self.blocks[-1].before
        row = torch.zeros(self.batch, last.shape[1], dtype=last.dtype)
        if case.start == "class":
            row[:, 0] = 1
        elif case.start == "distilled":
            row[:, 0] = row[:, 1] = 0.5
        elif case.start == "all":
            row[:] = 1 / row.shape[1]
        elif case.start == "patches":
            row[:, case.prefix :] = 1 / (row.shape[1] - case.prefix)
        else:
            row[:, case.prefix :] = self._pool(fusion)
        return row

    def _pool(self, fusion: Fusion) -> Tensor:
        pool = self.model.attn_pool
        q, kv = self.capture.outputs[pool.q].detach(), self.capture.outputs[pool.kv].detach()
        q = q.reshape(self.batch, -1, pool.num_heads, pool.head_dim).transpose(1, 2)
        k = kv[..., : kv.shape[-1] // 2].reshape(self.batch, -1, pool.num_heads, pool.head_dim).transpose(1, 2)
        attention = (q @ k.transpose(-2, -1) / pool.head_dim**0.5).softmax(-1)
        if callable(fusion):
            return normalised(fusion(attention))[:, 0]
        fusion = "mean" if fusion in ("deviation", "variance") else fusion
        fused = {"mean": Tensor.mean, "max": Tensor.amax, "min": Tensor.amin}[fusion](attention, 1)
        return normalised(fused)[:, 0]

    # The rules.

    def relations(self, residual: str, fusion: Fusion, merging: str) -> list[Tensor]:
        """``R`` of every step, first to last, with an absorbing last state for what padded places take."""
        found = []
        for step in self.steps:
            if isinstance(step, DenseMerging):
                found.append(_absorbing(step.matrix(merging), step.x.shape[1]))
            else:
                alpha = step.share(residual)[..., None]
                mixed = (1 - alpha) * step.fused(fusion)
                count = step.before.shape[1]
                mixed[..., :count] += alpha * torch.eye(count, dtype=alpha.dtype)
                found.append(_absorbing(mixed, count))
        return found

    def rollout(self, residual: str = "deviation", fusion: Fusion = "variance", merging: str = "uniform") -> Answer:
        relations = self.relations(residual, fusion, merging)
        product = relations[-1]
        for relation in reversed(relations[:-1]):
            product = product @ relation
        row = F.pad(self.start(fusion), (0, 1))[:, None] @ product
        return Answer(row[:, 0, :-1], row[:, 0, -1], torch.zeros(self.batch, dtype=row.dtype))

    def raw_attention(self, block: int = -1, fusion: Fusion = "mean") -> Answer:
        """The chosen block's dense attention and the mergings' matrices; every other block is left out."""
        chosen, product = self.blocks[block], self._nothing()
        for step in self.steps:
            if isinstance(step, DenseMerging):
                product = _absorbing(step.matrix("uniform"), step.x.shape[1]) @ product
            elif step is chosen:
                product = _absorbing(step.fused(fusion), step.before.shape[1]) @ product
        row = F.pad(self.start(fusion), (0, 1))[:, None] @ product
        return Answer(row[:, 0, :-1], row[:, 0, -1], torch.zeros(self.batch, dtype=row.dtype))

    def _nothing(self) -> Tensor:
        return _absorbing(torch.eye(self.steps[0].before.shape[1]).double().expand(self.batch, -1, -1), -1)

    def evidence(
        self,
        target: Tensor,
        *,
        contrastive: bool = False,
        residual: str = "deviation",
        fusion: Fusion = "deviation",
        merging: str = "uniform",
        since: int = 0,
        prefix: int = 0,
    ) -> Answer:
        """``since``: of what is read before this block, patches get what tells them apart, and share it by sizes."""
        u, constant = self.cotangent(target, contrastive)
        r = torch.zeros_like(u[..., 0])
        lost = torch.zeros_like(constant)
        for step in reversed(self.steps):
            if isinstance(step, DenseMerging):
                r = (r[:, None] @ step.matrix(merging))[:, 0]
                constant = constant + (u @ step.offset).sum(1)
                below = torch.zeros_like(step.x)
                for parent, children in enumerate(step.children.tolist()):
                    for k, child in enumerate(children):
                        if child >= 0:
                            below[:, child] = (u[:, parent, None] @ step.maps[:, parent, k])[:, 0]
                u = below
                continue
            count = step.before.shape[1]
            if since and step is self.blocks[since - 1]:
                tokens = step.before + step.update + step.mlp
                common = tokens[:, prefix:].mean(1)
                for token in range(tokens.shape[1]):
                    own = (u[:, token] * (tokens[:, token] - common)).sum(-1) if token >= prefix else 0.0
                    r = torch.cat([r[:, :token], (r[:, token] + own)[:, None], r[:, token + 1 :]], 1)
                    constant = constant + (u[:, token] * tokens[:, token]).sum(-1) - own
                u = torch.zeros_like(u)
            r = r + (u * step.mlp).sum(-1)
            said = torch.zeros_like(step.attention[:, 0, 0])
            pulled = torch.einsum("bic,bica->bia", u, step.out)
            heads, channels, apart = step.values.shape[1], step.values.shape[-1], step.apart
            for h in range(heads):
                w = pulled[..., h * channels : (h + 1) * channels]
                for key in range(said.shape[1]):
                    # Over the queries i: A^h_ij (u_i W_O^h) . (v^h_j - mean v^h)
                    said[:, key] += (step.attention[:, h, :, key] * (w @ apart[:, h, key, :, None])[..., 0]).sum(1)
            common = torch.einsum("bica,ba->bic", step.out, step.mean.flatten(1)) + step.offset
            constant = constant + (u * common).sum((1, 2)) + said[:, count:].sum(1)
            share = step.share(residual)
            if since and [block is step for block in self.blocks].index(True) < since:
                of_sizes = 1 / (1 + ((1 - share) / share) ** 0.5)
                share = torch.cat([share[:, :prefix], of_sizes[:, prefix:]], 1)
            rolled = (((1 - share) * r)[:, None] @ step.fused(fusion))[:, 0]
            lost = lost + rolled[:, count:].sum(1)
            r = share * r + rolled[:, :count] + said[:, :count]
        return Answer(r + (u * self.steps[0].before).sum(-1), lost, constant)

    def gradient(
        self,
        target: Tensor,
        *,
        keep: bool = False,
        normalize: bool = False,
        residual: str = "deviation",
        merging: str = "uniform",
        contrastive: bool = False,
    ) -> Answer:
        """``R <- R + E_h[(dA * A)^+] R`` of Chefer et al., or with token statistics, through explicit attention."""
        live = [block.live for block in self.blocks]
        grads = list(torch.autograd.grad(self.score(target, contrastive).sum(), live, retain_graph=True))
        with torch.no_grad():
            return self._roll(grads, keep=keep, normalize=normalize, residual=residual, merging=merging)

    def _roll(self, grads: list[Tensor], *, keep: bool, normalize: bool, residual: str, merging: str) -> Answer:
        total = self._nothing()
        for step in self.steps:
            if isinstance(step, DenseMerging):
                total = _absorbing(step.matrix(merging), step.x.shape[1]) @ total
                continue
            weighted = step.place((grads.pop(0) * step.live).clamp(min=0)).mean(1)
            count = step.before.shape[1]
            alpha = torch.ones_like(step.before[..., 0]) if keep else step.share(residual)
            if normalize:
                sums = weighted.sum(-1, keepdim=True)
                weighted = (1 - alpha)[..., None] * weighted / sums.where(sums > 1e-24, torch.full_like(sums, 1e-24))
            weighted[..., :count] += torch.diag_embed(alpha)
            total = _absorbing(weighted, count) @ total
        row = F.pad(self.start("mean"), (0, 1))[:, None] @ total
        return Answer(row[:, 0, :-1], row[:, 0, -1], torch.zeros(self.batch, dtype=row.dtype))

    # Is there anything to see?

    @cached_property
    def liveliness(self) -> dict[str, float]:
        """Of a model as timm initialises it, all of these are near zero or one: a wrong formula would hide there."""
        shares = [block.share("ratio").detach() for block in self.blocks]
        entropy = []
        for block in self.blocks:
            a = block.attention.detach().clamp(min=1e-300)
            visible = (a > 1e-12).sum(-1).max().double()
            entropy.append(float(-(a * a.log()).sum(-1).mean() / visible.log()))
        return {
            "share spread": max(float(share.max() - share.min()) for share in shares),
            "least share spread": min(float(share.max() - share.min()) for share in shares),
            "shares below one": min(float((share < 0.999).double().mean()) for share in shares),
            "highest relative entropy": max(entropy),
            "lowest relative entropy": min(entropy),
            "logit": float(self.logits.detach().abs().max()),
            "logit spread": float(self.logits.detach().std(1).min()),
        }

    def assert_lively(self) -> None:
        found = self.liveliness
        # In a post-norm block every update has the variance that its norm gives it: shares differ by the stream alone.
        post = any(block.post for block in self.blocks)
        assert found["share spread"] > (0.15 if post else 0.3), found
        assert found["least share spread"] > (0.05 if post else 0.1), found
        assert found["shares below one"] > 0.5, found
        assert found["highest relative entropy"] < 0.93, found
        assert found["lowest relative entropy"] > 0.1, found
        assert 1 < found["logit"] < 30, found
        assert found["logit spread"] > 0.3, found


def _absorbing(matrix: Tensor, count: int) -> Tensor:
    """Add the lost state: what goes to columns past ``count`` ends there, and what is there stays."""
    batch, rows, columns = matrix.shape
    count = columns if count < 0 else count
    square = matrix.new_zeros(batch, rows + 1, count + 1)
    square[:, :rows, :count] = matrix[..., :count]
    square[:, :rows, count] = matrix[..., count:].sum(-1)
    square[:, rows, count] = 1
    return square


def _placers(ids: Tensor, batch: int, count: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From windows to dense: every token its row and column, every padded place a column of its own."""
    columns = torch.empty_like(ids)
    image = [0] * len(ids)
    padded = [0] * batch
    for w, row in enumerate(ids.tolist()):
        owners = {(i - 1) // count for i in row if i > 0}
        assert len(owners) == 1
        image[w] = owner = owners.pop()
        for m, i in enumerate(row):
            if i > 0:
                columns[w, m] = (i - 1) % count
            else:
                columns[w, m] = count + padded[owner]
                padded[owner] += 1
    assert len(set(padded)) == 1
    width = count + padded[0]

    def place(windowed: Tensor) -> Tensor:
        dense = windowed.new_zeros(batch, windowed.shape[1], width, width)
        for w in range(len(ids)):
            where = columns[w]
            dense[image[w]][:, where[:, None], where[None]] = windowed[w]
        return dense[:, :, :count].detach()

    def place_values(windowed: Tensor) -> Tensor:
        dense = windowed.new_zeros(batch, windowed.shape[1], width, windowed.shape[-1])
        for w in range(len(ids)):
            dense[image[w]][:, columns[w]] = windowed[w]
        return dense

    return place, place_values


def _values(attn: Any, x: Tensor) -> Tensor:
    """(windows, head, place, channel), from the attention's input and weights."""
    size = attn.qkv.out_features // 3
    bias = attn.qkv.bias[2 * size :] if attn.qkv.bias is not None else getattr(attn, "v_bias", None)
    v = x @ attn.qkv.weight[2 * size :].T
    v = v if bias is None else v + bias
    return v.reshape(*x.shape[:2], attn.num_heads, -1).transpose(1, 2)


@cache
def dense(name: str, seed: int = 0, batch: int = 2, graph: bool = False) -> Dense:
    """The oracle of a case, kept for the tests that share it; fails for a model too dull to test with."""
    case = CASES[name]
    oracle = Dense(case, build(name, seed), images(case, batch, seed), graph=graph)
    oracle.assert_lively()
    return oracle


def out_of_focus(grid: Tensor) -> Tensor:
    """Every patch as the mean over all, weighted by a Gaussian of a 28th of the side."""
    down, across = (length / 28 for length in grid.shape)
    result = torch.zeros_like(grid)
    for row, column in itertools.product(range(grid.shape[0]), range(grid.shape[1])):
        weights = torch.zeros_like(grid)
        for i, j in itertools.product(range(grid.shape[0]), range(grid.shape[1])):
            weights[i, j] = math.exp(-(((i - row) / down) ** 2 + ((j - column) / across) ** 2) / 2)
        result[row, column] = (weights * grid).sum() / weights.sum()
    return result


def middle_heavy(attention: Tensor) -> Tensor:
    """A fusion that is none of the named ones: heads weighted by their number."""
    weights = torch.arange(1.0, attention.shape[1] + 1, dtype=attention.dtype)
    return (attention * weights[:, None, None]).sum(1) / weights.sum()


def assert_same(found: Relevance, expected: Answer, name: str, rtol: float = 1e-9) -> None:
    grid, prefix = expected.split(CASES[name])
    size = float(expected.tokens.abs().max())
    for got, want in ((found.grid, grid), (found.prefix, prefix), (found.padding, expected.padding)):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= rtol * size if got.numel() else True
    assert torch.allclose(found.constant.double(), expected.constant, rtol=rtol, atol=rtol * max(1.0, size))
