"""Maps of heads that read patch tokens as their mean, on the trained ViTs, which have a class token's head.

A linear head on the mean of the last patch tokens is fitted by ridge regression to the model's own scores, on
photographs of even number. On those of odd number that it classes right ``lnstat`` is compared with what it was
without the patches' own part in the middle of the model, with ``evidence``, and with Chefer's rule:
``python -W ignore tests/benchmarks/mean_head.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from real_data import FOLDER, MODELS, check_folder, photographs, real_model
from torch import Tensor, nn

from captum_lnstat import GenericAttention, LNStatAttribution
from captum_lnstat.attribution.base import GridAttribution
from captum_lnstat.attribution.pixels import to_pixels
from captum_lnstat.evaluation.intervals import Ratios, bootstrap
from captum_lnstat.metrics import average_precision, energy, iou, pointing
from captum_lnstat.rules.evidence import Rest
from captum_lnstat.rules.walk import RowVector

RIDGE = 0.05  # in the variance of a channel
BATCH = 10


class MeanHead(nn.Module):
    """A trunk whose head reads the mean of the patch tokens."""

    def __init__(self, trunk: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.trunk = trunk
        with torch.no_grad():
            tokens = torch.cat([trunk.forward_features(some) for some in images.split(BATCH)])
            wanted = trunk.forward_head(tokens).double()
            means = tokens[:, 1:].mean(1).double()
        centre, x = means.mean(0), means - means.mean(0)
        damped = x.T @ x + RIDGE * len(x) * x.var(0).mean() * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(damped, x.T @ (wanted - wanted.mean(0))).T
        self.head = nn.Linear(*weight.shape[::-1])
        self.head.weight.data, self.head.bias.data = weight.float(), (wanted.mean(0) - weight @ centre).float()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.trunk.forward_features(images)[:, 1:].mean(1))
        return scores


def all_constant(self: Rest, r: RowVector, tokens: Tensor, patches: slice) -> tuple[RowVector, Rest]:
    """In place of ``Rest.ended``: whatever is read in the middle of the model belongs to the constant."""
    read = self.read(tokens)
    return r, self if read is None else Rest(None, (*self.constants, read.sum(1)))


def maps(method: GridAttribution, images: Tensor, targets: Tensor) -> Tensor:
    """On the pixels, smoothly enlarged."""
    parts = zip(images.split(BATCH), targets.split(BATCH), strict=True)
    grid = torch.cat([method.relevance(some, target=which) for some, which in parts])
    size = images.shape[-2], images.shape[-1]
    return to_pixels(grid, size, (size[0] // grid.shape[1], size[1] // grid.shape[2]), "bilinear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--real", type=Path, default=FOLDER)
    parser.add_argument("--images", type=int, default=300, help="at most, to fit the head and to look at")
    options = parser.parse_args()
    check_folder(options.real)
    torch.set_num_threads(1)
    for title in MODELS:
        subject = real_model(options.real, title)
        fitted = photographs(options.real, subject, options.images, odd=False)
        shown = photographs(options.real, subject, options.images, odd=True)
        model = MeanHead(subject.model, fitted.images).eval()
        with torch.no_grad():
            right = torch.cat([model(some).argmax(1) for some in shown.images.split(BATCH)]) == shown.targets
        shown = replace(
            shown, images=shown.images[right], boxes=shown.boxes[right], targets=shown.targets[right], numbers=()
        )
        found = {
            "Chefer": maps(GenericAttention(model), shown.images, shown.targets),
            "lnstat": maps(LNStatAttribution(model), shown.images, shown.targets),
            "evidence": maps(LNStatAttribution(model, rule="evidence"), shown.images, shown.targets),
        }
        with patch.object(Rest, "ended", all_constant):
            found["lnstat, patches constant"] = maps(LNStatAttribution(model), shown.images, shown.targets)
        base = iou(found["Chefer"], shown.boxes).double().numpy()[:, None]
        print(f"{title}, head on the mean of the patches, n = {len(shown.images)}")
        for name, some in found.items():
            (ratio,) = bootstrap([Ratios(iou(some, shown.boxes).double().numpy()[:, None], base)], 0)
            values = [float(np.mean(f(some, shown.boxes).numpy())) for f in (iou, average_precision, pointing, energy)]
            cells = "  ".join(f"{n} {v:.3f}" for n, v in zip(("IoU", "AP", "pointing", "energy"), values, strict=True))
            print(f"  {name:26s} {cells}  IoU of Chefer's {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")


if __name__ == "__main__":
    main()
