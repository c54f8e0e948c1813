"""What a call of each rule gives a device to do: kernels launched, and numbers that the host waits for.

``python tests/benchmarks/launches.py`` takes the CPU for a device that has to be waited for, and counts operations,
views left out, in the first call and in later ones, beside those of the forward pass. Batches of two, random weights.
The table of ``docs/devices.md`` is made by it; ``tests/rules/test_stacked_blocks.py`` holds the bounds.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import nn

from captum_lnstat import LNStatAttribution, zoo
from captum_lnstat.recording import devices

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.launches import Launches

RULES = ("lnstat", "evidence", "rollout", "gradient")


def models() -> Iterator[tuple[str, nn.Module, int]]:
    """Name, model and side of the images."""
    yield "ViT-S", timm.create_model("vit_small_patch16_224").eval(), 224
    yield "Swin-T", timm.create_model("swin_tiny_patch4_window7_224").eval(), 224
    for name in ("vit-mini", "swin-mini"):
        yield name, zoo.load(name).model, 64


def main() -> None:
    warnings.simplefilter("ignore")  # of maps of nothing, where weights are random
    torch.set_num_threads(1)
    devices.AT_ONCE.clear()
    print("| model | forward | rule | first call | later calls | of the forward pass | reads |")
    print("|---|---|---|---|---|---|---|")
    for name, model, side in models():
        images = torch.rand(2, 3, side, side)
        with torch.no_grad(), Launches() as forward:
            model(images)
        for rule in RULES:
            method = LNStatAttribution(model, rule=rule)
            counted = []
            for _ in range(3):
                with Launches() as launches:
                    method.attribute(images, target=1)
                counted.append(launches)
            first, *_, last = counted
            times = last.count / forward.count
            print(f"| {name} | {forward.count} | {rule} | {first.count} | {last.count} | {times:.1f} | {last.reads} |")


if __name__ == "__main__":
    main()
