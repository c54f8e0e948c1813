"""A slow oracle for hierarchical models: dense matrices between all tokens, nothing of the package's geometry.

The model runs once as a float64 copy. Everything that is added to its stream is cut from the graph where it is added,
LayerNorms keep their deviation constant, so the gradient at an addition is the cotangent of the stream there: through
shortcuts, poolings and norms alone. Which token is where is found by pushing token ids through the model's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Spy(TorchFunctionMode):
    """Explicit attention, kept with its values; LayerNorms with a constant deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[tuple[Tensor, Tensor]] = []
        self.norm_inputs: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v, *_ = args
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            if kwargs.get("attn_mask") is not None:
                scores = scores + kwargs["attn_mask"]
            self.attention.append((scores.softmax(-1).detach(), v.detach()))
            return self.attention[-1][0] @ v
        if function is F.layer_norm:
            named = dict(zip(("input", "shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
            x, weight, bias, eps = (named[name] for name in ("input", "weight", "bias", "eps"))
            self.norm_inputs.append(x.detach())
            centred = x - x.mean(-1, keepdim=True)
            return centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt().detach() * weight + bias
        return function(*args, **kwargs)


class CaughtError(Exception):
    """Token ids where the model's code has put them."""


class Net(nn.Module):
    """Stops the ids."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        raise CaughtError(x)


def caught(run: Callable[[], Any]) -> Tensor:
    try:
        run()
    except CaughtError as stop:
        return stop.args[0]
    raise AssertionError("no ids came by")


@dataclass
class Step:
    """One addition to the stream, or one change of its tokens.

    Attributes:
        kind: ``"attention"``, ``"add"``, ``"tokens"``, or ``"order"`` for one that was done before the stream began.
        module: Whose output is added.
        queries: Token after the step at each place of each window; -1 for padding.
        keys: Token before the step at each place of each window, and by how much.
        share: ``(token after, token before)``: what a token gives to those under it.
    """

    kind: str
    module: nn.Module | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    share: Tensor | None = None
    out: Any = None
    scale: Tensor | None = None
    base: Callable[[], Tensor] | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)


def tokens(x: Tensor, width: int) -> Tensor:
    """``(token, channel)`` of the one image."""
    x = x[0]
    if x.dim() == 3:
        x = x if x.shape[-1] == width else x.permute(1, 2, 0)
        x = x.reshape(-1, width)
    return x


def variance(x: Tensor) -> Tensor:
    return ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1)


def cell_share(grid: tuple[int, int], after: tuple[int, int], stride: int) -> Tensor:
    """What a token gives to each of the tokens in its cell of ``stride`` by ``stride``: the same."""
    share = torch.zeros(after[0] * after[1], grid[0] * grid[1], dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            if row // stride < after[0] and column // stride < after[1]:  # a stride rounded down leaves some unread
                share[row // stride * after[1] + column // stride, row * grid[1] + column] = 1
    return share / share.sum(-1, keepdim=True)


def one_hot(windows: Tensor, count: int) -> Tensor:
    """``(window, place, token)`` with zeros for padding."""
    return F.one_hot(windows + 1, count + 1)[..., 1:].double()


class Oracle:
    """Rollout and evidence of one image."""

    def __init__(self, model: nn.Module, x: Tensor, target: int) -> None:
        model = copy.deepcopy(model).double().eval()
        self.model = model
        with torch.no_grad():
            first, steps = STEPS[next(kind for kind in STEPS if isinstance(model, kind))](model, x)
        leaves: list[Tensor] = []
        streams: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        added = {step.module: step for step in steps if step.module is not None}

        def cut(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            streams[module] = (leaf, leaf)
            return leaf

        def start(module: nn.Module, inputs: Any) -> Any:
            leaves.append(inputs[0].detach().requires_grad_())
            return (leaves[0], *inputs[1:])

        handles = [module.register_forward_hook(cut) for module in added]
        handles.append(first.register_forward_pre_hook(start))
        with Spy() as spy, torch.enable_grad():
            score = model(x.double())[0, target]
            outputs = [streams[step.module][0] for step in steps if step.module is not None]
            slopes = torch.autograd.grad(score, [leaves[0], *outputs])
        for handle in handles:
            handle.remove()
        self.score, self.spy, self.steps = float(score.detach()), spy, steps
        width = slopes[0].shape[-1]
        self.start = (tokens(leaves[0].detach(), width), tokens(slopes[0], width))
        self.said = dict(zip(added, zip(outputs, slopes[1:], strict=True), strict=True))

    def explain(self) -> tuple[Tensor, Tensor, float]:
        """Rollout and evidence at the first stream's tokens, and the constant's part by difference."""
        attention = list(self.spy.attention)
        last = next(s for s in reversed(self.steps) if s.module is not None)
        count = len(tokens(*self._wide(last, 0)))
        r = torch.full((count,), 1 / count, dtype=torch.float64)
        e = torch.zeros(count, dtype=torch.float64)
        for step in reversed(self.steps):
            if step.kind == "order":
                continue
            if step.kind == "tokens":
                r, e = r @ step.share, e @ step.share
            elif step.kind == "add":
                value, slope = (tokens(*self._wide(step, which)) for which in (0, 1))
                e = e + (value * slope).sum(-1)
            else:
                r, e = self._attention(step, *attention.pop(), r, e)
        x, u = self.start
        e = e + (x * u).sum(-1)
        for step in self.steps:
            if step.kind == "order":
                r, e = r @ step.share, e @ step.share
        return r, e, self.score - float(e.sum())

    def _wide(self, step: Step, which: int) -> tuple[Tensor, int]:
        tensor = self.said[step.module][which].detach()
        return tensor, step.out.weight.shape[0] if step.out is not None else self._width(tensor, step)

    def _width(self, tensor: Tensor, step: Step) -> int:
        return int(step.seen["width"])

    def _attention(self, step: Step, p: Tensor, v: Tensor, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        if p.dim() == 5:  # (1, head, window, query, key)
            p, v = p[0].transpose(0, 1), v[0].transpose(0, 1)
        after = int(step.queries.max()) + 1
        q = one_hot(step.queries, after)
        k = step.keys if step.keys.is_floating_point() else one_hot(step.keys, int(step.keys.max()) + 1)
        update, slope = (tokens(*self._wide(step, which)) for which in (0, 1))
        weight, bias = step.out.weight.detach(), torch.zeros(()) if step.out.bias is None else step.out.bias.detach()
        if step.scale is not None:
            weight, bias = step.scale.detach()[:, None] * weight, step.scale.detach() * bias
        real = k.sum(-1)[:, None, :, None]  # padded places are no keys
        mean = (v * real).sum((0, 2)) / real.sum()
        base = step.base(self)
        own = variance(base - base.mean(0))
        share = own / (own + variance(update - weight @ mean.flatten() - bias))

        def relation(m: Tensor) -> Tensor:
            """By what each key accounts for of the variance of the update, without what ``m`` makes of both."""
            e = torch.einsum("wqi,ic->wqc", q, update - weight @ m.flatten() - bias)
            maps = weight.unflatten(-1, m.shape)
            brought = torch.einsum("chd,whkd->whkc", maps, v - m[:, None])
            e, brought = e - e.mean(-1, keepdim=True), brought - brought.mean(-1, keepdim=True)
            accounted = (p * torch.einsum("wqc,whkc->whqk", e, brought)).sum(1).clamp(min=0)
            assert bool(accounted.any(-1)[q.any(-1)].all())
            accounted = accounted / accounted.sum(-1, keepdim=True).clamp(min=1e-300)
            return torch.einsum("wqi,wqk,wkj->ij", q, accounted, k)

        # What each token's values said beyond the mean value: sum_h sum_i A^h_ij (u_i W^h) . (v^h_j - mean v^h)
        pulled = (slope @ weight).unflatten(-1, (p.shape[1], -1))
        heard = torch.einsum("wqi,ihd->whqd", q, pulled)
        said = torch.einsum("whqk,whqd,whkd,wkj->j", p, heard, v - mean[:, None], k)

        def below(row: Tensor, m: Tensor) -> Tensor:
            kept = share * row
            return (kept if step.share is None else kept @ step.share) + ((1 - share) * row) @ relation(m)

        return below(r, torch.zeros_like(mean)), below(e, mean) + said


def before_norm(index: int) -> Callable[[Oracle], Tensor]:
    """The stream as the norm that ran as number ``index`` read it."""
    return lambda oracle: oracle.spy.norm_inputs[index].reshape(-1, oracle.spy.norm_inputs[index].shape[-1])


def _maxvit(model: Any, x: Tensor) -> tuple[nn.Module, list[Step]]:
    steps, norms, first, grid = [], 0, None, None
    for stage in model.stages:
        for block in stage.blocks:
            x_grid = _grid_after(model, block.conv, x)
            if grid is not None:
                if x_grid != grid:
                    steps.append(Step("tokens", share=cell_share(grid, x_grid, 2)))
                steps.append(Step("add", block.conv.conv3_1x1, seen={"width": block.conv.conv3_1x1.out_channels}))
            grid = x_grid
            for partition in (block.attn_block, block.attn_grid):
                first = first or partition
                ids = torch.arange(grid[0] * grid[1]).reshape(1, *grid, 1)
                kept, partition.attn = partition.attn, Net()
                windows = caught(lambda p=partition, i=ids: p._partition_attn(i)).flatten(1)
                partition.attn = kept
                # Its update as it is added: behind LayerScale and stochastic depth, on the whole map.
                step = Step("attention", partition.drop_path1, windows, windows, out=kept.proj, base=before_norm(norms))
                step.scale = getattr(partition.ls1, "gamma", None)
                steps.append(step)
                steps.append(Step("add", partition.mlp, seen={"width": kept.proj.out_features}))
                norms += 2
    return first, steps


def _grid_after(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[int, int]:
    seen: list[tuple[int, int]] = []
    handle = module.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[-2:])))
    model(x.double())
    handle.remove()
    return seen[0]


def _pvt(model: Any, x: Tensor) -> tuple[nn.Module, list[Step]]:
    steps, norms = [], 1  # the first norm is the patch embedding's
    grid = _grid_after(model, model.patch_embed.proj, x)
    for number, stage in enumerate(model.stages):
        if number:
            later = _grid_after(model, stage.downsample.proj, x)
            steps.append(Step("tokens", share=cell_share(grid, later, 2)))
            grid, norms = later, norms + 1
        for block in stage.blocks:
            count = grid[0] * grid[1]
            reduced = block.attn.sr is not None
            keys = torch.eye(count, dtype=torch.float64)[None]
            if block.attn.pool is not None:
                keys = _averaged(block.attn.pool, grid)
            elif reduced:
                small = grid[0] // block.attn.sr.stride[0], grid[1] // block.attn.sr.stride[0]
                keys = cell_share(grid, small, block.attn.sr.stride[0])[None]
            steps.append(
                Step(
                    "attention",
                    block.attn,
                    torch.arange(count)[None],
                    keys,
                    out=block.attn.proj,
                    base=before_norm(norms),
                )
            )
            steps.append(Step("add", block.mlp, seen={"width": block.attn.proj.out_features}))
            norms += 2 + reduced
        norms += 1
    return model.stages[0].blocks[0], steps


def _averaged(pool: nn.Module, grid: tuple[int, int]) -> Tensor:
    """Which tokens a pooling averages, by what it makes of one token alone, in equal parts."""
    alone = torch.eye(grid[0] * grid[1], dtype=torch.float64).reshape(-1, 1, *grid)
    seen = pool(alone).flatten(1).T.ne(0).double()
    return (seen / seen.sum(-1, keepdim=True))[None]


def _hiera(model: Any, x: Tensor) -> tuple[nn.Module, list[Step]]:
    steps, norms = [], 0
    count = model.tokens_spatial_shape[0] * model.tokens_spatial_shape[1]
    where = model.unroll(torch.arange(count).reshape(1, count, 1)).flatten()  # the patch at each place
    for block in model.blocks:
        attn, stride = block.attn, block.attn.q_stride
        ids = torch.arange(count)
        windows = count // (stride * attn.window_size) if attn.use_mask_unit_attn else 1
        keys = ids.reshape(-1, windows).T
        later = count // stride
        queries = torch.arange(later).reshape(-1, windows).T
        base, share = before_norm(norms), None
        if block.do_expand:
            share = torch.zeros(later, count, dtype=torch.float64)
            for token in range(count):
                share[token % later, token] = 1 / stride
            base = _expanded(block, norms, stride)
        steps.append(Step("attention", attn, queries, keys, share=share, out=attn.proj, base=base))
        steps.append(Step("add", block.mlp, seen={"width": block.dim_out}))
        norms, count = norms + 2, later
    back = torch.zeros(len(where), len(where), dtype=torch.float64)
    back[torch.arange(len(where)), where] = 1
    return model.blocks[0], [Step("order", share=back), *steps]


def _expanded(block: Any, index: int, stride: int) -> Callable[[Oracle], Tensor]:
    def base(oracle: Oracle) -> Tensor:
        x = oracle.spy.norm_inputs[index]
        wide = block.proj(block.norm1(x))
        return wide.view(1, stride, -1, wide.shape[-1]).amax(1)[0].detach()

    return base


STEPS: dict[type[nn.Module], Callable[[Any, Tensor], tuple[nn.Module, list[Step]]]] = {
    MaxxVit: _maxvit,
    Hiera: _hiera,
    PyramidVisionTransformerV2: _pvt,
}
