"""The comparison run: every method on every image, every metric on every map, on disk as soon as it is known."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from captum_lnstat._version import __version__
from captum_lnstat.errors import one_line
from captum_lnstat.evaluation import measures as measures_room
from captum_lnstat.evaluation import methods as methods_room
from captum_lnstat.evaluation.datasets import Dataset
from captum_lnstat.evaluation.loading import batches
from captum_lnstat.evaluation.outputs import write_outputs
from captum_lnstat.evaluation.records import Records, check_manifest
from captum_lnstat.evaluation.settings import RunError, Settings
from captum_lnstat.evaluation.subject import Subject
from captum_lnstat.evaluation.team import Team
from captum_lnstat.evaluation.worker import Worker
from captum_lnstat.explanation.subject.progress import ProgressBar


def evaluate(
    settings: Settings,
    dataset: Dataset,
    subject: Subject,
    folder: Path,
    team: Team,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run, or go on with, a comparison, and write its results into a folder.

    Args:
        settings: What is evaluated; names are those of ``dataset`` and ``subject``.
        dataset: The images.
        subject: The model.
        folder: Where results go: new, or that of a run of the same settings, which is then gone on with.
        team: The processes that share the work.
        say: Told what people want to know.

    Returns:
        The summary, on every process.

    Raises:
        ValueError: A method, metric or setting is not what is expected.
        ResumeError: The folder holds a run of other settings.
        BrokenFileError: A file is missing or damaged, and it is not to be skipped.
        RunError: A method failed on an image.
    """
    methods = methods_room.build(settings.methods, subject, settings.batch_size)
    measures = measures_room.build(settings.metrics)
    _check_classes(settings, dataset, subject)
    manifest = _manifest(settings, dataset, subject)
    team.agree(manifest, "the run")
    resumed = _together(team, lambda: check_manifest(folder, manifest, write=True))

    chosen = _chosen(len(dataset), settings)
    records = Records(folder / "records")
    before = {record["index"] for record in records.read()}
    wanted = set(chosen)
    blocks = [chosen[start : start + settings.batch_size] for start in range(0, len(chosen), settings.batch_size)]
    # Blocks do not depend on who works on them or on what was done before, so neither do batches, nor numbers.
    left = [block for block in blocks if not before.issuperset(block)]
    if resumed and team.leads:
        say(f"going on: {len(before & wanted)} of {len(chosen)} samples are there")
    team.wait()

    worker = Worker(settings, dataset, subject, methods, measures)
    written, mine = 0, left[team.rank :: team.size]
    with ProgressBar(total=sum(map(len, mine)), unit="image", disable=not team.leads or not left) as bar:
        for block, loaded in batches(dataset, subject.frame, mine, settings.workers):
            new = [record for record in worker.records(block, loaded) if record["index"] not in before]
            records.append(new)
            written += len(new)
            bar.update(len(block))
    total = team.total(written)  # which waits for all

    def finish() -> dict[str, Any]:
        found = [record for record in records.read() if record["index"] in wanted]
        missing = len(chosen) - len(found)
        if missing:
            raise RunError(
                f"{missing} of {len(chosen)} samples are missing, though {total} were done; expected all. Is "
                f"{str(folder)!r} on a disk that all hosts share?"
            )
        return write_outputs(folder, manifest, found, methods, measures, settings.seed, settings.results)

    summary: dict[str, Any] = _together(team, finish)
    return summary


def _together(team: Team, work: Callable[[], Any]) -> Any:
    """Let the first process do something, and give what comes of it, an error of any kind too, to all."""
    outcome: Any = None
    failure: Exception | None = None
    if team.leads:
        try:
            outcome = work()
        except Exception as error:
            failure = error
    outcome, theirs = team.lead((outcome, failure and _portable(failure)))
    if theirs is not None:
        raise failure or theirs
    return outcome


def _portable(error: Exception) -> Exception:
    """An error as it can be sent to another process: itself, or else what it says."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever an error that was not made for it may raise when it is copied
        pass
    return RunError(f"{type(error).__name__}: {one_line(error)}")


def _check_classes(settings: Settings, dataset: Dataset, subject: Subject) -> None:
    if settings.batch_size < 1 or (settings.limit is not None and settings.limit < 1):
        raise ValueError(f"batch size is {settings.batch_size} and limit {settings.limit}; expected 1 or more")
    if settings.explained == "predicted":
        return
    known = len(dataset.class_names)
    if not known:
        raise ValueError(f"{settings.data} has no classes to ask for; take --class predicted")
    if known != subject.classes:
        raise ValueError(
            f"{settings.data} has {known} classes of its own and {settings.model} gives {subject.classes} scores, so "
            "the data's classes are not the model's; take --class predicted"
        )


def _manifest(settings: Settings, dataset: Dataset, subject: Subject) -> dict[str, Any]:
    """All on which a number depends. How many images, in which batches, by how many processes, is not among it."""
    names = hashlib.sha256()
    for index in range(len(dataset)):
        names.update(f"{dataset.name(index)}\n".encode())
    return {
        "captum_lnstat": __version__,
        "torch": str(torch.__version__),
        "data": settings.data,
        "samples": len(dataset),
        "names": names.hexdigest(),
        "model": settings.model,
        "weights": subject.digest,
        "frame": subject.frame.record(),
        "methods": settings.methods,
        "metrics": settings.metrics,
        "class": settings.explained,
        "fill": settings.fill,
        "seed": settings.seed,
        **({"autocast": settings.autocast} if settings.autocast else {}),  # runs from before it was there go on
    }


def _chosen(count: int, settings: Settings) -> list[int]:
    """All indices, or the first ``limit`` of a permutation, in order: a larger limit asks for more, not for others."""
    if settings.limit is None or settings.limit >= count:
        return list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed), device="cpu")
    return sorted(order[: settings.limit].tolist())


__all__ = ["RunError", "Settings", "evaluate"]
