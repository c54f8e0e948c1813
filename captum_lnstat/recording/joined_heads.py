"""Attention whose heads are modules of their own, seen one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.sites import EVERY, AttentionSite, Queries


@dataclass(frozen=True)
class JoinedHeads(AttentionSite):
    """Several attentions of one head among the same tokens, their outputs joined in the order in which they ran.

    Attributes:
        module: Dotted name of the module that they ran in.
        heads: The attentions.
    """

    module: str
    heads: tuple[AttentionSite, ...]
    output: GradientEdge | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        shapes = {site.shape for site in self.heads}
        if len(shapes) > 1 or self.heads[0].shape[1] != 1:
            raise UnsupportedModelError(
                f"the attentions in {self.module!r} are of shapes {', '.join(map(str, sorted(shapes)))}; expected one, "
                "or several of one head each among the same tokens"
            )
        batch, _, queries, keys = self.heads[0].shape
        return batch, len(self.heads), queries, keys

    @property
    def dtype(self) -> torch.dtype:
        return self.heads[0].dtype

    @property
    def device(self) -> torch.device:
        return self.heads[0].device

    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        return torch.cat([site.probabilities(slice(0, 1), queries) for site in self.heads[heads]], 1)

    def values(self, heads: slice) -> Tensor:
        return torch.cat([site.values(slice(0, 1)) for site in self.heads[heads]], 1)

    def output_gradient(self, gradient: Tensor) -> Tensor:
        raise UnsupportedModelError(f"the attentions in {self.module!r} have no output of their own")
