"""How the head reads the tokens: where class-agnostic relevance starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.fusion import WEIGHTED, HeadFusion, fuse
from captum_lnstat.recording.sites import AttentionSite

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
    """Latent queries attend to the tokens: their head-fused attention.

    Attributes:
        name: Shown by ``describe``.
        site: The attention.
        skipped: So many leading tokens are not read.
        queries: The queries that the scores read, if not all of them.
        seen: It was read off the gradient of the head, not off the structure of the model.
    """

    name: str
    site: AttentionSite
    skipped: int
    queries: Int[Tensor, " query"] | None = None
    seen: bool = False

    def start(self, batch: int, fusion: HeadFusion) -> Tensor:
        # Nothing is added to a stream here, so no variance weighs the heads.
        attention = fuse(self.site, "mean" if fusion in WEIGHTED else fusion)
        attention = (attention if self.queries is None else attention[:, self.queries]).mean(1)
        return F.pad(attention / attention.sum(-1, keepdim=True), (self.skipped, 0))


@dataclass(frozen=True)
class UndefinedPooling:
    """The head reads each token in a way of its own: no weights of the tokens are the same for every class.

    Attributes:
        name: Shown by ``describe``.
        why: Of the error, where such weights are asked for.
    """

    name: str
    why: str

    def start(self, batch: int, fusion: HeadFusion) -> Tensor:
        raise UnsupportedModelError(self.why)
