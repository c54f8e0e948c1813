"""Plain encoders whose blocks are not all of one list: attributes, a dictionary, encoders one after another.

So are blocks that share their list with something else, such as the last norm or a dropout. In which order they run
is seen, as is that each reads what the one before it returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import nn

from captum_lnstat.recording.eager import named
from captum_lnstat.topology.anatomy.embedding import LISTS, block_lists, convolutions, reads_images
from captum_lnstat.topology.anatomy.parts import find_parts
from captum_lnstat.topology.base import register_topology
from captum_lnstat.topology.branches import branch_lists, find_branches, is_called
from captum_lnstat.topology.encoder import EncoderTopology
from captum_lnstat.topology.hierarchical import HierarchicalTopology


@register_topology
class ScatteredTopology(EncoderTopology):
    """Blocks of one kind and width wherever they are, where not all of them are one list."""

    expects = "the same with its blocks, all of one kind and width, wherever they are"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return super().matches(model) and not HierarchicalTopology.matches(model)

    @staticmethod
    def _lists(model: nn.Module) -> dict[str, nn.Module]:
        found = list(dict.fromkeys(_blocks(model)))
        if len({type(block) for block in found}) != 1 or _is_hybrid(model):
            return {}
        widths = {parts.out.out_features for parts in map(find_parts, found) if parts is not None}
        lists = {**block_lists(model), **branch_lists(model)}.values()
        if len(widths) > 1 or any(len(found) == len(list(one.children())) for one in lists):
            return {}
        return {"": nn.ModuleList(found)}

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        names = {id(module): name for name, module in named(self.model).items()}
        return {names[id(block)]: block for block in self._list[1].children()}


def _is_block(module: nn.Module) -> bool:
    return find_parts(module) is not None or (is_called(module) and find_branches(module) is not None)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks in a module, in the order in which they are defined."""
    for child in module.children():
        if _is_block(child):
            yield child
        else:
            yield from _blocks(child)


def _is_hybrid(model: nn.Module) -> bool:
    """Whether blocks share a list with convolutions other than those that read the images."""
    shared = (
        one.children() for one in model.modules() if isinstance(one, LISTS) and any(map(_is_block, one.children()))
    )
    beside = (convolutions(child) for children in shared for child in children if not _is_block(child))
    return any(found and not reads_images(found) for found in beside)
