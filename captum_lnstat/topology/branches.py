"""Blocks of two branches, each with its norm inside: ``x' = x + attention(x)``, ``x'' = x' + mlp(x')``.

A branch normalises what it is given first. The block may be a module of its own or a list of its branches, whose
updates are added by the module around the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError
from captum_lnstat.layout import Layout
from captum_lnstat.recording.recording import ModuleCall, NormCall, Recording
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import lists_of
from captum_lnstat.topology.anatomy.parts import attends, channels_of, layers
from captum_lnstat.topology.anatomy.unfolding import unfolded
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenScale, apply
from captum_lnstat.trace.steps import Block

# How far an MLP's branch may be from what was added, in the size of the stream.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_TOLERANCE = 0.05


@dataclass(frozen=True)
class Branches:
    """The names of a block's branches in it."""

    attention: str
    mlp: str


def find_branches(block: nn.Module) -> Branches | None:
    """The two branches of a block, or ``None``: an attention and an MLP, each with a norm and a Linear inside.

    Example:
        >>> mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        >>> attention = nn.Sequential(nn.LayerNorm(8), nn.MultiheadAttention(8, 2))
        >>> find_branches(nn.ModuleList([attention, mlp]))
        Branches(attention='0', mlp='1')
    """
    children = dict(block.named_children())
    weighty = {name: child for name, child in children.items() if sum(p.dim() > 1 for p in child.parameters())}
    if len(weighty) != 2 or any(channels_of(child) is not None for child in children.values()):
        return None
    attending = [name for name, child in weighty.items() if attends(child)]
    (mlp,) = [name for name in weighty if name not in attending] if len(attending) == 1 else [""]
    if not mlp or not all(map(_holds_norm, weighty.values())) or layers(block, nn.Conv2d):
        return None
    return Branches(attending[0], mlp) if layers(children[mlp], nn.Linear) else None


def _holds_norm(module: nn.Module) -> bool:
    return any(channels_of(part) is not None for part in module.modules())


def branch_lists(model: nn.Module) -> dict[str, nn.Module]:
    """Lists of nothing but blocks of two branches, by name, in the order in which they are defined."""
    return lists_of(model, lambda block: find_branches(block) is not None)


def is_called(block: nn.Module) -> bool:
    """Whether a block is run as a module, and not its branches one by one."""
    return not isinstance(block, nn.ModuleList)


def calls_of(name: str, block: nn.Module) -> tuple[str, ...]:
    """The names of what is called of a block: itself, or its branches one by one."""
    branches = None if is_called(block) else find_branches(block)
    return (name,) if branches is None else (f"{name}.{branches.attention}", f"{name}.{branches.mlp}")


def branch_taps(block: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls ``branch_block`` reads; of a block of no known build, the block."""
    if is_called(block):
        yield block
    branches = find_branches(block)
    if branches is None:
        return
    yield from (getattr(block, name) for name in (branches.attention, branches.mlp))


def branch_block(name: str, block: nn.Module, recording: Recording, layout: Layout, after: Tensor | None) -> Block:
    """Read one block from the recording.

    Args:
        name: Dotted name of the block in the recording.
        block: The block.
        recording: The pass.
        layout: How the stream's tokens become the attention's queries and keys.
        after: What reads the stream after it, for a block that is not called itself.

    Raises:
        RecordingError: The norms do not read what the branches are given, or the MLP's branch is not what was added.
    """
    branches = find_branches(block)
    assert branches is not None
    attention, mlp = (f"{name}.{branch}" for branch in (branches.attention, branches.mlp))
    attended, fed = recording.call(attention), recording.call(mlp)
    norms = _norm_of(attention, attended, recording), _norm_of(mlp, fed, recording)
    before, between = stream(attended.input.read()), stream(fed.input.read())
    linears = layers(getattr(block, branches.attention), nn.Linear)
    joins = [linear.in_features for linear in linears if linear.out_features == before.shape[-1]]
    site = unfolded(recording.site(attention), (joins or [before.shape[-1]])[-1])
    if before.shape != between.shape:
        raise RecordingError(
            f"{attention!r} was given {tuple(before.shape)} and left {tuple(between.shape)}: tokens were dropped or "
            "merged; expected as many tokens after an attention as before it"
        )
    if after is None:
        after = stream(recording.call(name).output.read())
    elif not block.training:
        _check_added(mlp, fed, between, after)
    path, _ = path_as_seen(block, getattr(block, branches.attention), site, between - before)
    return Block(name, site, layout, before, between, after, path, norms=norms, centred=norms[1].centred)


def _norm_of(branch: str, call: ModuleCall, recording: Recording) -> NormCall:
    found = recording.norms_inside(branch)
    if not found or found[0].input.tensor.data_ptr() != call.input.tensor.data_ptr():
        raise RecordingError(
            f"no norm in {branch!r} reads what {branch!r} is given; expected a branch that normalises the stream first"
        )
    return found[0]


def _check_added(name: str, call: ModuleCall, between: Tensor, after: Tensor) -> None:
    """The stream after a block is that before its MLP and what the MLP returned, which may hold both."""
    returned = stream(call.output.read())
    tolerance = TOLERANCE.get(call.output.tensor.dtype, HALF_TOLERANCE) * after.abs().amax()
    sums = (between + returned, returned) if returned.shape == after.shape == between.shape else ()
    if not any(bool((one - after).abs().amax() <= tolerance) for one in sums):
        raise RecordingError(
            f"the stream after {name!r} is not that before it plus what it returned; expected x + mlp(x), and nothing "
            "else between the blocks"
        )


def path_as_seen(
    block: nn.Module, attention: nn.Module, site: AttentionSite, update: Tensor
) -> tuple[tuple[FrozenMap, ...], float]:
    """The maps from the joined heads to the attention's update: of those that the block has, the one that was seen.

    A Linear of the right shape, in the attention or beside it, or none; and a LayerScale, or none. What is chosen by
    the first token is checked with all of them where relevance is rolled.

    Returns:
        The maps, and how far what they make of the first token is from its update, in the size of that.
    """
    heads, first = slice(0, site.shape[1]), torch.tensor([0], device=update.device)
    joined = (site.probabilities(heads, first)[:1] @ site.values(heads)[:1]).transpose(1, 2).flatten(2)
    width = update.shape[-1]
    linears = [*reversed(layers(attention, nn.Linear)), *layers(block, nn.Linear)]
    fitting = [one for one in linears if one.weight.shape == (width, joined.shape[-1])]
    paths: list[tuple[FrozenMap, ...]] = [(FrozenLinear(one.weight, one.bias),) for one in dict.fromkeys(fitting)]
    paths += [()] if joined.shape[-1] == width else []
    scales = [
        parameter.flatten()
        for part in block.modules()
        if channels_of(part) is None and not isinstance(part, nn.Linear)
        for parameter in part.parameters(recurse=False)
        if parameter.numel() == width
    ]
    paths += [(*path, FrozenScale(scale)) for scale in scales for path in paths]
    if not paths:
        raise RecordingError(
            f"no Linear leads from the {joined.shape[-1]} channels of the joined heads at {site.module!r} to the "
            f"{width} of the stream; expected one"
        )
    errors = torch.stack([(apply(path, joined) - update[:1, :1]).abs().amax() for path in paths])
    return paths[int(errors.argmin())], float(errors.min() / update[:1, :1].abs().amax())
