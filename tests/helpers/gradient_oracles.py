"""Slow references of published methods: dense matrices and autograd through attention written out, in float64.

From the same dense chain as ``helpers.oracles``, without the package's layouts, rules, recorded scores or replayed
heads: the model's own head is called, and gradients are taken at the attention maps themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.models import targets
from helpers.oracles import Answer, Capture, Dense, DenseBlock, DenseMerging, dense


def answer(tokens: Tensor) -> Answer:
    nothing = tokens.new_zeros(len(tokens))
    return Answer(tokens, nothing, nothing)


class Reference:
    """One model on a batch of images."""

    def __init__(self, name: str) -> None:
        self.chain: Dense = dense(name, graph=True)
        self.model = self.chain.model
        self.target = targets(self.chain.batch)
        self.score = self.chain.score(self.target).sum()
        modules = dict(self.model.named_modules())
        self.module = {step.name: modules[step.name] for step in self.chain.blocks}

    def slopes(self) -> dict[str, Tensor]:
        """``dy/dA`` of every block, window by window."""
        blocks = self.chain.blocks
        found = torch.autograd.grad(self.score, [block.live for block in blocks], retain_graph=True)
        return {block.name: slope for block, slope in zip(blocks, found, strict=True)}

    def down(self, values: Tensor, step: DenseMerging) -> Tensor:
        """Even parts for the children."""
        return (values[:, None] @ step.matrix("uniform"))[:, 0]

    def added_up(self, maps: dict[str, Tensor]) -> Answer:
        """One value a token for every block, taken to the image."""
        total = torch.zeros_like(self.chain.start("mean"))
        for step in reversed(self.chain.steps):
            total = total + maps[step.name] if isinstance(step, DenseBlock) else self.down(total, step)
        return answer(total.detach())

    def places(self, block: DenseBlock) -> int:
        return block.live.shape[-2]

    # LeGrad.

    def head(self, token: Tensor, like: Tensor) -> Tensor:
        """The class's score where every token at the end is ``token``."""
        tokens = token.reshape(len(token), *[1] * (like.dim() - 2), -1).expand(like.shape)
        return self.chain.score(self.target, logits=self.model.forward_head(self.model.norm(tokens))).sum()

    def legrad(self) -> Answer:
        end = self.chain.capture.inputs[self.model.norm]
        maps, pulled = {}, None
        for step in reversed(self.chain.steps):
            if isinstance(step, DenseMerging):
                pulled = self._direction(end) if pulled is None else pulled
                below = torch.zeros_like(step.x)
                for parent, children in enumerate(step.children.tolist()):
                    for k, child in enumerate(children):
                        if child >= 0:
                            below[:, child] = (pulled[:, parent, None] @ step.maps[:, parent, k])[:, 0]
                pulled = below
                continue
            tokens = self.chain.capture.outputs[self.module[step.name]]
            flat = tokens.flatten(1, -2)
            own = self.head(flat.mean(1), end) if pulled is None else (flat * pulled).sum()
            (slope,) = torch.autograd.grad(own, [step.live], retain_graph=True)
            positive = step.place(slope.clamp(min=0))[..., : flat.shape[1]]
            maps[step.name] = positive.sum(2).mean(1) / self.places(step) / len(self.chain.blocks)
        return self.added_up(maps)

    def _direction(self, end: Tensor) -> Tensor:
        flat = end.detach().flatten(1, -2)
        mean = flat.mean(1).requires_grad_()
        (slope,) = torch.autograd.grad(self.head(mean, end), [mean])
        return (slope / flat.shape[1])[:, None].expand_as(flat)

    # AGCAM.

    def given(self, block: DenseBlock) -> Tensor:
        """What the softmax of a block was given."""
        attn: Any = self.module[block.name].attn
        inputs = self.chain.capture.inputs
        if hasattr(attn, "softmax"):
            return inputs[attn.softmax]
        x = inputs[attn]
        q, k, _ = (x @ attn.qkv.weight.T + (0 if attn.qkv.bias is None else attn.qkv.bias)).chunk(3, -1)
        q, k = (part.reshape(*x.shape[:2], attn.num_heads, -1).transpose(1, 2) for part in (q, k))
        return attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) / q.shape[-1] ** 0.5

    def agcam(self) -> Answer:
        slopes, read, maps = self.slopes(), self.chain.start("mean"), {}
        for step in reversed(self.chain.steps):
            if isinstance(step, DenseMerging):
                read = self.down(read, step)
                continue
            assert torch.allclose(self.given(step).softmax(-1), step.live)
            guided = slopes[step.name].clamp(min=0) / (1 + torch.exp(-self.given(step)))
            full = step.place(guided).sum(1)[..., : step.before.shape[1]]
            maps[step.name] = (read[:, None] @ full)[:, 0]
        return self.added_up(maps)

    # AttCAT.

    def attcat(self) -> Answer:
        outputs = [self.chain.capture.outputs[self.module[block.name]] for block in self.chain.blocks]
        found = torch.autograd.grad(self.score, outputs, retain_graph=True)
        maps = {}
        for block, tokens, slope in zip(self.chain.blocks, outputs, found, strict=True):
            attended = block.attention[..., : block.before.shape[1]].sum(2).mean(1) / self.places(block)
            maps[block.name] = attended * (tokens * slope).sum(-1).flatten(1)
        return self.added_up(maps)

    # Beyond Intuition.

    def feedback(self, steps: int) -> Tensor:
        """``F``, dense: (batch, token, column)."""
        last, total = self.chain.blocks[-1], 0
        x = self.chain.capture.inputs[self.model]
        for k in range(1, steps + 1):
            capture = Capture(self.model, x * k / steps)
            live = capture.outputs[self.module[last.name].attn.attn_drop]
            score = self.chain.score(self.target, logits=capture.logits).sum()
            total = total + torch.autograd.grad(score, [live])[0] / steps
        return last.place(total.clamp(min=0)).mean(1)

    def beyond_intuition(self, approximation: str, steps: int) -> Answer:
        slopes = self.slopes()
        p = torch.eye(self.chain.start("mean").shape[1]).double().expand(self.chain.batch, -1, -1)
        f = None
        for step in reversed(self.chain.steps):
            if isinstance(step, DenseMerging):
                p = p @ step.matrix("uniform")
                f = f if f is None else f @ (step.matrix("uniform") > 0).double()
                continue
            count = step.before.shape[1]
            if f is None:
                f = self.feedback(steps)[..., :count]
            if approximation == "token":
                values = step.values[:, :, :count].transpose(1, 2).flatten(2)
                written = torch.einsum("bica,bia->bic", step.out, values)
                bar = step.attention.mean(1)[..., :count] * (written.norm(dim=-1) / step.before.norm(dim=-1))[:, None]
            else:
                each = step.place(slopes[step.name] * step.live).sum((2, 3)).abs()
                bar = torch.einsum("bh,bhij->bij", each / each.sum(1, keepdim=True), step.attention)[..., :count]
            p = p @ (bar + torch.eye(count).double())
        return answer((self.chain.start("mean")[:, None] @ (p * f))[:, 0].detach())
