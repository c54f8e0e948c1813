"""Vision transformers as tutorials and libraries without one base class write them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helpers.plain_models import CLASSES, WIDTH, Plain


class Encoder(nn.Module):
    """Patches, a class token perhaps, and ``nn.TransformerEncoder`` in any of its forms.

    Args:
        pool: ``"mean"`` or ``"class"``.
        outside: Of ``batch_first=False``: turn the tokens round before and after the encoder only.
        final: A LayerNorm at the end of the encoder.
        options: Of ``nn.TransformerEncoderLayer``.
    """

    def __init__(self, pool: str = "mean", outside: bool = True, final: bool = False, **options: Any) -> None:
        super().__init__()
        self.pool, self.batch_first = pool, options.get("batch_first", False)
        self.inside = not self.batch_first and not outside
        self.cut = nn.Conv2d(3, WIDTH, 8, 8)
        self.place = nn.Parameter(torch.zeros(1, 24, WIDTH))
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 32, **options)
        self.mix = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH) if final else None, enable_nested_tensor=False)
        self.say = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        t = self.cut(x).flatten(2).mT + self.place
        batch, tokens = (1, 0) if self.inside else (0, 1)
        t = t.transpose(0, 1) if self.inside else t
        if self.pool == "class":
            size = [1, 1, WIDTH]
            size[batch] = len(x)
            t = torch.cat([self.start.expand(size), t], tokens)
        t = self.mix(t) if self.batch_first or self.inside else self.mix(t.transpose(0, 1)).transpose(0, 1)
        scores: Tensor = self.say(t.mean(tokens) if self.pool == "mean" else t.select(tokens, 0))
        return scores


def _encoder(name: str, pool: str, **options: Any) -> Plain:
    prefix, reads = (1, "class token") if pool == "class" else (0, "mean of the tokens")
    return Plain(f"encoder-{name}", partial(Encoder, pool, **options), (32, 48), (4, 6), (8, 8), prefix, reads)


ENCODERS = [
    _encoder("as-made", "mean"),
    _encoder("post-norm", "class", batch_first=True),
    _encoder("post-norm-gelu-final", "mean", batch_first=True, activation="gelu", final=True),
    _encoder("post-norm-final-class", "class", final=True, activation="gelu"),
    _encoder("post-norm-no-bias", "mean", batch_first=True, bias=False),
    _encoder("tokens-first", "class", outside=False),
    _encoder("tokens-first-mean-final", "mean", outside=False, final=True),
    _encoder("pre-norm-tokens-first", "mean", norm_first=True, final=True),
    _encoder("pre-norm-tokens-first-class", "class", norm_first=True, outside=False, final=True),
]
