"""The rules on images of full size against a slow oracle, in double and in single precision, and in other pieces.

    python tests/benchmarks/equality.py           # all sizes, about ten minutes on one core, up to 6 GiB
    python tests/benchmarks/equality.py --only swin_tiny_patch4_window7_224@224

The oracle (``tests/helpers/field_oracle.py``) sends fields of one number a token through timm's own code, in float64.
Weights are random, such that attention is peaky and the shares of the blocks vary. Each entry: the largest difference,
of the largest entry of the map. Results are kept in ``docs/cost.json`` and written to ``docs/cost.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from torch import Tensor

import captum_lnstat.recording.sites
import captum_lnstat.rules.engine
from captum_lnstat import LNStatAttribution

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from cost import DINO, PAGE, RECORD, SWIN, VIT, page
from helpers.field_oracle import FieldOracle
from helpers.models import enliven

SETTINGS = [(VIT, 224), (DINO, 518), (VIT, 1024), (SWIN, 224), (SWIN, 448), (SWIN, 896)]
RULES = ("rollout", "evidence", "lnstat", "gradient")
TARGET = 1
FACTOR = 4


@contextmanager
def _pieces(factor: float, compact: int) -> Iterator[None]:
    """Maps made in smaller or larger pieces, recorded tensors copied out of the way or left where they are."""
    sites, engine = captum_lnstat.recording.sites, captum_lnstat.rules.engine
    before = sites.CHUNK, sites.QUERIES, engine.COMPACT
    sites.CHUNK, sites.QUERIES, engine.COMPACT = int(before[0] * factor), int(before[1] * factor), compact
    try:
        yield
    finally:
        sites.CHUNK, sites.QUERIES, engine.COMPACT = before


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def measure(name: str, pixels: int) -> dict[str, dict[str, float]]:
    """For every rule how far float64, float32, and float32 in other pieces are from what they should be."""
    options = {"num_classes": 1000} if "dinov2" in name else {}
    model = enliven(timm.create_model(name, img_size=pixels, **options), 0).eval()
    x = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    double, rows = copy.deepcopy(model).double(), {}
    oracle = FieldOracle(double, x.double(), TARGET).run()
    for rule in RULES:
        exact = LNStatAttribution(double, rule=rule).relevance(x.double(), TARGET)
        method = LNStatAttribution(model.float(), rule=rule)
        single = method.relevance(x, TARGET)
        others = []
        for factor, compact in ((1 / FACTOR, 0), (FACTOR, 1 << 60)):
            with _pieces(factor, compact):
                others.append(method.relevance(x, TARGET))
        wanted = oracle[rule].grid
        rows[rule] = {
            "double": _apart(exact, wanted),
            "single": _apart(single, wanted),
            "pieces": max(_apart(other, single) for other in others),
        }
        print(f"{name}@{pixels}", rule, {key: f"{value:.1e}" for key, value in rows[rule].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="settings, such as swin_tiny_patch4_window7_224@224")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, pixels in SETTINGS:
        key = f"{name}@{pixels}"
        if arguments.only and key not in arguments.only:
            continue
        rows = measure(name, pixels)
        record = json.loads(RECORD.read_text())
        record.setdefault("equality", {})[key] = rows
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
