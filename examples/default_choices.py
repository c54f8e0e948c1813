"""How the default rule was chosen: its nearest alternatives on scenes of the training split, not on the sample scenes.

Needs the photographs and items that ``train_reference_models.py`` names. Prints the tables of
``docs/reference-models.md``.
"""

from __future__ import annotations

import argparse

import torch
from reference_scenes import SceneSource
from torch import Tensor, nn

from captum_lnstat import GenericAttention, LNStatAttribution, zoo
from captum_lnstat.interpolation import to_pixels
from captum_lnstat.metrics import asked_share, energy, iou

SEED = 78  # training used 0


def above(grid: Tensor, level: Tensor) -> Tensor:
    return (grid - level).clamp(min=0)


def mean(grid: Tensor) -> Tensor:
    return grid.mean((1, 2), keepdim=True)


def median(grid: Tensor) -> Tensor:
    return grid.flatten(1).median(1).values[:, None, None]


def relevance(method: object, images: Tensor, target: Tensor) -> Tensor:
    parts = zip(images.split(50), target.split(50), strict=True)
    return torch.cat([method.relevance(x, t) for x, t in parts])


def alternatives(model: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    def grid(**options: object) -> Tensor:
        return relevance(LNStatAttribution(model, **options), images, target)

    p, e = grid(rule="rollout"), grid(rule="evidence")
    rolled, contrasted = grid(rule="evidence", evidence_residual="ratio"), grid(rule="evidence", contrastive=True)
    looked = torch.maximum(p - mean(p), p / 20)
    return {
        "`max(P - mean P, P / 20) * max(E - median E, 0)`: the default": looked * above(e, median(e)),
        "with `E - mean E`": looked * above(e, mean(e)),
        "with `P - median P`": torch.maximum(p - median(p), p / 20) * above(e, median(e)),
        "with `P` as it is": p * above(e, median(e)),
        "with `P * P`": p * p * above(e, median(e)),
        "with evidence rolled by the ratio share": looked * above(rolled, median(rolled)),
        "with contrastive evidence": looked * above(contrasted, median(contrasted)),
        "with uniform merging shares": grid(merging="uniform"),
        "Chefer's generic rule": relevance(GenericAttention(model), images, target),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="of each kind")
    count = parser.parse_args().scenes
    torch.set_num_threads(1)
    source = SceneSource("train", SEED, crops_per_photo=20)
    single, double = source.single(count), source.double(count)
    images = torch.cat([single.images, double.images]) * 2 - 1
    target = torch.cat([single.labels[:, 0], double.labels[:, 0]])
    for name in zoo.names():
        print(f"\n{name}, {count} scenes of each kind\n\n| rule | IoU | energy | two |\n|---|---|---|---|")
        for rule, grid in alternatives(zoo.load(name).model, images, target).items():
            maps = to_pixels(grid, (64, 64), (64 // grid.shape[1], 64 // grid.shape[2]))
            share = asked_share(maps[count:], double.masks[:, 0], double.masks[:, 1])
            two = (share > 0.5).float() + 0.5 * (share == 0.5).float()
            means = (iou(maps[:count], single.masks[:, 0]), energy(maps[:count], single.masks[:, 0]), two)
            print(f"| {rule} | " + " | ".join(f"{float(values.mean()):.3f}" for values in means) + " |")


if __name__ == "__main__":
    main()
