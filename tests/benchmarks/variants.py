"""The default rule with one thing changed: methods for ``real.py``, which is how the rule was settled.

    cd tests/benchmarks
    python real.py --split tune --models deit,vit --parts localisation --limit 200 --page ../../docs/ablation.md \\
        --methods "lnstat,variants:Variant(since=0.5)"
"""

from __future__ import annotations

import torch
from torch import nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.rules import Settings, register
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.evidence import Part, evidence
from captum_lnstat.rules.lnstat import BLUR, smoothed
from captum_lnstat.rules.relevance import Relevance
from captum_lnstat.rules.walk import walk


class Variant(LNStatAttribution):
    """``lnstat`` with other numbers.

    Args:
        model: The transformer.
        since: From which part of the blocks on what they contributed counts.
        by_size: Below them, patches share by standard deviations, not by variances.
        blur: Standard deviation of the smoothing, in parts of the map's side.
    """

    def __init__(self, model: nn.Module, since: float = 2 / 3, by_size: bool = True, blur: float = BLUR) -> None:
        def compute(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
            trace = outcome.trace
            part = Part(int(since * len(trace.blocks) + 1e-6), by_size)
            found = walk(trace, settings, evidence(trace, outcome.head, settings, part))[0]
            grid = torch.stack([one.grid for one in found])
            if blur:
                grid = smoothed(grid, (blur * grid.shape[-2], blur * grid.shape[-1]))
            none, nowhere = torch.zeros_like(found[0].padding), torch.zeros_like(found[0].prefix)
            return tuple(Relevance(one, nowhere, none, none) for one in grid.clamp(min=0))

        name = f"lnstat since {since}, {by_size}, {blur}"
        register(name, formula="max(G, 0)", options=("residual", "head_fusion", "contrastive"), starts=False)(compute)
        super().__init__(model, rule=name)
