"""The block that plain and windowed transformers share: attention and MLP, each added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.frozen import FrozenLinear, FrozenMap, FrozenNorm, FrozenScale
from captum_lnstat.layout import Layout
from captum_lnstat.recording import NormCall, Recording
from captum_lnstat.statistics import accumulation_dtype
from captum_lnstat.trace import Block

BLOCK_PARTS = "norm1, attn (with a Linear proj), norm2 and mlp"


def is_residual_block(block: nn.Module) -> bool:
    """Whether a module has the parts of a residual block."""
    parts = (getattr(block, name, None) for name in ("norm1", "attn", "norm2", "mlp"))
    return all(isinstance(part, nn.Module) for part in parts) and isinstance(
        getattr(block.attn, "proj", None), nn.Linear
    )


def block_taps(block: Any) -> list[nn.Module]:
    """The modules whose calls ``residual_block`` reads."""
    gate = getattr(block.attn, "gate", None)
    return [block] if gate is None else [block, gate]


def stream(tokens: Tensor) -> Tensor:
    """The residual stream as (batch, token, channel), whatever its layout was, in the accumulation dtype."""
    return tokens.flatten(1, -2).to(accumulation_dtype(tokens))


def residual_block(name: str, block: nn.Module, recording: Recording, layout: Layout) -> Block:
    """Read one block from the recording.

    Pre-norm (``norm1`` reads the stream): the stream between the two updates is what ``norm2`` read.
    Post-norm (``norm1`` reads the attention's output, as in Swin v2): the updates are what the norms returned.
    """
    call = recording.call(name)
    before, after = stream(call.input.read()), stream(call.output.read())
    norm1, norm2 = recording.norm(f"{name}.norm1"), recording.norm(f"{name}.norm2")
    if norm1.input.tensor.data_ptr() == call.input.tensor.data_ptr():
        if norm2.input.tensor.data_ptr() == call.input.tensor.data_ptr():
            raise RecordingError(
                f"norm2 of {name!r} reads what norm1 reads: attention and MLP run side by side, so no stream lies "
                "between them; expected norm2 to read the stream with the attention's update"
            )
        between = stream(norm2.input.read())
        attention_update, mlp_update = between - before, after - between
        path = _path_to_update(name, block, recording)
    else:
        attention_update, mlp_update = _output(norm1), _output(norm2)
        _check_sum(name, before + attention_update + mlp_update, after)
        norm = norm1.frozen
        flat = FrozenNorm(norm.deviation.flatten(1), norm.gamma, norm.beta)
        path = (*_path_to_update(name, block, recording), flat)
    return Block(name, recording.site(f"{name}.attn"), layout, before, attention_update, mlp_update, path)


def _path_to_update(name: str, block: Any, recording: Recording) -> tuple[FrozenMap, ...]:
    attention, path = block.attn, list[FrozenMap]()
    scale_norm = getattr(attention, "norm", None)
    if isinstance(scale_norm, nn.Module) and not isinstance(scale_norm, nn.Identity):
        path.append(recording.norm(f"{name}.attn.norm").frozen)
    if getattr(attention, "gate", None) is not None:
        path.append(FrozenScale(recording.call(f"{name}.attn.gate").output.read().sigmoid()))
    path.append(FrozenLinear(attention.proj.weight, attention.proj.bias))
    layer_scale = getattr(block, "ls1", None)
    if layer_scale is not None and not isinstance(layer_scale, nn.Identity):
        if not isinstance(getattr(layer_scale, "gamma", None), Tensor):
            raise UnsupportedModelError(f"{name}.ls1 is a {type(layer_scale).__name__}; expected a LayerScale's gamma")
        path.append(FrozenScale(layer_scale.gamma))
    return tuple(path)


def _output(norm: NormCall) -> Tensor:
    """What the norm returned, computed again rather than kept."""
    x = norm.input.read()
    with torch.no_grad():
        return stream(nn.functional.layer_norm(x, x.shape[-norm.dims :], norm.weight, norm.bias, norm.eps))


def _check_sum(name: str, expected: Tensor, seen: Tensor) -> None:
    # Half precision rounds the stream after each addition; the tolerance only has to tell another wiring apart.
    error, size = (seen - expected).abs().amax(), seen.abs().amax()
    if torch.isfinite(size) and error > 0.05 * size:
        raise RecordingError(
            f"block {name!r} does not return x + norm1(attn(x)) + norm2(mlp(x')): off by {error:.3g} at values up to "
            f"{size:.3g}. Either its wiring is neither pre-norm nor post-norm, or stochastic depth dropped an update "
            "(train mode: call model.eval()); its relevance cannot be placed"
        )
