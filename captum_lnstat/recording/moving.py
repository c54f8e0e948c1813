"""What the functions of torch do to the places of the tensors that they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.recording.provenance import NOWHERE, SEVERAL, Provenance, alone, as_map, on_lattice, one_a_row

# Done to the places as it was done to the numbers; what else is given to them says where to.
_MOVES = (
    "flatten unflatten transpose swapaxes swapdims permute movedim moveaxis reshape reshape_as view view_as "
    "unsqueeze squeeze expand expand_as broadcast_to repeat tile repeat_interleave narrow narrow_copy select "
    "index_select gather take_along_dim __getitem__ flip fliplr flipud rot90 roll chunk split split_with_sizes "
    "tensor_split unbind hsplit vsplit unfold pixel_unshuffle pixel_shuffle channel_shuffle masked_select T mT H "
    "mH diagonal t adjoint unsafe_chunk unsafe_split take"
)
MOVES = set(_MOVES.split())
SORTS = {"sort", "topk"}
LINEAR = {"matmul", "__matmul__", "bmm", "mm", "einsum", "tensordot"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_RESIZES = {"interpolate", "upsample", *(f"adaptive_{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3))}
COARSER = CONVOLUTIONS | _RESIZES | {f"{kind}_pool{n}d" for kind in ("max", "avg", "lp") for n in (1, 2, 3)}
SCATTERS = {"grid_sample", "fold", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation")
_POOLING = ("input", "kernel_size", "stride", "padding", "dilation")

Function = Callable[..., Any]
Args = Sequence[Any]
Named = dict[str, Any]


def coarser(name: str, first: Provenance, args: Args, named: Named, shape: torch.Size) -> Provenance | None:
    """A convolution, a pooling or a resizing of a map."""
    lattice, axes = as_map(first), len(shape) - 2
    if lattice is None:
        return first.mixed_by(f"{name} of pixels that do not lie side by side on the image", shape)
    if name in _RESIZES:
        return Provenance(lattice.resized(shape), None, shape)
    convolves = name in CONVOLUTIONS
    arguments = {**dict(zip(_CONVOLUTION if convolves else _POOLING, args, strict=False)), **named}
    kernel = list(arguments["weight"][2:]) if convolves else _each(arguments["kernel_size"], axes)
    stride = _each(arguments.get("stride") or (1 if convolves else kernel), axes)
    dilation = _each(arguments.get("dilation", 1) if convolves or name.startswith("max") else 1, axes)
    padding = arguments.get("padding", 0)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    sizes = _each(0 if padding == "valid" else padding, axes)
    return Provenance(lattice.strided(shape, kernel, stride, sizes, dilation), None, shape)


def padded(function: Function, first: Provenance, args: Args, named: Named, shape: torch.Size) -> Provenance:
    """More at the borders."""
    sizes = list(args[1] if len(args) > 1 else named["pad"])
    if first.ids is None and len(sizes) <= 2 * (len(first.shape) - 2):
        border = [(0, 0)] * (len(first.shape) - 2) + list(zip(sizes[::2], sizes[1::2], strict=True))[::-1]
        return Provenance(first.lattice.padded(shape, border[len(sizes) // 2 :]), None, shape)
    if (args[2] if len(args) > 2 else named.get("mode", "constant")) == "constant":
        return first.to(F.pad(first.read(), sizes, value=NOWHERE))
    return first.to(function(first.read().double(), *args[1:], **named).long())


def moved(name: str, function: Function, first: Provenance, args: Args, named: Named) -> Any:
    """The numbers of the cells, moved as the tensor was; of a function that returns several, several."""
    ids, others = first.read(), [_on_cpu(arg) for arg in args]
    if name in ("view", "reshape") and ids.dim() > 1 and ids.stride(-1) == 0:
        size = list(others[0] if len(others) == 1 and isinstance(others[0], tuple | list) else others)
        # Channels that stay channels need not be written out.
        if size and size[-1] == ids.shape[-1]:
            narrow = ids[..., :1].reshape(*size[:-1], 1)
            return narrow.expand(*narrow.shape[:-1], ids.shape[-1])
    if name.endswith("_as"):
        name, others = {"expand_as": "expand"}.get(name, "reshape"), [others[0]]
        return getattr(ids, name)(others[0].shape if isinstance(others[0], Provenance | Tensor) else others[0])
    if function is F.unfold:
        return F.unfold(ids.double() + 1, *others, **named).long() - 1
    return (Tensor.reshape if name == "view" else function)(ids, *others, **{k: _on_cpu(v) for k, v in named.items()})


def joined(name: str, function: Function, args: Args, named: Named, known: Sequence[Provenance]) -> Provenance | None:
    """Several tensors as one; what is followed of them has to be of one lattice."""
    if any(places.lattice != known[0].lattice for places in known):
        return None
    parts = args[0] if args else named["tensors"]
    ids = [p.read() if isinstance(p, Provenance) else torch.tensor(NOWHERE, device="cpu").expand(p) for p in parts]
    dim: int = named["dim"] if "dim" in named else args[1] if len(args) > 1 else 0
    shared = ids[0].dim() > 1 and dim not in (-1, ids[0].dim() - 1) and all(part.stride(-1) == 0 for part in ids)
    mixed = next((places.mixed for places in known if places.mixed), "")
    if not shared or not name.startswith(("cat", "conc")):
        others = {key: value for key, value in named.items() if key != "tensors"}
        return known[0].to(function(ids, *args[1:], **others), mixed)
    narrow = torch.cat([part[..., :1] for part in ids], dim)
    return known[0].to(narrow.expand(*narrow.shape[:-1], ids[0].shape[-1]), mixed)


def written(name: str, args: Args, shape: torch.Size, known: Sequence[Provenance]) -> Provenance | None:
    """Some of a tensor's numbers in place of some of another's."""
    target, *where, value = args
    if any(places.lattice != known[0].lattice for places in known):
        return None
    before = target.read().clone() if isinstance(target, Provenance) else torch.full(shape, NOWHERE, device="cpu")
    after = value.read() if isinstance(value, Provenance) else torch.tensor(NOWHERE, device="cpu")
    if name == "__setitem__":
        at = _on_cpu(where[0])
        before[at] = after
    else:
        size = value if isinstance(value, torch.Size) else after.shape
        write: Callable[..., Tensor] = getattr(before, name)
        before = write(*map(_on_cpu, where), after.expand(size))
    return known[0].to(before, known[-1].mixed)


def chosen(args: Args, known: Sequence[Provenance]) -> Provenance | None:
    """``torch.where``."""
    if any(places.lattice != known[0].lattice for places in known) or isinstance(args[0], Provenance):
        return alongside(known, known[0].shape)
    one, other = (
        part.read() if isinstance(part, Provenance) else torch.tensor(NOWHERE, device="cpu") for part in args[1:]
    )
    return known[0].to(torch.where(args[0].cpu(), one, other))


def combined(name: str, function: Function, args: Args, named: Named, places: Provenance) -> Provenance:
    """A function that is linear in the tensor: what it makes of ones, of the numbers and of their squares tells."""

    def made(numbers: Tensor) -> Tensor:
        arguments = [numbers if isinstance(arg, Provenance) else _on_cpu(arg, torch.float64) for arg in args]
        result: Tensor = function(*arguments, **named)
        return result

    ids = places.read().double() + 1
    ones, once, twice = made(torch.ones_like(ids)), made(ids), made(ids.square())
    found = (once / ones).nan_to_num(0, 0, 0).round()
    apart = (once - found * ones).abs() + (twice - found.square() * ones).abs()
    one: Tensor = apart <= 1e-6 * found.square() * ones.abs()
    numbers = torch.where(one, found.long() - 1, SEVERAL)
    return places.to(torch.where((ones == 0) & (once == 0) & (twice == 0), NOWHERE, numbers), name)


def projected(first: Provenance, shape: torch.Size) -> Provenance:
    """A Linear: a token of one place stays there; one of several pixels is in their middle."""
    ids = first.read()
    one = alone(ids, -1)
    if not bool((one == SEVERAL).any()):
        return first.to(one.unsqueeze(-1).expand(shape))
    if ids.dim() == 3 and not bool((ids < 0).any()):
        images, axes = first.lattice.where(ids)
        same = alone(images, -1)
        found = on_lattice(same, [axis.mean(-1) for axis in axes], first.lattice.reaches)
        if found is not None and not bool((same == SEVERAL).any()):
            return Provenance(found[0], found[1].unsqueeze(-1).expand(shape), shape)
    return first.mixed_by("linear", shape)


def alongside(given: Sequence[Provenance], shape: torch.Size) -> Provenance | None:
    """What works on every number or token by itself: the places of what it was given, if they are the same."""
    whole = [places for places in given if places.shape == shape]
    if not whole:
        spread = (places for places in given if _spreads(places.shape, shape))
        return next((places.to(places.read().expand(shape)) for places in spread), None)
    first, *others = whole
    for other in others:
        if other is first or (other.ids is None and first.ids is None and other.lattice.shape == first.lattice.shape):
            continue  # a shortcut around convolutions, which may look a little beside it
        if other.lattice != first.lattice:
            return None
        here, there = first.read(), other.read()
        apart = (here != there) & (here != NOWHERE) & (there != NOWHERE)
        first = first.to(torch.where(apart, SEVERAL, torch.maximum(here, there)), "a sum")
    return first


def in_rows(given: Sequence[Provenance], shape: torch.Size) -> Provenance | None:
    """What works on every row of the batch by itself, wherever the batch is if the shape stays."""
    for places in given:
        if places.shape == shape:
            return places
        rows = one_a_row(places.read()) if len(places.shape) > 0 else torch.empty(0, device="cpu")
        if len(shape) > 0 and len(rows) == shape[0] and not bool((rows == SEVERAL).any()):
            return places.to(rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape))
    return None


def _spreads(shape: torch.Size, over: torch.Size) -> bool:
    """Whether a tensor of a shape is expanded to another."""
    behind = over[len(over) - len(shape) :]
    return len(shape) <= len(over) and all(own in (1, size) for own, size in zip(shape, behind, strict=True))


def _each(size: Any, axes: int) -> list[int]:
    sizes = list(size) if isinstance(size, Iterable) else [size]
    return [int(one) for one in (sizes if len(sizes) == axes else sizes * axes)]


def _on_cpu(value: Any, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", dtype)
    if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
        return type(value)(_on_cpu(one, dtype) for one in value)
    return value
