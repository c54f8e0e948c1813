"""Whether the values of every attention are those of the tokens that its topology takes them for.

What an attention contributes is put on the tokens whose values it averaged. Between what a block is given and its
attention a model may still move tokens or mix them (a shift, a sort, a depthwise convolution), and what is added to the
stream does not show it. So the values are followed from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.provenance import NOWHERE, SEVERAL, Provenance, alone
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace


def check_own_values(trace: Trace, recording: Recording) -> None:
    """Every value of an attention has to come from the token that its layout takes it for.

    Nothing is checked of a block that does more than that before its attention, which its topology knows: keys that
    are pooled, a position embedding that is added first; and nothing where the way of the values is not known.

    Args:
        trace: The trace.
        recording: Of a pass whose values were followed.

    Raises:
        UnsupportedModelError: Some values come from another token, or from several.
    """
    for block in trace.blocks:
        path, calls = recording.values.get(block.name), recording.calls.get(block.name, ())
        if path is None or len(calls) != 1 or block.keys is not None:
            continue
        given = calls[0].input.tensor
        given = given.transpose(0, 1) if trace.tokens_first else given
        if given.shape[-1] == block.before.shape[-1] and torch.equal(stream(given), block.before):
            _check(block, path.provenance, tokens_first=trace.tokens_first)


def _check(block: Block, values: Provenance | None, *, tokens_first: bool) -> None:
    found = None if values is None else _of_keys(values.read(), block.site.shape)
    if values is None or found is None:
        return
    batch, tokens = block.before.shape[:2]
    own = torch.arange(batch * tokens, device=block.before.device)
    own = own.reshape(tokens, batch).T if tokens_first else own.reshape(batch, tokens)
    # A padded place gets zero, which is no token.
    wanted = block.layout.gather((own + 1)[..., None])[..., 0].cpu() - 1
    if wanted.shape != found.shape:
        return  # attention of another kind, which is refused where it is propagated
    wrong = (wanted >= 0) & (found != wanted) & (found != NOWHERE)
    if not bool(wrong.any()):
        return
    if bool((found[wrong] == SEVERAL).any()):
        by = f" ({values.mixed.partition(' of ')[0]})" if values.mixed else ""
        what, whose = f"mixed{by}", "values are those of several tokens each"
    else:
        count = int(wrong.any(0).sum())
        what, whose = "moved", f"{count} of {wrong.shape[1]} values are those of other tokens"
    raise UnsupportedModelError(
        f"between what {block.name!r} is given and its attention's values, tokens are {what}: {whose}, so what they "
        "contribute cannot be put on a token. Expected values that are each made of one token alone, in the tokens' "
        "order; a roll, a sort, a convolution or other windows there need a topology that knows them"
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
