"""What one process does with a batch of samples: explain, measure, and make records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captum_lnstat.errors import one_line
from captum_lnstat.evaluation.datasets import BrokenFileError, Dataset
from captum_lnstat.evaluation.frame import Example
from captum_lnstat.evaluation.loading import Broken, Partners
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.question import Batch, Measure
from captum_lnstat.evaluation.records import Record
from captum_lnstat.evaluation.settings import RunError, Settings
from captum_lnstat.evaluation.subject import Subject


class Worker:
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

    def records(self, block: Sequence[int], loaded: list[Example | Broken]) -> Iterator[Record]:
        """One record a sample."""
        good = [(index, one) for index, one in zip(block, loaded, strict=True) if isinstance(one, Example)]
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
        batch, confidence = self._batch(tuple(one for _, one in good))
        rows: list[Record] = [
            {
                "index": index,
                "name": one.sample.name,
                "group": one.sample.group,
                "target": one.sample.target,
                "predicted": int(batch.predicted[row]),
                "confidence": _number(confidence[row]),
                "explained": int(batch.targets[row]),
                "only_two": one.sample.only_two,
                "methods": {},
            }
            for row, (index, one) in enumerate(good)
        ]
        for method in self.methods:
            for row, values in zip(rows, self._values(batch, method), strict=True):
                row["methods"][method.name] = values
        yield from rows

    def _batch(self, examples: tuple[Example, ...]) -> tuple[Batch, Tensor]:
        images = torch.stack([one.image for one in examples]).to(self.subject.device)
        with torch.no_grad():
            probabilities = self.subject.forward(images).float().softmax(-1)
        confidence, predicted = probabilities.max(-1)
        targets = predicted
        if self.settings.explained == "true":
            missing = next((one.sample.name for one in examples if one.sample.target is None), None)
            if missing is not None:
                raise RunError(f"{missing} has no class to ask for; take --class predicted")
            targets = torch.tensor([one.sample.target for one in examples], device=images.device)
        fill, seed = self.settings.fill, self.settings.seed
        autocast = getattr(torch, self.settings.autocast) if self.settings.autocast else None
        batch = Batch(examples, images, targets, predicted, self.subject, seed, fill, self.partners, autocast)
        return batch, confidence

    def _values(self, batch: Batch, method: Method) -> list[Record]:
        """What a method gets on every image; image by image if it fails on one of them."""
        try:
            return self._measured(batch, method)
        except Exception as error:  # whatever a method, or the user's own class, may raise
            count = len(batch.examples)
            if count > 1:
                return [values for row in range(count) for values in self._values(batch.of([row]), method)]
            reason = one_line(error) if isinstance(error, RunError) else f"{type(error).__name__}: {one_line(error)}"
            if not self.settings.skip_broken:
                raise RunError(
                    f"method {method.name!r} failed on {batch.names[0]}: {reason}. To leave such images out and count "
                    "them, add --skip-broken"
                ) from error
            return [{"failed": reason}]

    def _measured(self, batch: Batch, method: Method) -> list[Record]:
        begin = self._now()
        maps = method.maps(batch.images, batch.targets, batch.names, batch.seed)
        seconds = (self._now() - begin) / len(maps)
        found: list[Record] = [{"seconds": float(f"{seconds:.4g}")} for _ in batch.examples]
        for measure in self.measures:
            true = self.settings.explained == "true"
            rows = [row for row, one in enumerate(batch.examples) if measure.applies(one, true)]
            if not rows:
                continue
            chosen = maps if len(rows) == len(maps) else maps[rows]
            try:
                computed = measure.compute(batch.of(rows), chosen, method)
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
