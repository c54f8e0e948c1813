"""Captum's two measures against numpy, with perturbations that a batch cannot change."""

import numpy as np
import pytest
import torch

from captum_lnstat.metrics import infidelity, sensitivity
from captum_lnstat.metrics.captum_measures import patch_draws

OPTIONS = {"patch": 3, "share": 0.25, "draws": 12, "seed": 5}


def forward(given):
    """Not linear, each image by itself."""
    flat = given.double().flatten(1)
    return torch.stack([flat.square().sum(1), (flat * torch.arange(flat.shape[1])).sum(1).sin()], 1)


@pytest.fixture
def images():
    return torch.randn(3, 2, 8, 7)


@pytest.mark.parametrize("normalize", [True, False])
def test_infidelity_is_what_numpy_gives(images, normalize):
    maps, fill, target = torch.randn(3, 8, 7), torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), [0, 1, 0]
    found = infidelity(forward, images, maps, target, fill=fill, normalize=normalize, **OPTIONS)
    removed = patch_draws(8, 7, **OPTIONS).numpy()
    for index in range(3):
        sums = np.array([maps[index].double().numpy()[mask].sum() for mask in removed])
        drops = []
        for mask in removed:
            changed = np.where(mask, fill[0].numpy(), images[index].numpy())
            before, after = forward(images[index : index + 1]), forward(torch.from_numpy(changed)[None])
            drops.append(float((before - after)[0, target[index]]))
        factor = np.linalg.lstsq(sums[:, None], np.array(drops), rcond=None)[0][0] if normalize else 1.0
        assert found[index].item() == pytest.approx(float(np.mean((factor * sums - drops) ** 2)), rel=1e-5)


def test_neither_batch_nor_turns_change_infidelity(images):
    maps, fill = torch.randn(3, 8, 7), images.mean((2, 3), keepdim=True)
    whole = infidelity(forward, images, maps, [0, 1, 0], fill=fill, **OPTIONS)
    for places in ([0], [2, 1]):
        some = infidelity(
            forward, images[places], maps[places], [[0, 1, 0][i] for i in places], fill=fill[places], **OPTIONS
        )
        assert some.tolist() == pytest.approx(whole[places].tolist(), rel=1e-6)
    turns = infidelity(forward, images, maps, [0, 1, 0], fill=fill, max_examples_per_batch=15, **OPTIONS)
    assert turns.tolist() == pytest.approx(whole.tolist(), rel=1e-6)
    assert infidelity(forward, images, maps * 50, [0, 1, 0], fill=fill, **OPTIONS).tolist() == pytest.approx(
        whole.tolist(), rel=1e-6
    )


def test_draws_are_patches():
    draws = patch_draws(7, 8, **OPTIONS)
    assert draws.shape == (12, 7, 8)
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) > 4
    for draw in draws:
        # 3 x 3 patches on a grid of 3 x 3 cells, the last row and column cut off: two of the nine.
        cells = [draw[r : r + 3, c : c + 3] for r in (0, 3, 6) for c in (0, 3, 6)]
        assert sum(bool(cell.all()) for cell in cells) == 2
        assert sum(bool(cell.any()) for cell in cells) == 2
    assert torch.equal(draws, patch_draws(7, 8, **OPTIONS))
    for wrong in ({"share": 0.0}, {"share": 1.0}, {"patch": 9}, {"draws": 0}, {"patch": 8}):
        with pytest.raises(ValueError, match="expected a"):
            patch_draws(7, 8, **(OPTIONS | wrong))


def test_sensitivity_is_the_largest_relative_change(images):
    given = []

    def explain(inputs, target):
        given.append(inputs.clone())
        return (inputs.square() * (target[:, None, None, None] + 1)).sum(1)

    found = sensitivity(explain, images, [0, 1, 0], radius=0.3, draws=4, seed=1)
    noisy = given[1].view(3, 4, 2, 8, 7)
    noise = noisy - images[:, None]
    assert noise.abs().max() <= 0.3
    assert noise.abs().max() > 0.25
    for index in range(3):
        assert torch.allclose(noise[index], noise[0], atol=1e-6)
        base = images[index].square().sum(0).numpy()
        changes = [np.linalg.norm(image.square().sum(0).numpy() - base) for image in noisy[index]]
        assert found[index].item() == pytest.approx(max(changes) / np.linalg.norm(base), rel=1e-4)
    for places in ([1], [2, 0]):
        some = sensitivity(explain, images[places], [[0, 1, 0][i] for i in places], radius=0.3, draws=4, seed=1)
        assert some.tolist() == pytest.approx(found[places].tolist(), rel=1e-6)
    turns = sensitivity(explain, images, [0, 1, 0], radius=0.3, draws=4, seed=1, max_examples_per_batch=3)
    assert turns.tolist() == pytest.approx(found.tolist(), rel=1e-6)


def test_both_leave_the_random_state_and_refuse_what_is_wrong(images):
    state = torch.get_rng_state()
    infidelity(forward, images, images.sum(1), 0, fill=torch.zeros(1, 2, 1, 1), draws=2)
    sensitivity(lambda given, target: given, images, 0, draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="NaN"):
        sensitivity(lambda given, target: given * float("nan"), images, 0)
    with pytest.raises(TypeError, match="explain returned a tuple"):
        sensitivity(lambda given, target: (given,), images, 0)
    with pytest.raises(ValueError, match="radius is 0"):
        sensitivity(lambda given, target: given, images, 0, radius=0)
    with pytest.raises(IndexError, match="forward gives 2 classes"):
        infidelity(forward, images, images.sum(1), 2, fill=torch.zeros(1, 2, 1, 1))


def test_a_method_of_the_package_goes_in():
    from captum_lnstat import LNStatAttribution, zoo

    vit = zoo.load("vit-mini")
    images = torch.stack([vit.transform(scene.image) for scene in zoo.scenes()[:2]])
    method = LNStatAttribution(vit.model)
    found = sensitivity(method.attribute, images, [0, 1], draws=2)
    assert ((found > 0) & (found < 1)).all()
    maps = method.attribute(images, target=[0, 1]).sum(1)
    assert (infidelity(vit.model, images, maps, [0, 1], fill=torch.zeros(1, 3, 1, 1), draws=4) >= 0).all()
