"""What ``compile`` saves on a CPU: ``python tests/benchmarks/compiled.py``, some six minutes.

One thread, CPU time, medians of calls in turns: the forward pass, the same as ``torch.compile`` makes it,
``attribute``, and ``attribute`` of a compiled method. One image; random weights where there are none in the package.
The table of ``docs/devices.md`` is made by it.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch

from captum_lnstat import LNStatAttribution, zoo

MODELS = ("vit-mini", "swin-mini", "vit_tiny_patch16_224", "vit_small_patch16_224", "swin_tiny_patch4_window7_224")
RULES = ("lnstat", "gradient")
CALLS = 15


def in_turns(*calls: Callable[[], Any]) -> list[float]:
    """Milliseconds of each; the first two rounds do not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(CALLS + 2):
        for call, own in zip(calls, taken, strict=True):
            begin = time.process_time()
            call()
            if turn > 1:
                own.append(1e3 * (time.process_time() - begin))
    return [statistics.median(own) for own in taken]


def main() -> None:
    warnings.simplefilter("ignore")  # of maps of nothing, where weights are random
    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns = "forward, ms", "forward, compiled", "attribute", "compiled", "times the forward pass", "to compile, s"
    print(f"| model | rule | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        small = name.endswith("mini")
        model = zoo.load(name).model if small else timm.create_model(name).eval()
        side = 64 if small else 224
        image, target = torch.rand(1, 3, side, side), torch.tensor([1])
        quick = torch.compile(model)
        for rule in RULES:
            method = LNStatAttribution(model, rule=rule)
            begin = time.monotonic()
            compiled = method.compile(image, target)
            took = time.monotonic() - begin
            with torch.no_grad():
                forward, alone, own, found = in_turns(
                    lambda: model(image),  # noqa: B023
                    lambda: quick(image),  # noqa: B023
                    lambda: method.attribute(image, target=target),  # noqa: B023
                    lambda: compiled.attribute(image, target=target),  # noqa: B023
                )
            times = f"{own / forward:.2f}, {found / forward:.2f}"
            cells = f"{forward:.1f} | {alone:.1f} | {own:.1f} | {found:.1f} | {times}"
            print(f"| {name} | {rule} | {cells} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
