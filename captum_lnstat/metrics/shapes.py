"""The shapes that measures take and give, for the type checker and the reader; nothing is imported when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    Maps = Float[Tensor, "batch height width"]
    Masks = Bool[Tensor, "batch height width"]
    Images = Float[Tensor, "batch channel height width"]
    PerImage = Float[Tensor, " batch"]
