"""Some of the samples of a data set, by their names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from captum_lnstat.evaluation.datasets.base import Dataset, DatasetError, Sample


class Only(Dataset):
    """The samples of a data set that have certain names, in the data set's order.

    Args:
        dataset: The whole.
        names: Which of its samples; a name with a ``#`` is one question about an image, one without is all of them.

    Raises:
        DatasetError: A name is not in the data set, or there are no names.

    Example:
        >>> from captum_lnstat.evaluation.datasets import open_dataset
        >>> few = Only(open_dataset("scenes"), ["scene-00003#0", "scene-00001"])
        >>> [few.name(index) for index in range(len(few))]
        ['scene-00001#0', 'scene-00003#0']
    """

    def __init__(self, dataset: Dataset, names: Collection[str]) -> None:
        self._whole, wanted = dataset, set(names)
        self.class_names = dataset.class_names
        self._rows, found = [], set()
        for index in range(len(dataset)):
            name = dataset.name(index)
            known = {name, name.partition("#")[0]} & wanted
            if known:
                self._rows.append(index)
                found |= known
        if not wanted:
            raise DatasetError("no sample is named; expected one name a line")
        left = sorted(wanted - found)
        if left:
            raise DatasetError(
                f"{len(left)} of {len(wanted)} names are not in the data, the first is {left[0]!r}; expected names "
                f"like {dataset.name(0)!r}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._whole.name(self._rows[index])

    def __getitem__(self, index: int) -> Sample:
        return self._whole[self._rows[index]]


def read_names(path: Path) -> list[str]:
    """The names in a file, one a line; empty lines and those that begin with ``#`` are left out."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]
