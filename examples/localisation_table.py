"""Localisation of every method on the sample scenes that ship with the package: the table of the README.

Run ``python examples/localisation_table.py``. The scenes are held out: no item or photograph of them was in training,
and no option was chosen on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from captum_lnstat import AttentionRollout, GenericAttention, LNStatAttribution, zoo
from captum_lnstat.metrics import asked_share, energy, iou, pointing

COLUMNS = ("pointing", "energy", "IoU", "two", "share")


def methods(model: nn.Module) -> dict[str, Callable[[Tensor, list[int]], Tensor]]:
    """Name to attribution, summed over the channels."""
    steps = IntegratedGradients(model)

    def with_captum(images: Tensor, target: list[int]) -> Tensor:
        return steps.attribute(images, target=target, n_steps=32, internal_batch_size=128)

    chosen = {
        "lnstat": LNStatAttribution(model),
        "lnstat, contrastive=True": LNStatAttribution(model, contrastive=True),
        "evidence": LNStatAttribution(model, rule="evidence"),
        "rollout with token statistics": LNStatAttribution(model, rule="rollout"),
        "gradient with token statistics": LNStatAttribution(model, rule="gradient"),
        "Chefer generic attention": GenericAttention(model),
        "attention rollout": AttentionRollout(model),
    }
    table = {name: method.attribute for name, method in chosen.items()}
    table["Captum IntegratedGradients, 32 steps"] = with_captum
    return {
        name: lambda images, target, attribute=attribute: attribute(images, target=target).detach().sum(1)
        for name, attribute in table.items()
    }


def queries(model: zoo.ReferenceModel, objects: int) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Images, asked classes, masks of the asked and of the other object, for scenes with so many objects."""
    images, targets, asked, other = [], [], [], []
    for scene in zoo.scenes():
        if len(scene.labels) != objects:
            continue
        for index, label in enumerate(scene.labels):
            images.append(model.transform(scene.image))
            targets.append(label)
            asked.append(scene.masks[index])
            other.append(scene.masks[-1 - index])
    return torch.stack(images), targets, torch.stack(asked), torch.stack(other)


def batches(attribute: Callable[[Tensor, list[int]], Tensor], images: Tensor, targets: list[int]) -> Tensor:
    def parts() -> Iterator[Tensor]:
        for start in range(0, len(images), 40):
            chosen = slice(start, start + 40)
            yield attribute(images[chosen], targets[chosen])

    return torch.cat(list(parts()))


def row(attribute: Callable[[Tensor, list[int]], Tensor], single: tuple, double: tuple) -> tuple[float, ...]:
    images, targets, masks, _ = single
    maps = batches(attribute, images, targets)
    images, targets, asked, other = double
    share = asked_share(batches(attribute, images, targets), asked, other)
    # Equal relevance on both objects is no answer: it counts as half.
    right = (share > 0.5).float() + 0.5 * (share == 0.5).float()
    means = (pointing(maps, masks), energy(maps, masks), iou(maps, masks), right, share)
    return tuple(float(values.mean()) for values in means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=zoo.names(), help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.model or zoo.names():
        reference = zoo.load(name)
        single, double = queries(reference, 1), queries(reference, 2)
        with torch.no_grad():
            accuracy = (reference.model(single[0]).argmax(1) == torch.tensor(single[1])).float().mean()
        print(f"\n{name}: {len(single[0])} single-object scenes ({accuracy:.1%} accurate), {len(double[0])} queries on")
        print(f"{len(double[0]) // 2} two-object scenes\n")
        print("| method | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
        for method, attribute in methods(reference.model).items():
            print(f"| {method} | " + " | ".join(f"{value:.3f}" for value in row(attribute, single, double)) + " |")


if __name__ == "__main__":
    main()
