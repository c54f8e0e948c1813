"""Samples that are read ahead of time."""

import threading

import pytest

from captum_lnstat.evaluation import loading


class Stuck:
    """A data set with one image on a disk that does not answer."""

    def __init__(self):
        self.answers = threading.Event()

    def name(self, index):
        return f"image {index}"

    def __getitem__(self, index):
        if index == 3:
            self.answers.wait(60)
        return index


class Frame:
    def example(self, sample):
        return sample


def test_an_image_that_cannot_be_read_to_its_end_is_named(monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE", 0.2)
    dataset = Stuck()
    coming = loading.batches(dataset, Frame(), [[0, 1], [2, 3], [4]], workers=2)
    assert next(coming) == ([0, 1], [0, 1])
    with pytest.raises(TimeoutError, match="image 3 could not be read"):
        next(coming)
    dataset.answers.set()
