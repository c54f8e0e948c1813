"""The dense oracle for plain encoders: where a library keeps what is named, the matrices are written out.

The model runs once more, as a float64 copy without fused kernels, under plain forward hooks. Attention comes from what
the library itself returns of it. Windows are found by pushing token ids through the model's own partition code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer_sam import window_partition
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.oracles import DetachedNorm, normalised, variance
from helpers.plain_models import Plain


class _DetachedNorm2d(DetachedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _DetachedRMSNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = (norm,)

    def forward(self, x: Tensor) -> Tensor:
        weight, _, deviation, _ = _parts_of_norm(self.norm[0], x)
        return weight * x / deviation.detach()


def _parts_of_norm(norm: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias, what ``x`` is divided by, and the matrix that takes the mean out of ``x``."""
    count = x.shape[-1]
    if isinstance(norm, nn.LayerNorm):
        bias = torch.zeros(count).double() if norm.bias is None else norm.bias
        centring = torch.eye(count).double() - 1 / count
        return norm.weight, bias, (variance(x) + norm.eps).sqrt()[..., None], centring
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps or torch.finfo(torch.float64).eps
    weight = 1 + norm.g if hasattr(norm, "g") else norm.weight
    root = ((x**2).mean(-1, keepdim=True) + epsilon).sqrt()
    return weight, torch.zeros(count).double(), root, torch.eye(count).double()


@dataclass
class Step:
    """One block. Columns of ``attention`` and ``values``: the tokens, then the padded places of the windows."""

    attention: Tensor  # (batch, head, token, column)
    values: Tensor  # (batch, head, column, channel)
    before: Tensor
    between: Tensor
    after: Tensor
    out: Tensor  # (batch, token, channel, head * channel): from the joined heads to the update
    offset: Tensor  # (batch, token, channel)
    part: slice = field(default_factory=lambda: slice(None))  # the tokens that the block sees
    centred: bool = True  # the stream is read by LayerNorms; by RMSNorms if not
    leaves: tuple[Tensor, Tensor, Tensor] | None = None  # post-norm: two frozen norms as matrices, and the MLP's update

    @property
    def mean(self) -> Tensor:
        """The mean value of the tokens, padded places left out: (batch, head, channel)."""
        return self.values[:, :, : self.before.shape[1]][:, :, self.part].mean(2)

    def common(self, m: Tensor) -> Tensor:
        """What every token's update would be if all values were ``m``, weighted with the sums of the maps' rows."""
        heard = self.attention.sum(-1).transpose(1, 2)[..., None] * m[:, None]
        return torch.einsum("bica,bia->bic", self.out, heard.flatten(2)) + self.offset

    def share(self) -> Tensor:
        """How much of each token was there before: of what sets it apart from the mean of all that are seen."""
        own = self._spread(self.before - self.before[:, self.part].mean(1, keepdim=True))
        return own / (own + self._spread(self.between - self.before - self.common(self.mean)))

    def _spread(self, x: Tensor) -> Tensor:
        return variance(x) if self.centred else (x**2).mean(-1)

    def relation(self, m: Tensor) -> Tensor:
        """What every column accounts for of the variance of every token's update, without what ``m`` makes of both."""
        e = self.between - self.before - self.common(m)
        e = e - e.mean(-1, keepdim=True) if self.centred else e
        heads, size = self.values.shape[1], self.values.shape[-1]
        total = torch.zeros_like(self.attention[:, 0])
        for head in range(heads):
            out = self.out[..., head * size : (head + 1) * size]
            for column in range(total.shape[-1]):
                brought = torch.einsum("bica,ba->bic", out, self.values[:, head, column] - m[:, head])
                brought = brought - brought.mean(-1, keepdim=True) if self.centred else brought
                total[..., column] += self.attention[:, head, :, column] * (brought * e).mean(-1)
        positive = total.clamp(min=0)
        plain = self.attention.mean(1).clamp(min=0)
        return normalised(torch.where(positive.any(-1, keepdim=True), positive, plain))


def first(module: Any, *names: str) -> Any:
    """The first of some dotted attributes that is there."""
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module | Tensor) and not isinstance(found, nn.Identity):
            return found
    return None


def blocks_of(model: Any) -> list[Any]:
    paths = ("blocks", "encoder.layers", "layers", "encoder.layer", "model.layer", "mix.layers")
    for root in (
        model,
        *(
            getattr(model, name, None)
            for name in ("vision_model", "trunk", "vit", "deit", "dinov2", "videomae", "vivit")
        ),
    ):
        for name in ("", "dinov2_with_registers.", "beit."):
            found = first(root, *(name + path for path in paths)) if root is not None else None
            if found is not None:
                return list(found)
    raise AssertionError("no blocks")


def _takes_tokens_first(attention: Any) -> bool:
    return isinstance(attention, nn.MultiheadAttention) and not attention.batch_first


class Oracle:
    """A case's model on a batch of images as a chain of dense matrices."""

    def __init__(self, case: Plain, model: nn.Module, x: Tensor) -> None:
        self.case, self.batch = case, len(x)
        self.model: Any = copy.deepcopy(model).double()
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
            if hasattr(module, "set_attn_implementation"):
                module.set_attn_implementation("eager")
        self.seen: dict[nn.Module, tuple[Tensor, Any]] = {}
        handles = [m.register_forward_hook(self._hook, with_kwargs=True) for m in self.model.modules()]
        with torch.no_grad():
            logits = self.model(x.double())
        for handle in handles:
            handle.remove()
        self.logits: Tensor = getattr(logits, "logits", logits)
        self.x = x.double()
        with torch.no_grad():
            self.steps = [self._step(block) for block in self._blocks()]

    def _blocks(self) -> list[Any]:
        return blocks_of(self.model)

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else next((v for v in keywords.values() if isinstance(v, Tensor)), None)
        self.seen[module] = (given, output)

    def _step(self, block: Any) -> Step:
        attn = first(block, "attn", "attention", "self_attention", "self_attn")
        second = first(block, "norm2", "layernorm_after", "layer_norm2", "ln_2", "rms_norm2")
        before, after = self.seen[block][0], self.seen[block][1]
        between = self.seen[second][0].reshape(before.shape)
        attention, values = self._attention(block, attn)
        turned, leaves = _takes_tokens_first(attn), None
        if getattr(block, "norm_first", True) is False:
            leaves = self._leaves(block, turned)
            between = after = self.seen[block.norm1][0]
        if turned:
            before, between, after = (t.transpose(0, 1) for t in (before, between, after))
        before, between, after = (t.flatten(1, -2) for t in (before, between, after))
        out, offset = self._out(block, attn, attention, values)
        heard = torch.einsum("bhim,bhmd->bihd", attention, values).flatten(2)
        # The oracle checks itself: the update is what the maps make of attention and values.
        update = torch.einsum("bica,bia->bic", out, heard) + offset
        torch.testing.assert_close(update, between - before, atol=1e-9, rtol=0)
        centred = isinstance(second, nn.LayerNorm)
        return Step(attention, values, before, between, after, out, offset, centred=centred, leaves=leaves)

    def _leaves(self, block: Any, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
        matrices = []
        for norm in (block.norm1, block.norm2):
            weight, _, deviation, centring = _parts_of_norm(norm, self.seen[norm][0])
            matrix = (weight / deviation)[..., None] * centring
            matrices.append(matrix.transpose(0, 1) if turned else matrix)
        mlp = self.seen[block.norm2][0] - self.seen[block.norm1][1]
        return matrices[0], matrices[1], mlp.transpose(0, 1) if turned else mlp

    def _attention(self, block: Any, attn: Any) -> tuple[Tensor, Tensor]:
        x = self.seen[attn][0]
        if isinstance(attn, nn.MultiheadAttention):
            _, attention = attn(x, x, x, need_weights=True, average_attn_weights=False)
            x = x.transpose(0, 1) if _takes_tokens_first(attn) else x
            *_, weight = attn.in_proj_weight.chunk(3)
            bias = None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[2]
            return attention, self._heads(F.linear(x, weight, bias), attn.num_heads)
        if hasattr(attn, "attn_drop"):  # timm
            attention = self.seen[attn.attn_drop][1]
            heads = attn.num_heads
            if x.dim() == 4:
                return self._windows(block, attention, self._timm_values(attn, x.flatten(1, 2)), heads)
            return attention, self._heads(self._timm_values(attn, x), heads)
        attention = self.seen[attn][1][1]
        return attention, self._heads(self.seen[attn.v_proj][1], attention.shape[1])

    def _timm_values(self, attn: Any, x: Tensor) -> Tensor:
        if first(attn, "v_proj") is not None:
            values: Tensor = attn.v_proj(x)
            return values
        weight, bias = attn.qkv.weight.chunk(3)[2], attn.qkv.bias
        if bias is not None:
            bias = bias.chunk(3)[2]
        elif getattr(attn, "v_bias", None) is not None:
            bias = attn.v_bias
        return F.linear(x, weight, bias)

    def _heads(self, values: Tensor, heads: int) -> Tensor:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _windows(self, block: Any, attention: Tensor, values: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Window by window, by ids that went through timm's own partition; 0 is padding."""
        rows, columns = self.case.grid
        count = rows * columns
        ids = torch.arange(1, self.batch * count + 1).reshape(self.batch, rows, columns, 1).double()
        if block.window_size:
            ids, _ = window_partition(ids, block.window_size)
        ids = ids.flatten(1).long()
        attention = attention.reshape(len(ids), heads, *attention.shape[-2:])
        values = self._heads(values, heads)
        padded = int((ids == 0).sum()) // self.batch
        dense = attention.new_zeros(self.batch, heads, count, count + padded)
        dense_values = values.new_zeros(self.batch, heads, count + padded, values.shape[-1])
        used = [0] * self.batch
        for window, members in enumerate(ids.tolist()):
            image = (next(i for i in members if i) - 1) // count
            places = []
            for member, i in enumerate(members):
                if i:
                    places.append((i - 1) % count)
                else:
                    places.append(count + used[image])
                    used[image] += 1
                dense_values[image, :, places[-1]] = values[window, :, member]
            for member, i in enumerate(members):
                if i:
                    dense[image, :, (i - 1) % count, places] = attention[window, :, member]
        return dense, dense_values

    def _out(self, block: Any, attn: Any, attention: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        proj = first(attn, "proj", "o_proj", "out_proj", "output.dense")
        tokens = attention.shape[2]
        size = proj.in_features
        matrix = torch.eye(size).double().expand(self.batch, tokens, size, size)
        offset = torch.zeros(self.batch, tokens, size).double()
        norm = first(attn, "norm")
        if norm is not None:
            joined = torch.einsum("bhim,bhmd->bihd", attention, values).flatten(2)
            weight, bias, deviation, centring = _parts_of_norm(norm, joined)
            matrix, offset = (weight / deviation)[..., None] * centring, bias.expand_as(offset)
        matrix, offset = proj.weight @ matrix, F.linear(offset, proj.weight, proj.bias)
        scale = first(block, "ls1.gamma", "gamma_1", "lambda_1", "layer_scale1.lambda1")
        if scale is not None:
            matrix, offset = scale[:, None] * matrix, scale * offset
        return matrix, offset

    def start(self) -> Tensor:
        """Where class-agnostic relevance starts."""
        if self.case.start is not None:
            return self.case.start.expand(self.batch, -1)
        pool = first(self.model, "attn_pool", "trunk.head.attention")
        if isinstance(pool, nn.MultiheadAttention):
            keys = self.seen[first(self.model, "trunk.post_layernorm")][1]
            probe = self.model.trunk.head.probe.expand(self.batch, -1, -1)
            weights: Tensor = pool(probe, keys, keys, need_weights=True)[1]
            return weights[:, 0].detach()
        x = self.seen[pool][0]
        query = pool.q_norm(pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2))
        key = pool.k_norm(pool.kv(x).unflatten(-1, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2))
        return (query @ key.mT / pool.head_dim**0.5).softmax(-1).mean(1)[:, 0].detach()

    def perception(self) -> Tensor:
        """Relevance of every token at the image."""
        r = self.start()
        for step in reversed(self.steps):
            r = self._roll(r, step, torch.zeros_like(step.mean))
        return r

    def _roll(self, r: Tensor, step: Step, m: Tensor) -> Tensor:
        """Below a block, by its relation less ``m``."""
        tokens, keep, relation = r.shape[1], step.share(), step.relation(m)
        identity = torch.eye(tokens, relation.shape[-1]).double()
        relation = keep[..., None] * identity + (1 - keep)[..., None] * relation
        return torch.einsum("bi,bij->bj", r, relation)[:, :tokens]

    def cotangent(self, target: Tensor) -> Tensor:
        """The gradient of the target's logit after the last block, the norms behind it frozen."""
        model = copy.deepcopy(self.model)
        blocks = blocks_of(model)
        inside = {id(part) for block in blocks for part in block.modules()}
        for parent in [m for m in model.modules() if id(m) not in inside]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm):
                    kind = _DetachedNorm2d if type(child).__name__ == "LayerNorm2d" else DetachedNorm
                    setattr(parent, name, kind(child))
                elif "rmsnorm" in type(child).__name__.lower():
                    setattr(parent, name, _DetachedRMSNorm(child))
        leaves: list[Tensor] = []

        def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[0]

        blocks[-1].register_forward_hook(cut)
        logits = model(self.x)
        logits = getattr(logits, "logits", logits)
        torch.testing.assert_close(logits, self.logits)
        (u,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), leaves)
        attention = first(blocks[-1], "attn", "attention", "self_attention", "self_attn")
        return u.transpose(0, 1) if _takes_tokens_first(attention) else u.flatten(1, -2)

    def evidence(self, target: Tensor) -> Tensor:
        """Evidence of every token at the image."""
        u = self.cotangent(target)
        r = torch.zeros(u.shape[:2]).double()
        tokens = u.shape[1]
        for step in reversed(self.steps):
            if step.leaves is not None:
                one, two, mlp = step.leaves
                u = torch.einsum("bic,bica->bia", u, two)
                r = r + (u * mlp).sum(-1)
                u = torch.einsum("bic,bica->bia", u, one)
            said = torch.einsum("bic,bica->bia", u, step.out).unflatten(-1, (step.values.shape[1], -1))
            apart = step.values - step.mean[:, :, None]
            heard = torch.einsum("bihd,bhij,bhjd->bj", said, step.attention, apart)[:, :tokens]
            r = r + (u * (step.after - step.between)).sum(-1)
            r = self._roll(r, step, step.mean) + heard
        return r + (u * self.steps[0].before).sum(-1)
