"""The comparison run: every method on every image, every metric on every map, on disk as soon as it is known."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from captum_lnstat._console import one_line
from captum_lnstat._version import __version__
from captum_lnstat.evaluation import measures as measures_room
from captum_lnstat.evaluation import methods as methods_room
from captum_lnstat.evaluation.datasets import BrokenFileError, Dataset
from captum_lnstat.evaluation.frame import Framed
from captum_lnstat.evaluation.loading import Broken, Partners, batches
from captum_lnstat.evaluation.measures import Asked, Measure
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.outputs import write_outputs
from captum_lnstat.evaluation.records import Record, Records, check_manifest
from captum_lnstat.evaluation.subject import Subject
from captum_lnstat.evaluation.team import Team

AskedClass = Literal["true", "predicted"]


class RunError(RuntimeError):
    """The run cannot go on; the message says where it stopped and why."""


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how.

    Attributes:
        data: ``KIND`` or ``KIND:PATH``.
        model: The model's name.
        methods: Names separated by commas.
        metrics: The same.
        asked: Which class is explained: the image's own, or the predicted one.
        fill: What replaces pixels, for all metrics that do; empty for what is usual for each.
        seed: Of everything random.
        limit: So many samples, drawn by the seed; all if None.
        batch_size: Images at a time.
        skip_broken: Count what cannot be read or explained instead of stopping.
        workers: Threads that read images.
        results: ``"csv"`` or ``"parquet"``, the form of the numbers of each image.
    """

    data: str
    model: str
    methods: str
    metrics: str
    asked: AskedClass
    fill: str = ""
    seed: int = 0
    limit: int | None = None
    batch_size: int = 16
    skip_broken: bool = False
    workers: int = 2
    results: str = "csv"


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

    worker = _Worker(settings, dataset, subject, methods, measures)
    written, bar = 0, tqdm(total=sum(map(len, left[:: team.size])), unit="image", disable=not team.leads or not left)
    with bar:
        mine = left[team.rank :: team.size]
        for block, loaded in batches(dataset, subject.frame, mine, settings.workers):
            new = [record for record in worker.records(block, loaded) if record["index"] not in before]
            records.append(new)
            written += len(new)
            bar.update(len(block))
    total = team.total(written)
    team.wait()

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
    """Let the first process do something, and give what comes of it, an error too, to all."""
    outcome: Any = None
    if team.leads:
        try:
            outcome = work()
        except (ValueError, OSError, RuntimeError) as error:
            outcome = error
    outcome = team.lead(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _check_classes(settings: Settings, dataset: Dataset, subject: Subject) -> None:
    if settings.batch_size < 1 or (settings.limit is not None and settings.limit < 1):
        raise ValueError(f"batch size is {settings.batch_size} and limit {settings.limit}; expected 1 or more")
    if settings.asked == "predicted":
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
    frame = asdict(subject.frame)
    frame["interpolation"] = subject.frame.interpolation.name
    return {
        "captum_lnstat": __version__,
        "torch": str(torch.__version__),
        "data": settings.data,
        "samples": len(dataset),
        "names": names.hexdigest(),
        "model": settings.model,
        "weights": subject.digest,
        "frame": frame,
        "methods": settings.methods,
        "metrics": settings.metrics,
        "class": settings.asked,
        "fill": settings.fill,
        "seed": settings.seed,
    }


def _chosen(count: int, settings: Settings) -> list[int]:
    """All indices, or the first ``limit`` of a permutation, in order: a larger limit asks for more, not for others."""
    if settings.limit is None or settings.limit >= count:
        return list(range(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    return sorted(order[: settings.limit].tolist())


class _Worker:
    """What one process does with a block of samples."""

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        subject: Subject,
        methods: Sequence[Method],
        measures: Sequence[Measure],
    ) -> None:
        self.settings, self.dataset, self.subject = settings, dataset, subject
        self.methods, self.measures = methods, measures
        self.partners = Partners(dataset, subject.frame, settings.seed)

    def records(self, block: Sequence[int], loaded: list[Framed | Broken]) -> Iterator[Record]:
        """One record a sample."""
        good = [(index, one) for index, one in zip(block, loaded, strict=True) if isinstance(one, Framed)]
        for broken in loaded:
            if isinstance(broken, Broken):
                if not self.settings.skip_broken:
                    raise BrokenFileError(
                        f"{broken.reason}. To leave such images out and count them, add --skip-broken"
                    )
                yield {"index": broken.index, "name": broken.name, "group": broken.name, "broken": broken.reason}
        if not good:
            return
        self.partners.forget()
        asked, confidence = self._ask(tuple(one for _, one in good))
        rows: list[Record] = [
            {
                "index": index,
                "name": one.sample.name,
                "group": one.sample.group,
                "target": one.sample.target,
                "predicted": int(asked.predicted[row]),
                "confidence": _number(confidence[row]),
                "explained": int(asked.targets[row]),
                "only_two": one.sample.only_two,
                "methods": {},
            }
            for row, (index, one) in enumerate(good)
        ]
        for method in self.methods:
            for row, values in zip(rows, self._values(asked, method), strict=True):
                row["methods"][method.name] = values
        yield from rows

    def _ask(self, framed: tuple[Framed, ...]) -> tuple[Asked, Tensor]:
        images = torch.stack([one.image for one in framed]).to(self.subject.device)
        with torch.no_grad():
            probabilities = self.subject.forward(images).float().softmax(-1)
        confidence, predicted = probabilities.max(-1)
        targets = predicted
        if self.settings.asked == "true":
            missing = next((one.sample.name for one in framed if one.sample.target is None), None)
            if missing is not None:
                raise RunError(f"{missing} has no class to ask for; take --class predicted")
            targets = torch.tensor([one.sample.target for one in framed], device=images.device)
        fill, seed = self.settings.fill, self.settings.seed
        return Asked(framed, images, targets, predicted, self.subject, seed, fill, self.partners), confidence

    def _values(self, asked: Asked, method: Method) -> list[Record]:
        """What a method gets on every image; image by image if it fails on one of them."""
        try:
            return self._measured(asked, method)
        except Exception as error:  # whatever a method, or the user's own class, may raise
            if len(asked.framed) > 1:
                return [values for row in range(len(asked.framed)) for values in self._values(asked.of([row]), method)]
            reason = one_line(error) if isinstance(error, RunError) else f"{type(error).__name__}: {one_line(error)}"
            if not self.settings.skip_broken:
                raise RunError(
                    f"method {method.name!r} failed on {asked.names[0]}: {reason}. To leave such images out and count "
                    "them, add --skip-broken"
                ) from error
            return [{"failed": reason}]

    def _measured(self, asked: Asked, method: Method) -> list[Record]:
        begin = self._now()
        maps = method.maps(asked.images, asked.targets, asked.names, asked.seed)
        seconds = (self._now() - begin) / len(maps)
        found: list[Record] = [{"seconds": float(f"{seconds:.4g}")} for _ in asked.framed]
        for measure in self.measures:
            true = self.settings.asked == "true"
            rows = [row for row, one in enumerate(asked.framed) if measure.applies(one, true)]
            if not rows:
                continue
            chosen = maps if len(rows) == len(maps) else maps[rows]
            try:
                computed = measure.compute(asked.of(rows), chosen, method)
            except Exception as error:
                raise RunError(f"metric {measure.name!r}: {type(error).__name__}: {one_line(error)}") from error
            for column, values in computed.items():
                for row, value in zip(rows, values, strict=True):
                    if bool(value.isfinite()):
                        found[row][column] = _number(value)
        return found

    def _now(self) -> float:
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize(self.subject.device)
        return time.perf_counter()


def _number(value: Tensor) -> float:
    """As many digits as float32 has."""
    return float(f"{float(value):.8g}")
