"""What every rule returns, and the options it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.statistics import ResidualShare
from captum_lnstat.trace.steps import MergingShare

if TYPE_CHECKING:
    from jaxtyping import Float


def per_image(values: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """Sum everything but the batch."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


@dataclass(frozen=True)
class Settings:
    """Options of the rules.

    Attributes:
        residual: How the residual share of a token follows from its statistics.
        head_fusion: How the maps of the heads become one; ``"deviation"`` and ``"variance"`` weigh what each
            source brings.
        merging: How a merged token gives its relevance to its children.
        normalized: Rows of the positive gradient attention are divided by their sum.
    """

    residual: ResidualShare = "deviation"
    head_fusion: HeadFusion = "deviation"
    merging: MergingShare = "variance"
    normalized: bool = True


@dataclass(frozen=True)
class Relevance:
    """Relevance of every patch, and where the rest of it went.

    Attributes:
        grid: Relevance on the patch grid.
        prefix: What ended on the prefix tokens.
        padding: What padded places of windows took.
        constant: What belongs to no token: biases and the LayerNorms' betas.
    """

    grid: Float[Tensor, "batch *grid"]
    prefix: Float[Tensor, "batch token"]
    padding: Float[Tensor, " batch"]
    constant: Float[Tensor, " batch"]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The sum of everything: 1 for perception, the target's score for evidence."""
        return per_image(self.grid) + self.prefix.sum(1) + self.padding + self.constant

    @classmethod
    def joined(cls, parts: Sequence[Relevance]) -> Relevance:
        """Those of several scores as one batch, score by score."""
        if len(parts) == 1:
            return parts[0]
        fields = ((one.grid, one.prefix, one.padding, one.constant) for one in parts)
        return cls(*map(torch.cat, zip(*fields, strict=True)))
