"""The default rule with one thing changed: methods for ``real.py``, which is how the rule was settled.

    cd tests/benchmarks
    python real.py --split tune --models deit,vit --parts localisation --limit 200 --page ../../docs/ablation.md \\
        --methods "lnstat,variants:Variant(since=0.5)"
"""

from __future__ import annotations

from torch import nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.rules import Settings, register
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.evidence import Part
from captum_lnstat.rules.lnstat import BLUR, in_favour
from captum_lnstat.rules.relevance import Relevance


class Variant(LNStatAttribution):
    """``lnstat`` with other numbers.

    Args:
        model: The transformer.
        since: From which part of the blocks on what they contributed counts.
        by_sigma: Below them, patches share by standard deviations, not by variances.
        blur: Standard deviation of the smoothing, in parts of the map's side.
    """

    def __init__(self, model: nn.Module, since: float = 2 / 3, by_sigma: bool = True, blur: float = BLUR) -> None:
        def compute(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
            return in_favour(outcome, settings, Part(int(since * len(outcome.trace.blocks) + 1e-6), by_sigma), blur)

        name = f"lnstat since {since}, {by_sigma}, {blur}"
        register(name, formula="max(G, 0)", options=("residual", "head_fusion", "contrastive"), starts=False)(compute)
        super().__init__(model, rule=name)
