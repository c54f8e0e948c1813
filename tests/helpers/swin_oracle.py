"""The dense oracle for Swin models of other libraries: what differs is named, the matrices are those of ``oracles``.

Where a token goes is found by pushing token ids through the library's own partition code.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from helpers.models import Case
from helpers.oracles import (
    Capture,
    Dense,
    DenseBlock,
    DenseMerging,
    DetachedNorm,
    _Echo,
    _placers,
    norm_matrix,
    variance,
)


class Library(ABC):
    """Where a library keeps the parts of a Swin.

    Attributes:
        post: The norms read the updates, not the stream.
    """

    post: bool

    @abstractmethod
    def steps(self, model: Any) -> list[Any]:
        """Blocks and mergings in the order in which they run."""

    @abstractmethod
    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The norms of attention and MLP."""

    @abstractmethod
    def out(self, block: Any) -> nn.Linear:
        """From the joined heads to the update."""

    def scale(self, block: Any) -> Tensor | None:
        """What the update is multiplied by, channel by channel."""
        return None

    @abstractmethod
    def values(self, block: Any, x: Tensor) -> Tensor:
        """Values, heads joined, from what the attention reads."""

    @abstractmethod
    def window_ids(self, block: Any, grid: tuple[int, int], batch: int) -> Tensor:
        """(batch * windows, places): image * tokens + token + 1, and 0 for padding."""

    @abstractmethod
    def merging_ids(self, merging: Any, grid: tuple[int, int]) -> Tensor:
        """(parents, 4): the joined tokens, and -1 for padding."""

    @abstractmethod
    def end(self, model: Any, capture: Capture) -> Tensor:
        """The stream after the last step."""

    def trailing(self, block: Any) -> nn.Module | None:
        """A norm through which the stream leaves the block."""
        return None

    @abstractmethod
    def head(self, model: Any, tokens: Tensor) -> Tensor:
        """Logits from the stream after the last step."""


class Softmaxes(TorchFunctionMode):
    """The probabilities of every attention, in order; the fused kernel is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            scores = q @ k.transpose(-2, -1) * kwargs["scale"] + kwargs["attn_mask"]
            self.seen.append(torch.softmax(scores, -1))
            return self.seen[-1] @ v
        if function in (F.softmax, Tensor.softmax, torch.softmax):
            kwargs.pop("dtype", None)
            self.seen.append(function(*args, **kwargs))
            return self.seen[-1]
        return function(*args, **kwargs)


class SwinDense(Dense):
    """``Dense`` for a Swin whose parts a ``Library`` knows."""

    def __init__(
        self, library: Library, model: nn.Module, x: Tensor, grid: tuple[int, ...], *, graph: bool = False
    ) -> None:
        self.library, self.batch = library, len(x)
        self.case = Case("swin", lambda: model, (x.shape[2], x.shape[3]), grid, (4, 4), "patches")
        self.model = copy.deepcopy(model).double()
        with torch.set_grad_enabled(graph), Softmaxes() as softmaxes:
            self.capture = Capture(self.model, x.double())
        logits: Any = self.capture.logits
        self.logits = logits if isinstance(logits, Tensor) else logits.logits
        self._live, self._grid = iter(softmaxes.seen), grid
        with torch.no_grad():
            self.steps = [step for module in library.steps(self.model) for step in self._steps(module)]
        assert next(self._live, None) is None

    def _steps(self, module: Any) -> list[DenseBlock | DenseMerging]:
        norm = self.library.trailing(module)
        return [self._step(module)] if norm is None else [self._step(module), self._trailing(norm)]

    def _trailing(self, norm: Any) -> DenseMerging:
        """Every token is its own only child."""
        x = self.capture.inputs[norm].flatten(1, -2)
        itself = torch.arange(x.shape[1])[:, None]
        return DenseMerging(itself, x, norm_matrix(x, norm)[:, :, None], norm.bias, torch.ones(len(x), x.shape[1], 1))

    def _merging(self, module: Any) -> DenseMerging:
        ids = self.library.merging_ids(module, self._grid)
        self._grid = (*self._grid[:-2], (self._grid[-2] + 1) // 2, (self._grid[-1] + 1) // 2)
        x = self.capture.inputs[module]
        x = x.flatten(1, -2)
        channels, weight = x.shape[-1], module.reduction.weight
        joined = F.pad(x, (0, 0, 0, 1))[:, ids].flatten(2)
        if module.norm.normalized_shape[0] == 4 * channels:
            assert torch.allclose(joined, self.capture.inputs[module.norm].flatten(1, -2))
            whole, offset = weight @ norm_matrix(joined, module.norm), weight @ module.norm.bias
            spread = (joined - joined.mean(-1, keepdim=True)).unflatten(-1, (4, channels))
            variances = (spread**2).sum(-1)
        else:
            assert torch.allclose(joined @ weight.T, self.capture.inputs[module.norm].flatten(1, -2))
            whole, offset = norm_matrix(joined @ weight.T, module.norm) @ weight, module.norm.bias
            parts = weight.unflatten(-1, (4, channels))
            variances = variance(torch.einsum("bpkc,okc->bpko", joined.unflatten(-1, (4, channels)), parts))
        maps = whole.unflatten(-1, (4, channels)).transpose(2, 3)
        return DenseMerging(ids, x, maps, offset, variances)

    def _block(self, block: Any) -> DenseBlock:
        capture, library, live = self.capture, self.library, next(self._live)
        before, after = capture.inputs[block], capture.outputs[block]
        before, after = (x.flatten(1, -2) for x in (before, after[0] if isinstance(after, tuple) else after))
        first, second = library.norms(block)
        if (last := library.trailing(block)) is not None:
            after = capture.inputs[last].flatten(1, -2)
        if library.post:
            update, mlp, read = capture.outputs[first], capture.outputs[second], before
        else:
            between = capture.inputs[second].flatten(1, -2)
            update, mlp, read = between - before, after - between, capture.outputs[first]
        update, mlp, read = (x.flatten(1, -2) for x in (update, mlp, read))
        ids = library.window_ids(block, self._grid, self.batch)
        place, place_values = _placers(ids, self.batch, before.shape[1])
        members = F.pad(read.flatten(0, 1), (0, 0, 1, 0))[ids]
        attention = place(live)
        values = place_values(library.values(block, members).unflatten(-1, (live.shape[1], -1)).transpose(1, 2))
        out, offset = self._maps(block, attention, values)
        heard = torch.einsum("bhim,bhmd->bihd", attention, values).flatten(2)
        assert torch.allclose(torch.einsum("bica,bia->bic", out, heard) + offset, update, atol=1e-9)
        assert torch.allclose(before + update + mlp, after, atol=1e-9)
        name = next(name for name, module in self.model.named_modules() if module is block)
        return DenseBlock(name, attention, values, before, update, mlp, out, offset, live, place, library.post)

    def _maps(self, block: Any, attention: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        heard = torch.einsum("bhim,bhmd->bihd", attention, values).flatten(2)
        linear = self.library.out(block)
        matrix = linear.weight.expand(*heard.shape[:2], -1, -1)
        offset = linear.bias.expand(*heard.shape[:2], -1)
        if (scale := self.library.scale(block)) is not None:
            matrix, offset = scale[:, None] * matrix, scale * offset
        if self.library.post:
            norm: Any = self.library.norms(block)[0]
            whole = norm_matrix(heard @ linear.weight.T + linear.bias, norm)
            matrix, offset = whole @ matrix, torch.einsum("bicd,bid->bic", whole, offset) + norm.bias
        return matrix, offset

    def cotangent(self, target: Tensor, contrastive: bool = False) -> tuple[Tensor, Tensor]:
        head = copy.deepcopy(self.model)
        for parent in list(head.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm):
                    setattr(parent, name, DetachedNorm(child))
        x = self.library.end(self.model, self.capture).detach().requires_grad_()
        with torch.enable_grad():
            logits = self.library.head(head, x)
            score = self.score(target, contrastive, logits)
            (u,) = torch.autograd.grad(score.sum(), [x])
        assert torch.allclose(logits, self.logits)
        constant = score.detach() - (u * x.detach()).flatten(1).sum(1)
        return u.flatten(1, -2), constant


class _FirstLinear(TorchFunctionMode):
    """What is multiplied by a certain weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.seen: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and args[1] is self._weight:
            self.seen = args[0]
        return function(*args, **(kwargs or {}))


class Torchvision(Library):
    """``features`` of a convolution, stages and mergings in turn; the attention is one function."""

    def __init__(self, *, post: bool) -> None:
        self.post = post

    def steps(self, model: Any) -> list[Any]:
        return [step for part in model.features[1:] for step in (part if hasattr(part, "__len__") else [part])]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def out(self, block: Any) -> nn.Linear:
        return block.attn.proj

    def values(self, block: Any, x: Tensor) -> Tensor:
        size = x.shape[-1]
        return F.linear(x, block.attn.qkv.weight[2 * size :], block.attn.qkv.bias[2 * size :])

    def window_ids(self, block: Any, grid: tuple[int, int], batch: int) -> Tensor:
        qkv = block.attn.qkv
        ids = torch.arange(1, batch * grid[0] * grid[1] + 1, dtype=qkv.weight.dtype).reshape(batch, *grid, 1)
        with _FirstLinear(qkv.weight) as mode:
            block.attn(ids.expand(-1, -1, -1, qkv.in_features))
        assert mode.seen is not None
        return mode.seen[..., 0].long()

    def merging_ids(self, merging: Any, grid: tuple[int, int]) -> Tensor:
        double = copy.deepcopy(merging)
        double.norm = double.reduction = nn.Identity()
        ids = torch.arange(1, grid[0] * grid[1] + 1).reshape(1, *grid, 1)
        return double(ids).flatten(0, 2) - 1

    def end(self, model: Any, capture: Capture) -> Tensor:
        return capture.inputs[model.norm]

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.head(model.norm(tokens).mean((1, 2)))


class _HuggingFaceEcho(_Echo):
    """Stands in for an attention that returns its maps, too."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        self.seen = x
        return x, None


class HuggingFace(Library):
    """Stages of blocks, each but the last with a merging at its end; tokens are sequences."""

    def __init__(self, *, post: bool) -> None:
        self.post = post

    def _base(self, model: Any) -> Any:
        return getattr(model, model.base_model_prefix)

    def steps(self, model: Any) -> list[Any]:
        stages = self._base(model).encoder.layers
        return [step for stage in stages for step in (*stage.blocks, stage.downsample) if step is not None]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.layernorm_before, block.layernorm_after

    def out(self, block: Any) -> nn.Linear:
        return block.attention.output.dense if self.post else block.attention.o_proj

    def values(self, block: Any, x: Tensor) -> Tensor:
        return block.attention.self.value(x) if self.post else block.attention.v_proj(x)

    def window_ids(self, block: Any, grid: tuple[int, int], batch: int) -> Tensor:
        double = copy.deepcopy(block)
        double.attention = echo = _HuggingFaceEcho()
        double.layernorm_before = double.layernorm_after = nn.Identity()
        double.mlp = double.intermediate = double.output = nn.Identity()
        ids = torch.arange(1, batch * grid[0] * grid[1] + 1, dtype=torch.float64).reshape(batch, -1, 1)
        assert torch.equal(double(ids, grid)[0], 4 * ids)  # shortcut and update, twice: its way back undoes its way
        return echo.seen[..., 0].long()

    def merging_ids(self, merging: Any, grid: tuple[int, int]) -> Tensor:
        double = copy.deepcopy(merging)
        double.norm = double.reduction = nn.Identity()
        ids = torch.arange(1, grid[0] * grid[1] + 1).reshape(1, -1, 1)
        return double(ids, grid).flatten(0, 1) - 1

    def end(self, model: Any, capture: Capture) -> Tensor:
        return capture.inputs[self._base(model).layernorm]

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.classifier(self._base(model).layernorm(tokens).mean(1))


class TimmCr(Library):
    """timm's other Swin v2: post-norm, and some blocks end in a norm of the stream."""

    post = True

    def steps(self, model: Any) -> list[Any]:
        steps = [step for stage in model.stages for step in (stage.downsample, *stage.blocks)]
        return [step for step in steps if not isinstance(step, nn.Identity)]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def trailing(self, block: Any) -> nn.Module | None:
        norm = getattr(block, "norm3", None)
        return norm if isinstance(norm, nn.LayerNorm) else None

    def out(self, block: Any) -> nn.Linear:
        return block.attn.proj

    def values(self, block: Any, x: Tensor) -> Tensor:
        size = x.shape[-1]
        return F.linear(x, block.attn.qkv.weight[2 * size :], block.attn.qkv.bias[2 * size :])

    def window_ids(self, block: Any, grid: tuple[int, int], batch: int) -> Tensor:
        ids = torch.arange(1, batch * grid[0] * grid[1] + 1, dtype=torch.float64).reshape(batch, *grid, 1)
        double = copy.deepcopy(block)
        double.attn = _Echo()
        assert torch.equal(double._shifted_window_attn(ids), ids)
        return double.attn.seen[..., 0].long()

    def merging_ids(self, merging: Any, grid: tuple[int, int]) -> Tensor:
        double = copy.deepcopy(merging)
        double.norm = double.reduction = nn.Identity()
        ids = torch.arange(1, grid[0] * grid[1] + 1).reshape(1, *grid, 1)
        return double(ids).flatten(0, 2) - 1

    def end(self, model: Any, capture: Capture) -> Tensor:
        return capture.outputs[model.stages[-1].blocks[-1].norm3]

    def head(self, model: Any, tokens: Tensor) -> Tensor:
        return model.head.fc(tokens.mean(1))
