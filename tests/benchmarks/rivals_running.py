"""What ``rivals.py`` measures, and in which order: images are added in rounds, so that a run can be stopped.

The records are those of ``real.py``, in the same ``--folder``: a stopped run goes on. A few images for every row and
part come first, then all of those of the cheap methods, then those of the slow ones: a run that is stopped has a table
with fewer images, and not with fewer rows. ``--processes`` share the rows of each part. ``--quick`` asks the models of
perturbed images in bfloat16, as ``captum-lnstat evaluate --autocast bfloat16``; all other columns are in float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import real
import torch
from real import Part
from real_subjects import CLOTHES, DINO, Photographs, Split, open_model
from rivals_cost import Costs, cost

from captum_lnstat.evaluation import figure

# From so many forward passes on, a method is given this part of the images; from the second line on, of the first part
# of the page alone.
SLOW, SLOWER = 15, 50
PARTS_OF_IMAGES = {0: 1.0, SLOW: 0.2, SLOWER: 0.1, 150: 0.05}
SURELY_SLOWER = {"vitcx", "rise", "ig", "occlusion"}
ROUNDS = (0.2, 0.5, 1.0)  # if it may be stopped; images of unfinished batches are done again in the next

# All that is asked of a map of one photograph is asked at once, for many maps cost more than what they are asked.
PARTS: dict[str, Part] = {
    "boxes": Part("Boxes", "pointing,energy,iou,ap,maxbox"),
    "mosaics": real.PARTS["mosaics"],
    "masks": Part("Masks, Oxford-IIIT pets", "segmentation", "predicted", 250, photographs="pets"),
    "coefficient": Part("SaCo", "saco"),
    "predicted": Part("Perturbation of the predicted class", "positive,negative", "predicted", photographs="all"),
    "perturbation": Part("Perturbation", "positive,negative,insertion(steps=16),deletion(steps=16)"),
    "scenes": Part("Scenes", "pointing,energy,iou,ap", photographs="all"),
    "pairs": Part("Scenes with two objects", "two", photographs="pairs"),
}
PERTURBED = ("predicted", "perturbation")  # where a model is asked of many images with replaced pixels
SCENES = ("scenes", "pairs")
OF_CLOTHES = (*SCENES, "predicted")  # what the models of clothes are asked
# As many as 100, fewer where each takes many forward passes.
QUICK = {
    "boxes": 100,
    "mosaics": 10,
    "masks": 40,
    "coefficient": 30,
    "predicted": 30,
    "perturbation": 15,
    "scenes": 250,
    "pairs": 100,
}


def rounds(parts: Sequence[str], shares: Sequence[float]) -> Iterator[tuple[float, str, bool]]:
    """A share of the images, a part, and whether of the slow methods: a few images for all, then the cheap ones'."""
    first, *later = shares
    yield from ((first, part, slow) for slow in (False, True) for part in parts)
    yield from ((share, part, slow) for slow in (False, True) for share in later for part in parts)


def asked_of(model: str, part: str) -> bool:
    """Whether a part has images for a model, and its score is asked of them."""
    if model == DINO:
        return part == "masks"
    return part in OF_CLOTHES if model in CLOTHES else part not in SCENES


@dataclass(frozen=True)
class Step:
    """Some images of one part for one method on one model."""

    model: str
    part: str
    method: str
    limit: int


def run(models: Sequence[str], methods: Sequence[str], options: argparse.Namespace) -> None:
    """All rounds, or as many as the time allows."""
    ends = time.time() + 60 * options.minutes if options.minutes else float("inf")
    with workers(options) as each:
        costs = dict(zip(models, each(partial(prepare, methods, options), models), strict=True))
        shares = ROUNDS if options.minutes else (1.0,)
        # No two processes work on the same records: of what is done together, nothing is there twice.
        for _, together in groupby(rounds(options.parts.split(","), shares), lambda one: (one[0], one[2])):
            todo = [step for some in together for step in steps(models, methods, costs, options.quick, *some)]
            if not all(each(partial(take, options, ends), todo)):
                print("the time is over", file=sys.stderr)
                return


@contextmanager
def workers(options: argparse.Namespace) -> Iterator[Callable[..., Iterable[Any]]]:
    """``map``, in this process or in several."""
    if options.processes == 1:
        begin()
        yield lambda work, over: list(map(work, over))
    else:
        with ProcessPoolExecutor(options.processes, get_context("spawn"), begin) as pool:
            yield pool.map


def begin() -> None:
    """In every process."""
    torch.set_num_threads(1)
    figure.png = lambda summary, title: b""  # a second for each of thousands of runs, and nobody looks at it


@cache
def opened(model: str, split: Split, data: Path, folder: Path, device: str) -> Photographs:
    """A model, opened once in a process."""
    return open_model(model, split, data, folder, device)


def model_of(name: str, options: argparse.Namespace) -> Photographs:
    return opened(name, options.split, options.data, options.folder, options.device)


def prepare(methods: Sequence[str], options: argparse.Namespace, name: str) -> Costs:
    """What the methods cost on a model; and what it makes of the photographs is known from then on."""
    model = model_of(name, options)
    for part in options.parts.split(","):
        if asked_of(name, part):
            real.dataset_of(model, PARTS[part], options.folder)
    # What they cost would take longer to know than all else that such a model is asked.
    slow = () if asked_of(name, next(iter(PARTS))) else SURELY_SLOWER
    return cost(model, [method for method in methods if method not in slow], options.folder)


def steps(
    models: Sequence[str], methods: Sequence[str], costs: dict[str, Costs], quick: bool,
    share: float, part: str, slow: bool,
) -> Iterator[Step]:  # fmt: skip
    """What there is to do in a round."""
    whole = QUICK[part] if quick else PARTS[part].images
    for model in models:
        for method in methods if asked_of(model, part) else ():
            passes = costs[model].get(method, {}).get("passes")
            if passes is None or (passes >= SLOW) != slow or (passes >= SLOWER and part != next(iter(PARTS))):
                continue
            few = min(some for least, some in PARTS_OF_IMAGES.items() if passes >= least)
            yield Step(model, part, method, max(1, round(whole * share * few)))


def take(options: argparse.Namespace, ends: float, step: Step) -> bool:
    """One step, if there is time for it."""
    if time.time() > ends:
        return False
    autocast = "bfloat16" if options.quick and step.part in PERTURBED else ""
    asked = argparse.Namespace(limit=step.limit, again=False, batch_size=options.batch_size, autocast=autocast)
    real.measure(model_of(step.model, options), step.part, [step.method], options.folder, asked, PARTS)
    return True
