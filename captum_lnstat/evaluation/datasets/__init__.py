"""Data sets to evaluate on, one small class each over the usual file layout."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from captum_lnstat.errors import near
from captum_lnstat.evaluation.datasets.base import BrokenFileError, Dataset, DatasetError, Sample
from captum_lnstat.evaluation.datasets.only import Only, read_names

__all__ = ["KINDS", "BrokenFileError", "Dataset", "DatasetError", "Only", "Sample", "open_dataset", "read_names"]

# Kind to its class; a module is imported only when its kind is asked for.
KINDS = {
    "scenes": "scenes:Scenes",
    "imagenet": "imagenet:ImageNet",
    "tiny-imagenet": "tiny_imagenet:TinyImageNet",
    "imagenet-segmentation": "segmentation:ImageNetSegmentation",
    "voc": "voc:PascalVoc",
    "coco": "coco:Coco",
    "folder": "pictures:Folder",
    "human": "pictures:HumanMaps",
}


def open_dataset(text: str) -> Dataset:
    """A data set from ``KIND`` or ``KIND:PATH``.

    Raises:
        DatasetError: The kind is unknown, or the path does not hold what it needs; the message says what that is.

    Example:
        >>> data = open_dataset("scenes")
        >>> sample = data[0]
        >>> sample.name, sample.image.size, tuple(sample.mask.shape), len(data)
        ('scene-00000#0', (64, 64), (64, 64), 560)
    """
    kind, _, path = text.partition(":")
    if kind not in KINDS:
        raise DatasetError(f"unknown data {kind!r}; {near(kind, list(KINDS), 'expected one of ' + ', '.join(KINDS))}")
    module, _, name = KINDS[kind].partition(":")
    dataset: Dataset = getattr(import_module(f"{__name__}.{module}"), name)(Path(path) if path else None)
    if not len(dataset):
        raise DatasetError(f"{text!r} holds no samples")
    return dataset
