"""Attention whose heads run one after another, each on its part of the channels and what the head before it made.

EfficientViT of MSRA. No LayerNorm is anywhere in it. The values of a head at a token hold what the heads before it
brought there; evidence and relevance count that as the token's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.sites import SoftmaxSite
from captum_lnstat.topology.anatomy.geometry import channels_first, squares
from captum_lnstat.topology.anatomy.parts import layers
from captum_lnstat.topology.anatomy.units import Stream
from captum_lnstat.topology.readers.base import Reader
from captum_lnstat.trace.maps import FrozenLinear, FrozenScale
from captum_lnstat.trace.steps import Block, Update


class CascadedReader(Reader):
    """A residual around windows of heads that each have convolutions of their own, then a ReLU and a convolution."""

    channels_first = True
    gradients = False
    covers = (
        "No LayerNorm reads the stream: residual shares are those of its tokens' variances all the same. Heads run one "
        "after another; what one brings to a token counts as the token's own in the next."
    )

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        found = _attention(module) if len(list(module.children())) == 1 else None
        # Nothing else is in it: what holds a whole block has other convolutions.
        return found is not None and layers(module, nn.Conv2d) == layers(found[1], nn.Conv2d)

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        found = _attention(block)
        assert found is not None
        self.attention_name, self.attention = found
        lists = {n: c for n, c in self.attention.named_children() if isinstance(c, nn.ModuleList)}
        self.values_name, self.values = next(iter(lists.items()))
        self.out_name, self.out = next((n, c) for n, c in self.attention.named_children() if _is_out(c))

    @property
    def width(self) -> int:
        return layers(self.out, nn.Conv2d)[0].out_channels

    def taps(self) -> Iterator[nn.Module]:
        yield self.block
        yield self.out
        yield from self.values

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        attention = f"{name}.{self.attention_name}"
        maps = [s.attention.read() for s in recording.sites if isinstance(s, SoftmaxSite) and s.module == attention]
        joined = channels_first(recording.call(f"{attention}.{self.out_name}").input.read())
        heads = len(self.values)
        if len(maps) != heads or joined.shape[-1] % heads:
            raise RecordingError(
                f"{len(maps)} attentions were seen in {attention!r}; expected one for each of {heads} heads"
            )
        width = joined.shape[-1] // heads
        seen = [recording.call(f"{attention}.{self.values_name}.{i}").output.read() for i in range(heads)]
        # In the dtype of the model: how closely an update can be known depends on it.
        values = torch.stack([channels_first(part)[..., -width:].to(part.dtype) for part in seen], 1)
        site = SoftmaxSite(attention, Kept.of(torch.stack(maps, 1)), Kept.of(values), None)
        layout = squares(before.grid, site.shape[2], before.tokens.device)
        gate, _ = layout.scatter((joined > 0).to(joined.dtype), len(before.tokens))
        after = channels_first(recording.call(name).output.read())
        return [Block(name, site, layout, before.tokens, after, after, (FrozenScale(gate), _folded(name, self.out)))]


def _attention(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The part with a list of convolutions for every head, and a ReLU and a convolution after them."""
    for name, part in module.named_modules():
        heads = getattr(part, "num_heads", None)
        lists = [child for child in part.children() if isinstance(child, nn.ModuleList)]
        own = lists and all(len(one) == heads and all(layers(part, nn.Conv2d) for part in one) for one in lists)
        if own and any(_is_out(child) for child in part.children()):
            return name, part
    return None


def _is_out(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.ReLU)


def _folded(name: str, out: nn.Module) -> FrozenLinear:
    """A 1 x 1 convolution and the BatchNorm behind it as one linear map."""
    convolution, norms = layers(out, nn.Conv2d)[0], layers(out, nn.BatchNorm2d)
    if convolution.kernel_size != (1, 1) or convolution.groups != 1 or len(norms) > 1:
        raise UnsupportedModelError(
            f"the heads of {name!r} are joined by {convolution}; expected 1 x 1, and a BatchNorm"
        )
    weight, bias = convolution.weight.flatten(1), convolution.bias
    for norm in norms:
        if norm.running_mean is None or norm.running_var is None:
            raise UnsupportedModelError(f"the BatchNorm of {name!r} has no running statistics; expected some")
        mean, variance = norm.running_mean, norm.running_var
        weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
    return FrozenLinear(weight.detach(), None if bias is None else bias.detach())
