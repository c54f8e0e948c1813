"""How the head reads the tokens: where class-agnostic relevance starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.recording.fusion import WEIGHTED, HeadFusion, fuse
from captum_lnstat.recording.sites import AttentionSite

if TYPE_CHECKING:
    from jaxtyping import Float


class Pooling(Protocol):
    """How the head reads the tokens, whatever the class: where perception starts."""

    @property
    def name(self) -> str:
        """Shown by ``describe``."""
        ...

    def start(self, batch: int, fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """Weights of the tokens, summing to one."""
        ...


@dataclass(frozen=True)
class FixedPooling:
    """Fixed weights: the class token, several prefix tokens, or the mean over the patches.

    Attributes:
        name: Shown by ``describe``.
        weights: The weight of every token, with a sum of one.
        seen: They were read off the gradient of the head, not off the structure of the model.
    """

    name: str
    weights: Float[Tensor, " token"]
    seen: bool = False

    def start(self, batch: int, fusion: HeadFusion) -> Tensor:
        return self.weights.expand(batch, -1)


@dataclass(frozen=True)
class AttentionPooling:
    """A latent query attends to the tokens: its head-fused attention. ``skipped`` leading tokens are not read."""

    name: str
    site: AttentionSite
    skipped: int

    def start(self, batch: int, fusion: HeadFusion) -> Tensor:
        # Nothing is added to a stream here, so no variance weighs the heads.
        attention = fuse(self.site, "mean" if fusion in WEIGHTED else fusion).mean(1)
        return F.pad(attention / attention.sum(-1, keepdim=True), (self.skipped, 0))
