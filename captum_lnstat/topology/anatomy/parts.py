"""The parts of a residual block, found by what its modules are and not by what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.eager import eager
from captum_lnstat.recording.rms import rms_channels
from captum_lnstat.topology.anatomy.once import once
from captum_lnstat.topology.anatomy.projections import Projection, projections

BLOCK_PARTS = "two LayerNorms, one attention with heads and a Linear after it, and an MLP"

# An attention module knows how many heads it has; libraries differ in the word.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads", "n_head", "nhead", "nheads", "num_head")
# A Linear that reads so few numbers makes a position bias from coordinates; no heads are joined there.
_COORDINATES = 3
_QKV = 3


@dataclass(frozen=True)
class BlockParts:
    """Where the parts of a residual block are.

    Attributes:
        norms: Names of its LayerNorms in the block, as defined; the recording says in which order they run. A third
            one normalises the stream that the block returns.
        attention: Name of the child that attends.
        out: The Linear, or what stands for it, from the joined heads back to the stream; found in ``attention``.
        scale: What the attention's output is multiplied by, channel by channel (LayerScale), or ``None``.
        gate: The Linear whose sigmoid multiplies the joined heads, and its name in the block, or ``None``.
    """

    norms: tuple[str, ...]
    attention: str
    out: Projection
    scale: Tensor | None
    gate: tuple[str, nn.Linear] | None


Layer = TypeVar("Layer", bound=nn.Module)


def find_parts(block: nn.Module) -> BlockParts | None:
    """The parts of a residual block, or ``None`` for a module that is none.

    A residual block has two norms among its children, or three, and one child that has heads. The last Linear of that
    child with as many outputs as the second norm has channels leads back to the stream. Parameters of one value per
    channel, in the block or alone in a child of it, are LayerScales, the attention's first.

    Example:
        >>> parts = find_parts(nn.TransformerEncoderLayer(8, 2))
        >>> parts.attention, parts.norms
        ('self_attn', ('norm1', 'norm2'))
    """
    return _find_parts(eager(block))


def is_residual_block(block: nn.Module) -> bool:
    """Whether a module has the parts of a residual block."""
    return find_parts(block) is not None


def parts_of(block: nn.Module, name: str = "") -> BlockParts:
    """The parts of a residual block that goes by ``name``.

    Raises:
        UnsupportedModelError: It lacks one.
    """
    parts = find_parts(block)
    if parts is None:
        raise UnsupportedModelError(f"{name or type(block).__name__!r} is not a residual block; expected {BLOCK_PARTS}")
    return parts


@once
def _find_parts(block: nn.Module) -> BlockParts | None:
    children = dict(block.named_children())
    norms = [name for name, child in children.items() if channels_of(child) is not None]
    if len(norms) not in (2, 3):
        return None
    # Of a block that widens the stream, the second norm reads what the attention has widened.
    width = channels_of(children[norms[1]])
    attending = [name for name, child in children.items() if attends(child)]
    if len(attending) != 1:
        return None
    attention: Any = children[attending[0]]
    gate = getattr(attention, "gate", None)
    linears = [linear for linear in projections(attention) if linear.out_features == width]
    linears = [linear for linear in linears if linear.in_features > _COORDINATES and linear.module is not gate]
    if not linears:
        return None
    if len(linears) == _QKV:
        # These are for queries, keys and values. One beside the attention leads back to the stream.
        beside = [part for part in projections(block) if part.name in children and part.out_features == width]
        linears += [part for part in beside if part.in_features == linears[-1].out_features][:1]
    named_gate = (f"{attending[0]}.gate", gate) if isinstance(gate, nn.Linear) else None
    return BlockParts(tuple(norms), attending[0], linears[-1], next(_scales(block, width), None), named_gate)


def layers(module: nn.Module, kind: type[Layer]) -> list[Layer]:
    """The layers of a kind in a module, itself among them, in the order in which they are defined."""
    return [part for part in module.modules() if isinstance(part, kind)]


@once
def has_heads(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has a number of heads."""
    own, kind = vars(module), type(module)  # a Module looks long for an attribute that it does not have
    named = any(isinstance(own.get(name, getattr(kind, name, None)), int) for name in _HEAD_COUNTS)
    return named or any(has_heads(child) for child in module.children())


def channels_of(module: nn.Module) -> int | None:
    """How many channels a LayerNorm or RMSNorm normalises together."""
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if isinstance(shape, tuple) and len(shape) == 1 else rms_channels(module)


def attends(module: nn.Module) -> bool:
    """Whether a module is an attention: it has heads and a Linear, and holds no block."""
    if not has_heads(module) or _holds_block(module):
        return False  # a whole encoder
    return bool(projections(module))


@once
def _holds_block(module: nn.Module) -> bool:
    return any(is_residual_block(child) or _holds_block(child) for child in module.children())


def _scales(block: nn.Module, width: int | None) -> Iterator[Tensor]:
    for child in (block, *block.children()):
        parameters = list(child.parameters(recurse=False))
        alone = len(parameters) == 1 and channels_of(child) is None and not list(child.children())
        for parameter in parameters:
            if parameter.shape == (width,) and (child is block or alone):
                yield parameter
