"""The block that plain and windowed transformers share: attention and MLP, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, Groups, Layout
from captum_lnstat.recording.multi_head import MultiHeadSite
from captum_lnstat.recording.recording import ModuleCall, NormCall, Recording
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import stream
from captum_lnstat.recording.verdicts import expect
from captum_lnstat.topology.anatomy.affine import pull_back_by_autograd
from captum_lnstat.topology.anatomy.geometry import channels_last
from captum_lnstat.topology.anatomy.parts import BlockParts, parts_of
from captum_lnstat.topology.anatomy.parts import is_residual_block as is_residual_block
from captum_lnstat.topology.anatomy.projections import in_place
from captum_lnstat.topology.anatomy.unfolding import unfolded
from captum_lnstat.topology.anatomy.units import norm_step
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenNorm, FrozenScale
from captum_lnstat.trace.steps import Block, Transition

if TYPE_CHECKING:
    from jaxtyping import Bool


def block_taps(block: nn.Module) -> list[nn.Module]:
    """The modules whose calls ``residual_block`` reads."""
    parts = parts_of(block)
    gate = [] if parts.gate is None else [parts.gate[1]]
    return [block, *gate, *([parts.out.module] if parts.out.wrapped else [])]


def residual_block(
    name: str,
    block: nn.Module,
    recording: Recording,
    layout: Layout,
    site: AttentionSite | None = None,
    *,
    joined_norm: bool = True,
    pooled: bool = False,
    laid: Callable[[Tensor], Tensor] = channels_last,
) -> Block:
    """Read one block from the recording.

    Pre-norm (the first norm reads the stream): the stream between the two updates is what the second norm read.
    Post-norm (the first norm reads the attention's output, as in Swin v2): the updates are what the norms returned.

    Args:
        name: Dotted name of the block in the recording.
        block: The block.
        recording: The pass.
        layout: How the stream's tokens become the attention's queries and keys.
        site: The block's attention, where a topology had to unfold what was recorded.
        joined_norm: The attention's last norm may be one of its joined heads. False if it is one of its keys.
        pooled: The attention may make tokens out of several; the topology says of which.
        laid: The stream that the block is given and returns as ``(batch, token, channel)``.

    Raises:
        RecordingError: The block's norms, attention and updates do not fit together.
        UnsupportedModelError: The block lacks a part.
    """
    parts = parts_of(block, name)
    call = recording.call(name)
    if site is None:
        site = unfolded(recording.site(f"{name}.{parts.attention}"), parts.out.in_features)
    first, second, *last = norms_in_order(name, parts, recording)
    before, after = laid(call.input.read()), stream(last[0].input.read()) if last else laid(call.output.read())
    if first.input.tensor.data_ptr() == call.input.tensor.data_ptr():
        if second.input.tensor.data_ptr() == call.input.tensor.data_ptr():
            raise RecordingError(
                f"both norms of {name!r} read what the block reads: attention and MLP run side by side, so no stream "
                "lies between them; expected the second norm to read the stream with the attention's update"
            )
        between, norms = stream(second.input.read()), (first, second)
        path = path_to_update(name, parts, site, recording, joined_norm)
    else:
        attended, mlp, norms = output_of(first), output_of(second), None
        if attended.shape != before.shape:
            raise UnsupportedModelError(
                f"{name!r} was given {tuple(call.input.tensor.shape)}, its first norm read "
                f"{tuple(first.input.tensor.shape)}, and its attention has maps of {site.shape[2]} x {site.shape[3]}; "
                "expected norms and attention of the block's own tokens, none of its channels"
            )
        _check_tokens(name, call, (before, attended, mlp, after))
        path = (*path_to_update(name, parts, site, recording, joined_norm), FrozenNorm.of(first))
        if block.training:
            kept, mlp_kept = _kept(after - before, attended, mlp)
            attended, mlp = kept * attended, mlp_kept * mlp
            path = (*path, FrozenScale(kept.expand_as(before)))
        between = before + attended
        _check_sum(name, between + mlp, after)
    _check_tokens(name, call, (between, after) if pooled else (before, between, after))
    centred = second.centred or norms is None
    return Block(
        name, site, layout, before, between, after, path, norms=norms, post_norm=norms is None, centred=centred
    )


def with_pooled_queries(
    block: Block, shortcut: Callable[[Tensor], Tensor], given: Tensor, below: Groups, grid: Grid, training: bool
) -> Block:
    """A block whose attention pools its queries, and adds its update to the tokens that a shortcut makes.

    Args:
        block: The block as read without the shortcut.
        shortcut: From what the block was given to what its update is added to; affine with frozen norms.
        given: What the block was given.
        below: The tokens under each token after it.
        grid: Rows and columns of tokens after it.
        training: The shortcut may do something else now than it did.
    """
    with torch.no_grad():
        carried = stream(shortcut(given))
    layouts = channels_last, channels_last
    pull_back = pull_back_by_autograd(block.name, shortcut, given, layouts, block.before, carried, training)
    return replace(block, below=below, carried=carried, grid=grid, pull_back=pull_back)


def trailing_norm(name: str, block: nn.Module, recording: Recording, grid: Grid) -> Transition | None:
    """The norm through which a block's stream leaves it, if there is one: a map of each token, its deviation frozen.

    Args:
        name: Dotted name of the block in the recording.
        block: The block.
        recording: The pass.
        grid: Rows and columns of patch tokens.
    """
    *_, last = norms = norms_in_order(name, parts_of(block, name), recording)
    if len(norms) < 3:
        return None
    before, after = stream(last.input.read()), stream(recording.call(name).output.read())
    _check_sum(name, output_of(last), after)
    return norm_step(last.module, last, before, after, grid)


def norms_in_order(name: str, parts: BlockParts, recording: Recording) -> list[NormCall]:
    """The calls of the block's norms in the order in which they ran; of three, one may be for what is not used."""
    names = [f"{name}.{norm}" for norm in parts.norms]
    ran = [norm for norm in names if recording.norms_inside(norm)]
    return recording.in_order(recording.norm(norm) for norm in (ran if len(ran) > 1 else names))


def path_to_update(
    name: str, parts: BlockParts, site: AttentionSite, recording: Recording, joined_norm: bool = True
) -> tuple[FrozenMap, ...]:
    """The affine maps from the joined heads to the attention's update, whose norm, if any, comes first."""
    path = list[FrozenMap]()
    inner = _norm_of_heads(f"{name}.{parts.attention}", parts, site, recording) if joined_norm else None
    if inner is not None:
        path.append(FrozenNorm.of(inner))
    if parts.gate is not None:
        path.append(FrozenScale(recording.call(f"{name}.{parts.gate[0]}").output.read().sigmoid()))
    path.append(_out(name, parts, site, recording))
    if parts.scale is not None:
        path.append(FrozenScale(in_place(parts.scale, f"LayerScale of {name!r}")))
    return tuple(path)


def _out(name: str, parts: BlockParts, site: AttentionSite, recording: Recording) -> FrozenLinear:
    """The Linear from the joined heads to the stream, as it was in the pass."""
    if isinstance(site, MultiHeadSite):
        return FrozenLinear(site.arguments["out_proj_weight"], site.arguments["out_proj_bias"])
    out, attention = parts.out, f"{name}.{parts.attention}"
    if out.wrapped and out.within(attention) not in recording.calls:
        return out.weight(attention)  # torchvision's Swin takes weights from its Linears, and runs no adapter of them
    return out.map(attention, recording.call(name).input.tensor)


def _norm_of_heads(attention: str, parts: BlockParts, site: AttentionSite, recording: Recording) -> NormCall | None:
    """The norm of the joined heads before the Linear that leads back to the stream, if there is one.

    Norms of queries and keys come in pairs; one more, as wide as the joined heads of every query, is this one.
    """
    queries = site.shape[0] * site.shape[2]
    found = [
        norm
        for norm in recording.norms_inside(attention)
        if norm.input.tensor.shape[-1] == parts.out.in_features
        and norm.input.tensor.numel() == queries * parts.out.in_features
    ]
    if len(found) % 2 == 0:
        return None
    return found[-1]


def _check_tokens(name: str, call: ModuleCall, streams: Sequence[Tensor]) -> None:
    """The stream is as many tokens of as many channels everywhere in a block."""
    seen = list(dict.fromkeys(tuple(stream.shape[1:]) for stream in streams))
    if len(seen) > 1:
        how = " and then ".join(f"{tokens} tokens of {channels} channels" for tokens, channels in seen)
        raise RecordingError(
            f"{name!r} was given {tuple(call.input.tensor.shape)} and returned {tuple(call.output.tensor.shape)}; read "
            f"with the channels last it has {how} in it. Tokens that were dropped or merged on the way, or maps with "
            "their channels first, cannot be placed on the image; expected as many tokens and channels throughout"
        )


def output_of(norm: NormCall) -> Tensor:
    """What the norm returned, computed again rather than stored."""
    x = norm.input.read()
    with torch.no_grad():
        if not norm.centred:
            return FrozenNorm.of(norm).apply(stream(x))
        return stream(nn.functional.layer_norm(x, x.shape[-norm.dims :], norm.weight, norm.bias, norm.eps))


def _kept(both: Tensor, attended: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each image's two updates stochastic depth let through, ``(batch, 1, 1)`` each, by least squares."""
    updates = torch.stack([attended.flatten(1), mlp.flatten(1)], 2)
    kept = torch.linalg.lstsq(updates, both.flatten(1)[..., None]).solution
    return kept[:, 0, :, None], kept[:, 1, :, None]


def _check_sum(name: str, expected: Tensor, seen: Tensor) -> None:
    def error() -> RecordingError:
        error, size = (seen - expected).abs().amax(), seen.abs().amax()
        return RecordingError(
            f"block {name!r} does not return x + norm(attention(x)) + norm(mlp(x')), or the norm of it: off by "
            f"{error:.3g} at values up to {size:.3g}. Its wiring is neither pre-norm nor post-norm; its relevance "
            "cannot be placed"
        )

    expect(~far_apart(expected, seen), error)


def far_apart(expected: Tensor, seen: Tensor) -> Bool[Tensor, ""]:
    """Whether two streams are further apart than one wiring from another; not where nothing is finite."""
    # Half precision rounds the stream after each addition.
    error, size = (seen - expected).abs().amax(), seen.abs().amax()
    return torch.isfinite(size) & (error > 0.05 * size)
