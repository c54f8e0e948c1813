"""Samples ahead of time: read and made the model's input by threads while the model works on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from captum_lnstat.evaluation.datasets import BrokenFileError, Dataset
from captum_lnstat.evaluation.frame import Example, Frame
from captum_lnstat.evaluation.seeds import seed_of

AHEAD = 2  # batches being read while one is worked on
PATIENCE = 3600.0  # seconds that the reading of a batch may take, from a disk or a network that has to wake up


@dataclass(frozen=True)
class Broken:
    """A sample whose file is missing or damaged."""

    index: int
    name: str
    reason: str


def load(dataset: Dataset, frame: Frame, index: int) -> Example | Broken:
    """One sample as the model sees it, or what is wrong with its file."""
    try:
        return frame.example(dataset[index])
    except BrokenFileError as error:
        return Broken(index, dataset.name(index), str(error))


def batches(
    dataset: Dataset, frame: Frame, blocks: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[Sequence[int], list[Example | Broken]]]:
    """The samples of every block in turn.

    Raises:
        TimeoutError: The reading of an image does not come to an end.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    waiting: deque[tuple[Sequence[int], list[Future[Example | Broken]]]] = deque()
    try:
        for block in blocks:
            waiting.append((block, [pool.submit(load, dataset, frame, index) for index in block]))
            if len(waiting) > AHEAD:
                yield _ready(*waiting.popleft(), dataset)
        while waiting:
            yield _ready(*waiting.popleft(), dataset)
    finally:
        # Not as a context manager, which would wait for the reading that does not come to an end.
        pool.shutdown(wait=False, cancel_futures=True)


def _ready(
    block: Sequence[int], futures: list[Future[Example | Broken]], dataset: Dataset
) -> tuple[Sequence[int], list[Example | Broken]]:
    late = wait(futures, PATIENCE).not_done
    if late:
        name = next(dataset.name(index) for index, future in zip(block, futures, strict=True) if future in late)
        raise TimeoutError(f"{name} could not be read in {PATIENCE:.0f} s; is the disk that it is on still there?")
    return block, [future.result() for future in futures]


class Partners:
    """For the grid game: other images of a data set, all of different classes, drawn by the name of the image.

    Args:
        dataset: Where they are drawn from, all of it.
        frame: The model's.
        seed: The run's.
    """

    def __init__(self, dataset: Dataset, frame: Frame, seed: int) -> None:
        self.dataset, self.frame, self.seed = dataset, frame, seed
        self._found: dict[tuple[str, int], list[Example] | None] = {}

    def forget(self) -> None:
        """Drop what was kept for the methods of one batch."""
        self._found.clear()

    def __call__(self, one: Example, count: int) -> list[Example] | None:
        """So many partners, or None if twenty draws for each do not give them."""
        key = (one.sample.name, count)
        if key not in self._found:
            self._found[key] = self._draw(one, count)
        return self._found[key]

    def _draw(self, one: Example, count: int) -> list[Example] | None:
        chosen, classes = [], {one.sample.target}
        for draw in range(20 * count):
            index = seed_of(f"{one.sample.name}/partner/{draw}", self.seed) % len(self.dataset)
            other = load(self.dataset, self.frame, index)
            if isinstance(other, Broken) or other.sample.only_two or other.sample.target in {None, *classes}:
                continue
            chosen.append(other)
            classes.add(other.sample.target)
            if len(chosen) == count:
                return chosen
        return None
