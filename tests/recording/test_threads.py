"""Four threads, one attribution object, one model: bit for bit what one thread alone gets."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.choices import diagonal
from helpers.contract import EVERY_METHOD, MODELS, PAIRS, images, untouched
from torch import Tensor

THREADS, ROUNDS = 4, 2


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def side_by_side(work: Callable[[int], Tensor]) -> list[list[Tensor]]:
    """What every thread got in every round; all start at once."""
    start = threading.Barrier(THREADS)
    found: list[list[Tensor]] = [[] for _ in range(THREADS)]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait(60)
            for _ in range(ROUNDS):
                found[number].append(work(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    assert not errors
    return found


@pytest.mark.parametrize(("name", "family"), diagonal(EVERY_METHOD, ["swin", "vit"]))
def test_the_same_image(name: str, family: str) -> None:
    model = MODELS[family]()
    method, image = EVERY_METHOD[name](model), images()
    expected = method.attribute(image, target=[1, 2])
    with untouched(model, image):
        found = side_by_side(lambda number: method.attribute(image, target=[1, 2]))
    for attributions in found:
        assert len(attributions) == ROUNDS
        assert all(torch.equal(attribution, expected) for attribution in attributions)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_images_of_their_own(name: str, family: str) -> None:
    """Other images, batch sizes and targets in every thread, and one thread whose target is always wrong."""
    model = MODELS[family]()
    method: Any = EVERY_METHOD[name](model)
    pictures = [images(1 + number % 2, seed=number) for number in range(THREADS)]
    expected = [method.attribute(picture, target=number) for number, picture in enumerate(pictures)]
    others = [(i, j) for i in range(THREADS) for j in range(i) if expected[i].shape == expected[j].shape]
    assert all(not torch.equal(expected[i], expected[j]) for i, j in others)

    def work(number: int) -> Tensor:
        if number == THREADS - 1:
            with pytest.raises(IndexError, match="index 99"):
                method.attribute(pictures[number], target=99)
        return method.attribute(pictures[number], target=number)

    with untouched(model, *pictures):
        found = side_by_side(work)
    for number, attributions in enumerate(found):
        assert len(attributions) == ROUNDS
        assert all(torch.equal(attribution, expected[number]) for attribution in attributions)
