"""SaCo against a loop over pairs of groups of pixels, written from the paper's definition."""

import math

import numpy as np
import pytest
import torch

from captum_lnstat.metrics import mean_colour, saco

HEIGHT, WIDTH, CLASSES = 5, 6, 4


def forward(images):
    """Every image by itself; no two pixels count alike."""
    weight = torch.randn(CLASSES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.stack([(weight * image.double()).sum((1, 2, 3)) / 3 for image in images])


def scene(count=4):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, HEIGHT, WIDTH, generator=rng)
    maps = torch.stack([torch.randperm(HEIGHT * WIDTH, generator=rng) for _ in range(count)]).view(-1, HEIGHT, WIDTH)
    return images, maps.double().pow(2) / 100 - 3, forward(images).argmax(1)


def probability(image, target):
    scores = forward(image[None])[0]
    return math.exp(scores[target]) / sum(math.exp(score) for score in scores)


@pytest.mark.parametrize("groups", [2, 5, 10])
def test_saco_is_the_loop_over_pairs(groups):
    images, maps, target = scene()
    fill = mean_colour(images)
    found = saco(forward, images, maps, target, fill=fill, groups=groups)
    for index, image in enumerate(images):
        order = sorted(np.ndindex(HEIGHT, WIDTH), key=lambda place: -float(maps[index][place]))
        size = HEIGHT * WIDTH // groups
        salience, fall = [], []
        for start in range(0, len(order), size):
            without = image.clone()
            for y, x in order[start : start + size]:
                without[:, y, x] = fill[index].broadcast_to(image.shape)[:, y, x]
            salience.append(sum(float(maps[index][place]) for place in order[start : start + size]))
            fall.append(probability(image, target[index]) - probability(without, target[index]))
        above = below = 0.0
        for i in range(groups - 1):
            for j in range(i + 1, groups):
                weight = salience[i] - salience[j]
                above += weight if fall[i] >= fall[j] else -weight
                below += abs(weight)
        assert float(found[index]) == pytest.approx(above / below, abs=1e-9)
    assert found.dtype == torch.float64
    assert found.unique().numel() > 1


def test_a_map_of_what_happens_is_faithful_and_its_opposite_is_not():
    """Groups of one pixel: relevance that is the fall of the probability itself has 1, its negative -1."""
    images, _, target = scene()
    fill = torch.zeros(1, 3, 1, 1)
    falls = torch.zeros(len(images), HEIGHT, WIDTH, dtype=torch.float64)
    for index, image in enumerate(images):
        for y, x in np.ndindex(HEIGHT, WIDTH):
            without = image.clone()
            without[:, y, x] = 0
            falls[index, y, x] = probability(image, target[index]) - probability(without, target[index])
    assert saco(forward, images, falls, target, fill=fill, groups=30).tolist() == pytest.approx([1.0] * 4)
    assert saco(forward, images, -falls, target, fill=fill, groups=30).tolist() == pytest.approx([-1.0] * 4)


@pytest.mark.parametrize("groups", [3, 4, 7])
def test_a_flat_map_says_nothing(groups):
    images, maps, target = scene()
    flat = torch.full_like(maps, 0.1)
    assert saco(forward, images, flat, target, fill=torch.zeros(1, 3, 1, 1), groups=groups).tolist() == [0.0] * 4


def test_alone_and_in_a_batch():
    images, maps, target = scene()
    options = {"fill": torch.zeros(1, 3, 1, 1)}
    whole = saco(forward, images, maps, target, **options)
    alone = [saco(forward, images[i : i + 1], maps[i : i + 1], int(target[i]), **options) for i in range(4)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("groups", [1, 31, 2.0, True])
def test_groups_are_checked(groups):
    images, maps, target = scene()
    with pytest.raises(ValueError, match=f"groups is {groups}; expected a whole number from 2 to the 30 pixels"):
        saco(forward, images, maps, target, fill=torch.zeros(1, 3, 1, 1), groups=groups)
