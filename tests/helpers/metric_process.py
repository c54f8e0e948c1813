"""What each of two processes does with its part of the images. Torchmetrics is not imported before it is asked for."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from captum_lnstat import metrics


def score(images):
    """Each image by itself, so that no batch can change it."""
    return torch.stack(
        [torch.stack([image.sum(), image.square().sum(), image[0, 0, 0] * 9]) for image in images.double()]
    )


def explain(images, target):
    return images.square().sum(1)


def everything():
    """Metrics with their arguments for some of the images."""
    from helpers.metric_harness import CASES, HEIGHT, WIDTH, boxes, maps, truths

    random = torch.Generator().manual_seed(5)
    images = torch.rand(6, 3, HEIGHT, WIDTH, generator=random) - 0.4
    classes, fill = torch.tensor([0, 1, 2, 0, 1, 2]), torch.zeros(1, 3, 1, 1)
    found = [(name, case.metric(), case.chosen) for name, case in CASES.items()]
    found += [("segmentation sums", metrics.Segmentation(), lambda places: (maps()[places], truths()[places]))]

    def on_model(places):
        return score, images[places], maps()[places], classes[places]

    def localised(places):
        return maps()[places], [boxes()[i] for i in places], classes[places], torch.tensor([0, 0, 2, 0, 1, 1])[places]

    found += [
        ("positive", metrics.PositivePerturbation(fill), on_model),
        ("negative", metrics.NegativePerturbation(metrics.mean_colour), on_model),
        ("deletion", metrics.Deletion(fill, steps=4), on_model),
        ("insertion", metrics.Insertion(metrics.mean_colour, steps=4), on_model),
        ("saco", metrics.SaCo(metrics.mean_colour, groups=4), on_model),
        ("maxbox", metrics.MaxBoxAcc(steps=8), lambda places: (maps()[places], [boxes()[i] for i in places])),
        ("infidelity", metrics.Infidelity(fill, draws=3, patch=2), on_model),
        ("sensitivity", metrics.Sensitivity(draws=2), lambda places: (explain, images[places], classes[places])),
        ("top-1", metrics.Top1Localisation(), localised),
    ]
    return found


def run(rank, folder):
    """The first of two processes takes four images in two batches, the second two; of one metric it takes none."""
    assert "torchmetrics" not in sys.modules, "captum_lnstat.metrics imports torchmetrics before it is asked for"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    values = {}
    for name, metric, arguments in everything():
        batches = [[0, 1, 2], [5]] if rank == 0 else [[4, 3]]
        if name == "top-1":  # all of it on one process: the other has seen no image
            batches = [[0, 1, 2, 3, 4, 5]] if rank == 1 else []
        for places in batches:
            metric.update(*arguments(places))
        values[name] = metric.compute()
    torch.save(values, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
