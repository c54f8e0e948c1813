"""Modules that stand for one Linear: a Linear, one with an adapter around it, a quantised or a wrapped one.

Where the map of such a module is not its weight (LoRA, DoRA, weights in int8, on another device, put together when it
runs), it is seen from what the module makes of unit vectors, and the module has to be affine in other places too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.eager import recorded_name
from captum_lnstat.topology.anatomy.affine import HALF_TOLERANCE, TOLERANCE
from captum_lnstat.trace.maps import FrozenLinear

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What peft calls the module that an adapter is put around.
ADAPTED = "base_layer"
# So many other places a module is compared with its map in.
_PLACES = 3


@dataclass(frozen=True)
class Projection:
    """A module that stands for one Linear.

    Attributes:
        name: Its dotted name in the module that it was found in.
        module: The module.
        in_features: How many channels it reads.
        out_features: How many channels it makes.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int

    @property
    def wrapped(self) -> bool:
        """Whether it may do something else than multiply with its weight."""
        return type(self.module).forward is not nn.Linear.forward

    def within(self, name: str) -> str:
        """What a recording calls it, found in the module that goes by ``name``."""
        return recorded_name(f"{name}.{self.name}")

    def weight(self, within: str) -> FrozenLinear:
        """What a model multiplies with that takes the weight and does not run the module."""
        weight: Any = getattr(self.module, "weight", None)
        bias: Any = getattr(self.module, "bias", None)
        if not _holds(weight) or weight.shape != (self.out_features, self.in_features):
            raise UnsupportedModelError(
                f"{self._place(within)} leads from the attention's heads back to the stream and was not run, and its "
                f"weight is a {type(weight).__name__}; expected it to be run, or to have an ordinary weight"
            )
        return FrozenLinear(weight, bias)

    def map(self, within: str, like: Tensor) -> FrozenLinear:
        """What it does to the channels of a token, as it is now.

        Args:
            within: Name of the module that it was found in.
            like: A tensor of the kind that it was given.

        Raises:
            UnsupportedModelError: It is not affine, or cannot be run for itself.
        """
        linear = self.module
        if isinstance(linear, nn.Linear) and _holds(linear.weight):
            if not self.wrapped and "forward" not in vars(linear):
                return FrozenLinear(linear.weight, linear.bias)
            x = _elsewhere(1, linear.in_features, linear.weight)
            if torch.equal(self._run(within, x), F.linear(x[None], linear.weight, linear.bias)[0].detach()):
                return FrozenLinear(linear.weight, linear.bias)
        return self._seen(within, like)

    def _seen(self, within: str, like: Tensor) -> FrozenLinear:
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), like.dtype)
        unit = torch.eye(self.in_features, device=like.device, dtype=dtype)
        others = _elsewhere(_PLACES, self.in_features, unit)
        made = self._run(within, torch.cat([torch.zeros_like(unit[:1]), unit, others]))
        bias, weight, there = made[0], made[1:-_PLACES] - made[0], made[-_PLACES:]
        apart, size = (others @ weight + bias - there).abs().amax(), there.abs().amax()
        if not bool(apart <= TOLERANCE.get(dtype, HALF_TOLERANCE) * size):
            raise UnsupportedModelError(
                f"{self._place(within)} leads from the attention's heads back to the stream and is not affine: off by "
                f"{float(apart):.2g} at values up to {float(size):.2g}{_why(self.module)}. No token's part can be told "
                "apart behind it; merge or remove its adapter (peft: merge_and_unload()), or give it its weights in "
                "floating point"
            )
        return FrozenLinear(weight.T.contiguous(), bias)

    def _run(self, within: str, x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                made = self.module(x[None])
        except Exception as error:
            raise UnsupportedModelError(
                f"{self._place(within)} leads from the attention's heads back to the stream, and cannot be run for "
                f"itself to see what it does ({type(error).__name__}: {error}); expected a module that maps "
                f"{self.in_features} channels to {self.out_features}, its weights in place"
            ) from error
        if not isinstance(made, Tensor) or made.shape != (1, len(x), self.out_features):
            seen = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise UnsupportedModelError(
                f"{self._place(within)} returned {seen} for {(1, *x.shape)}; expected {self.out_features} channels"
            )
        return made[0].to(x.dtype)

    def _place(self, within: str) -> str:
        return f"{self.within(within)!r} ({type(self.module).__name__})"


def projections(module: nn.Module) -> list[Projection]:
    """The modules inside ``module`` that stand for one Linear each, in the order in which they are defined.

    Example:
        >>> class LowRank(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)
        >>> [(found.name, found.in_features) for found in projections(nn.Sequential(nn.Linear(4, 8), LowRank()))]
        [('0', 4), ('1', 8)]
    """
    return list(_inside(module, ""))


def is_projection(module: nn.Module) -> bool:
    """Whether a module stands for one Linear."""
    return _features(module) is not None


def _inside(module: nn.Module, prefix: str) -> Iterator[Projection]:
    for name, child in module.named_children():
        features = _features(child)
        if features is not None:
            yield Projection(f"{prefix}{name}", child, *features)
        else:
            yield from _inside(child, f"{prefix}{name}.")


def _features(module: nn.Module) -> tuple[int, int] | None:
    """How many channels a module reads and makes, if it stands for one Linear."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    children = dict(module.named_children())
    if isinstance(module, _CONTAINERS) or isinstance(children.get(ADAPTED), nn.Conv2d):
        return None
    reads, makes = (vars(module).get(name) for name in ("in_features", "out_features"))
    if isinstance(reads, int) and isinstance(makes, int):
        return reads, makes
    for name, child in children.items():
        features = _features(child)
        if features is not None and (name == ADAPTED or _adapts(module, child, *features)):
            return features
    return None


def _adapts(module: nn.Module, base: nn.Module, reads: int, makes: int) -> bool:
    """Whether two matrices of low rank beside a Linear in it make, one after the other, what the Linear makes."""
    own = {id(parameter) for parameter in base.parameters()}
    # What is beside it for a Linear of its own, as in an MLP, has adapters of its own.
    others = [child for child in module.children() if _features(child) is not None and type(child) is not nn.Linear]
    own |= {id(parameter) for child in others for parameter in child.parameters()}
    shapes = {tuple(parameter.shape) for parameter in module.parameters() if id(parameter) not in own}
    ranks = {size for shape in shapes for size in shape if size < min(reads, makes)}
    pairs = [({(rank, reads), (makes, rank)}, {(reads, rank), (rank, makes)}) for rank in ranks]
    return any(down <= shapes or up <= shapes for down, up in pairs)


def without_gradient(model: nn.Module) -> str | None:
    """The first module that lets no gradient through, of those whose weights are of another kind; or ``None``."""
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        quantised = "quantized" in type(module).__module__ or not all(map(_holds, weights))
        features = _features(module) if quantised else None
        if features is not None and not any(weight.device.type == "meta" for weight in weights):
            like = next(module.parameters(), torch.empty(0, device="cpu"))
            x = torch.zeros(1, 1, features[0], device=like.device, dtype=like.dtype, requires_grad=True)
            with torch.enable_grad():
                gradients: tuple[Tensor | None, ...] = torch.autograd.grad(module(x).sum(), x, allow_unused=True)
            if gradients[0] is None:
                return f"{recorded_name(name)!r} ({type(module).__module__}.{type(module).__name__})"
    return None


def _holds(weight: Any) -> bool:
    """Whether a weight is an ordinary tensor that is where it says."""
    return isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta"


def _elsewhere(rows: int, channels: int, like: Tensor) -> Tensor:
    """Fixed numbers in which no structure of a model lies."""
    n = torch.arange(1, rows * channels + 1, device=like.device, dtype=torch.float32)
    return torch.sin(0.7 * n * n).reshape(rows, channels).to(like.dtype)


def _why(module: Any) -> str:
    """What of a module tells why it is not affine, if anything does."""
    weight: Any = getattr(module, "weight", None)
    if any("quantized" in type(part).__module__ for part in module.modules()):
        return "; it is quantised, and rounds what it is given to integers"
    if isinstance(weight, Tensor) and not _holds(weight):
        return f"; its weight is a {type(weight).__name__}, which may round what it is multiplied with"
    return "; it is in train mode, so call model.eval() first" if module.training else ""


def in_place(parameter: Tensor, name: str) -> Tensor:
    """A parameter of a model, if it can be read after the pass.

    Raises:
        UnsupportedModelError: It cannot.
    """
    if not _holds(parameter):
        raise UnsupportedModelError(
            f"the {name} is a {type(parameter).__name__} on the {parameter.device.type} device after the pass; "
            "expected weights that stay where they are: give the model all of them to explain it, no offloading"
        )
    return parameter
