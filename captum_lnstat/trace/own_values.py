"""Whether the values of the first attention are those of the tokens that its topology takes them for.

What an attention contributes is put on the tokens whose values it averaged. Between a block's norm and its attention a
model may still move tokens or mix them (a shift, a sort, a depthwise convolution), and what is added to the stream does
not show it. So the values of the first attention are followed from what its block was given; blocks above it are
taken to be built as it is.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.layout import Layout, WholeImage
from captum_lnstat.recording.following import Path
from captum_lnstat.recording.provenance import NOWHERE, SEVERAL, Provenance, alone
from captum_lnstat.recording.remembered import number_of, remembered
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

# By the layout of the first attention: of which functions it is known that the values are its tokens' own.
_found_right: WeakKeyDictionary[Layout, set[int | None]] = WeakKeyDictionary()


def check_own_values(trace: Trace, before: Path, values: Path | None) -> None:
    """Every value of the first attention has to come from the token that its layout takes it for.

    Args:
        trace: The trace.
        before: The way of what its first step was given.
        values: That of the values; where it is not known, nothing is checked.

    Raises:
        UnsupportedModelError: Some come from another token, or from several.
    """
    block = trace.steps[0]
    if values is None or not isinstance(block, Block) or block.keys is not None:
        return
    number = None
    if before.number is not None and values.number is not None:
        number = number_of("values", before.number, values.number, block.site.shape, trace.tokens_first)
    if isinstance(block.layout, WholeImage):
        remembered(number, lambda: _check(trace, block, before.provenance, values.provenance))
        return
    # Of windows the tokens lie on the model's device, which is waited for once.
    found_right = _found_right.setdefault(block.layout, set())
    if number not in found_right:
        _check(trace, block, before.provenance, values.provenance)
        found_right |= {number} - {None}


def _check(trace: Trace, block: Block, before: Provenance | None, values: Provenance | None) -> None:
    if before is None or values is None or before.lattice.shape != values.lattice.shape:
        return
    ids = before.read()
    tokens = alone(ids.transpose(0, 1) if trace.tokens_first else ids, -1).flatten(1)
    found = _of_keys(values.read(), block.site.shape)
    if tokens.shape != block.before.shape[:2] or found is None or bool((tokens == SEVERAL).any()):
        return
    # On the CPU, where places live; a padded place gets zero, which is no token.
    shifted = block.layout.gather((tokens + 1 - NOWHERE)[..., None].to(block.before.device))[..., 0].cpu()
    wanted = shifted - 1 + NOWHERE
    wrong = (wanted >= 0) & (found != wanted) & (found != NOWHERE)
    mixed = values.lattice.reaches and not before.lattice.reaches
    if not mixed and not bool(wrong.any()):
        return
    if mixed or bool((found[wrong] == SEVERAL).any()):
        by = f" ({values.mixed})" if values.mixed else ""
        what, whose = f"mixed{by}", "values are those of several tokens each"
    else:
        what, whose = "moved", f"{int(wrong[0].sum())} of {wrong.shape[1]} values are those of other tokens"
    raise UnsupportedModelError(
        f"between what {block.name!r} is given and its attention's values, tokens are {what}: {whose}, so what they "
        "contribute cannot be put on a token. Expected values that are each made of one token alone, in the tokens' "
        "order; a roll, a sort or a convolution there needs a topology that knows it"
    )


def _of_keys(ids: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    """The one token of every value ``(group, key)``, over heads and channels; ``None`` for another shape than known."""
    groups, heads, _, keys = shape
    if ids.dim() == 4 and ids.shape[:3] == (groups, heads, keys):
        return alone(alone(ids, -1), 1)
    if ids.dim() == 3 and ids.shape[:2] == (groups * heads, keys):
        return alone(alone(ids, -1).reshape(groups, heads, keys), 1)
    # What nn.MultiheadAttention is given has the tokens first.
    return alone(ids, -1).T if ids.dim() == 3 and ids.shape[:2] == (keys, groups) else None
