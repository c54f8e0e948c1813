"""LibraGrad from its definition: every bias of every layer as a leaf of its own for each token, in float64.

Norms, gates and attention are detached by hand in a copy of the model, as in ``oracles.Frozen``. A bias in front of the
windows of a Swin is taken back to its token by the model's own partition code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import GELU
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.models import CASES, build, images
from helpers.oracles import DenseBlock, DetachedAttention, DetachedGate, DetachedNorm, merging_ids, window_ids


class Biased(nn.Module):
    """A Linear or a norm whose bias is a leaf for every token."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.bias = inner, inner.bias
        self.weight = inner.weight

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        y = F.linear(x, inner.weight) if isinstance(inner, nn.Linear) else inner(x) - inner.bias
        self.leaf = self.bias.detach().expand_as(y).clone().requires_grad_()
        return y + self.leaf


def taken_apart(model: nn.Module) -> Any:
    """A copy with everything detached that is not affine, and with biases that are leaves."""
    double = copy.deepcopy(model)
    for parent in list(double.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, Biased(DetachedNorm(child)))
            elif isinstance(child, nn.Linear) and child.bias is not None:
                setattr(parent, name, Biased(child))
            elif isinstance(child, nn.GELU | GELU):
                setattr(parent, name, DetachedGate(child))
    return double


class Libra:
    """``T`` at the input of every step, biases of every step, and matrices from a step's tokens to those above."""

    def __init__(self, name: str, target: Tensor, batch: int = 2) -> None:
        self.case, model = CASES[name], build(name)
        for parameter in (p for key, p in model.named_parameters() if key.endswith("v_bias")):
            parameter.data.zero_()  # no Linear of its own
        self.model, self.x = model, images(self.case, batch)
        double = taken_apart(model)
        inputs: dict[Any, Tensor] = {}

        def keep(module: nn.Module, args: Any) -> Any:
            leaf = inputs[module] = args[0].clone()
            return (leaf, *args[1:])

        steps = self.steps_of(double)
        for step in steps:
            step.register_forward_pre_hook(keep)
        double.norm.register_forward_pre_hook(keep)
        with DetachedAttention():
            logits = double(self.x)
        assert torch.allclose(logits, model(self.x))
        self.score = logits.detach()[torch.arange(batch), target]
        leaves = [module for module in double.modules() if isinstance(module, Biased)]
        tokens = [inputs[step] for step in (*steps, double.norm)]
        slopes = torch.autograd.grad(
            logits[torch.arange(batch), target].sum(), [*tokens, *(one.leaf for one in leaves)], allow_unused=True
        )
        added = {}
        for module, slope in zip(leaves, slopes[len(tokens) :], strict=True):
            if slope is not None:
                added[module] = (module.leaf.detach() * slope).sum(-1)
        *self.inputs, self.end = [
            (x.detach() * s).sum(-1).flatten(1) for x, s in zip(tokens, slopes[: len(tokens)], strict=True)
        ]
        self.biases, self.down, self.places = [], [], []
        self.is_block = []
        for step, original, x in zip(steps, self.steps_of(model), tokens, strict=False):
            merging, count = hasattr(step, "reduction"), x.flatten(1, -2).shape[1]
            self.is_block.append(not merging)
            ids = None
            if not merging and x.dim() == 4:
                ids = window_ids(original, (x.shape[1], x.shape[2]), batch)
            if merging:
                self.down.append(children(merging_ids(original, (x.shape[1], x.shape[2])), count))
            self.places.append(count if ids is None else ids.shape[1])
            total = None
            for key, module in step.named_modules():
                if module in added:
                    values = added[module]
                    if ids is not None and key.startswith("attn."):
                        values = off_windows(values, ids, batch, count)
                    values = values.flatten(1)
                    total = values if total is None else total + values
            self.biases.append(total)

    @staticmethod
    def steps_of(model: Any) -> list[Any]:
        if not hasattr(model, "layers"):
            return list(model.blocks)
        steps = [step for stage in model.layers for step in (stage.downsample, *stage.blocks)]
        return [step for step in steps if not isinstance(step, nn.Identity)]

    def lowered(self, at_each: list[tuple[int, Tensor]]) -> Tensor:
        """The sum of values at the inputs of steps (for a merging's biases: at its outputs), at the first tokens."""
        total = None
        for index, values in at_each:
            for place in reversed(range(index)):
                if not self.is_block[place]:
                    values = values @ self.down[sum(not block for block in self.is_block[:place])]
            total = values if total is None else total + values
        assert total is not None
        return total

    def full_gradient(self) -> Tensor:
        """The embedding's part, the inputs of all steps, and all their biases."""
        parts = [(0, self.inputs[0])]
        parts += list(enumerate(self.inputs))
        for index, values in enumerate(self.biases):
            if values is not None:
                parts.append((index + (not self.is_block[index]), values))
        return self.lowered(parts)

    def attentive(self, blocks: list[DenseBlock]) -> Tensor:
        """``sum_l a_l T_l``: ``T`` after a block, and the mean over heads and the queries that see a token."""
        parts, blocks, after = [], list(blocks), [*self.inputs[1:], self.end]
        for index, block in enumerate(self.is_block):
            if block:
                attention = blocks.pop(0).attention[..., : after[index].shape[1]]
                a = attention.sum(2).mean(1) / self.places[index]
                parts.append((index, a * after[index]))
        return self.lowered(parts)


def off_windows(values: Tensor, ids: Tensor, batch: int, count: int) -> Tensor:
    """Values of the places of windows at their tokens; those of padding are left out."""
    found = values.new_zeros(batch * count + 1)
    found[ids.flatten()] = values.flatten()
    return found[1:].reshape(batch, count)


def children(ids: Tensor, count: int) -> Tensor:
    """(parent, token): an even share for every child of a parent."""
    matrix = torch.zeros(len(ids), count, dtype=torch.float64)
    for parent, row in enumerate(ids.tolist()):
        real = [child for child in row if child >= 0]
        for child in real:
            matrix[parent, child] = 1 / len(real)
    return matrix
