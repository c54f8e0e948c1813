"""A thousand random models with a planted stimulus: how often its place is found, something is said, or it is refused.

Run ``python tests/benchmarks/never_wrong.py``. Ends with status 1 if any map peaked elsewhere without a word, or if
anything but an error of the package's was raised.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.planted_draws import outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rules", nargs="+", default=["lnstat", "evidence"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for rule in arguments.rules:
        seen = [outcome(seed, rule) for seed in range(arguments.draws)]
        print(rule, dict(Counter(one.kind for one in seen).most_common()))
        for one in seen:
            if one.kind == "wrong":
                print("  wrong:", one.draw, one.text)
                wrong += 1
        reasons = Counter(one.text.split(":")[0] + ": " + one.text[:110] for one in seen if one.kind == "refused")
        for reason, count in reasons.most_common(8):
            print(f"  {count:4d} refused: {reason}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
