"""The paths of changed images against a loop over pixels, and the fills."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn import metrics as sk
from torch import Tensor
from torchvision.transforms.functional import normalize

from captum_lnstat.metrics import Curve, black, blurred, deletion, insertion, mean_colour, perturbation_curve, targets
from captum_lnstat.metrics.perturbation import NINE

HEIGHT, WIDTH, CLASSES = 5, 6, 4
NOTHING = torch.zeros(1, 3, 1, 1)


@pytest.fixture
def scene():
    """Images, maps without ties, classes, and a model that knows nothing of batches."""
    weight = torch.randn(CLASSES, 3, HEIGHT, WIDTH, dtype=torch.float64)
    images = torch.randn(4, 3, HEIGHT, WIDTH)
    maps = torch.stack([torch.randperm(HEIGHT * WIDTH) for _ in range(4)]).view(4, HEIGHT, WIDTH).float() - 9

    def forward(given):
        return torch.stack([(weight * image.double()).sum((1, 2, 3)) for image in given])

    return forward, images, maps, forward(images).argmax(1)


def changed(image, values, fill, count, sign):
    """One image with its ``count`` first pixels replaced, one by one."""
    found = image.clone()
    places = sorted(np.ndindex(*values.shape), key=lambda place: -sign * float(values[place]))
    for row, col in places[:count]:
        found[:, row, col] = fill[:, row, col]
    return found


@pytest.mark.parametrize(("order", "sign"), [("positive", 1), ("negative", -1)])
@pytest.mark.parametrize("kind", ["black", "mean", "blurred"])
def test_perturbation_is_the_loop(scene, order, sign, kind):
    forward, images, maps, target = scene
    fill = {
        "black": black((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)),
        "mean": mean_colour(images),
        "blurred": blurred(images, 3, 2.0),
    }[kind]
    curve = perturbation_curve(forward, images, maps, target, order=order, fill=fill)
    assert curve.steps.tolist() == pytest.approx(list(NINE))
    whole = fill.broadcast_to(images.shape)
    for index in range(4):
        for place, step in enumerate(NINE):
            # 30 pixels: every step is a whole number of them.
            image = changed(images[index], maps[index], whole[index], round(30 * step), sign)
            right = forward(image[None]).argmax() == target[index]
            assert curve.values[index, place] == float(right)
    assert 0 < curve.values.mean() < 1  # neither all nor none: the comparison above says something


@pytest.mark.parametrize(("game", "sign"), [(deletion, 1), (insertion, -1)])
def test_games_are_the_loop(scene, game, sign):
    forward, images, maps, target = scene
    fill = blurred(images, 3, 2.0)
    curve = game(forward, images, maps, target, fill=fill, steps=7)
    for index in range(4):
        begin, end = (images[index], fill[index]) if game is deletion else (fill[index], images[index])
        heights = []
        for step in range(8):
            image = changed(begin, maps[index], end, 30 * step // 7, 1)
            scores = forward(image[None])[0]
            heights.append(math.exp(scores[target[index]]) / sum(math.exp(score) for score in scores))
        assert curve.values[index].tolist() == pytest.approx(heights, abs=1e-6)
        area = sk.auc(np.linspace(0, 1, 8), heights)
        assert [curve.auc[index], curve.area[index]] == pytest.approx([area, area], abs=1e-6)
    plain, whole = forward(images).softmax(1), forward(fill).softmax(1)
    ends = [plain, whole][::sign]
    for place, scores in zip((0, -1), ends, strict=True):
        assert curve.values[:, place].tolist() == pytest.approx(scores.gather(1, target[:, None])[:, 0].tolist())


def test_the_area_is_scikit_learns_and_the_height_is_scaled_to_one():
    curve = Curve(torch.tensor(NINE, dtype=torch.float64), torch.rand(3, 9, dtype=torch.float64))
    areas = [sk.auc(NINE, values) for values in curve.values]
    assert curve.area.tolist() == pytest.approx(areas)
    assert curve.auc.tolist() == pytest.approx([area / 0.8 for area in areas])
    full = Curve(torch.tensor(NINE), torch.ones(1, 9))
    assert full.auc.item() == pytest.approx(1)
    assert full.area.item() == pytest.approx(0.8)
    assert Curve(torch.tensor([0.5]), torch.tensor([[0.25]])).auc.item() == 0.25


@pytest.mark.parametrize("order", ["positive", "negative"])
def test_batch_type_and_ties_do_not_matter(scene, order):
    forward, images, maps, target = scene
    maps = (maps / 7).round()  # about seven pixels to a value
    maps[0] = 0.25
    seen = []

    def watch(given):
        seen.extend(given.split(len(given) // len(NINE)))  # all steps in one pass
        return forward(given)

    def run(places, dtype=torch.float32):
        seen.clear()
        values = perturbation_curve(
            watch, images[places], maps[places].to(dtype), target[places], order=order, fill=NOTHING
        ).values
        return values, torch.stack(seen, 1)

    values, pictures = run([0, 1, 2, 3])
    for places in ([0], [3, 1], [2, 0, 1]):
        some, looked = run(places)
        assert torch.equal(some, values[places])
        assert torch.equal(looked, pictures[places])
    assert torch.equal(run([0, 1, 2, 3], torch.bfloat16)[1], pictures)
    gone = (pictures == 0).all(2)
    # Every step removes its share, keeps what was removed, and takes no value before a larger (smaller) one.
    assert gone.sum((2, 3)).tolist() == [[3, 6, 9, 12, 15, 18, 21, 24, 27]] * 4
    assert (gone[:, :-1] <= gone[:, 1:]).all()
    sign = 1 if order == "positive" else -1
    for index in range(4):
        for step in range(9):
            taken, left = gone[index, step], ~gone[index, step]
            assert (sign * maps[index][taken]).min() >= (sign * maps[index][left]).max()
    # A flat map takes pixels all over the image, not a corner of it.
    third = gone[0, 2]
    assert third.any(0).sum() >= 4
    assert third.any(1).sum() >= 4


def test_steps_round_down_but_not_by_a_rounding_error():
    images, maps = torch.ones(1, 1, 10, 10), torch.rand(1, 10, 10)
    counts = []

    def forward(given):
        counts.extend(int((image == 0).sum()) for image in given)
        return given.sum((2, 3))

    steps = (0.0, 0.07, 0.285, 0.29, 0.57, 0.58, 1.0)
    perturbation_curve(forward, images, maps, 0, fill=NOTHING[:, :1], steps=steps)
    assert counts == [0, 7, 28, 29, 57, 58, 100]


def test_the_images_and_the_maps_stay_and_no_graph_is_made(scene):
    _, images, maps, target = scene
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(90, CLASSES)).eval()
    before = images.clone(), maps.clone()
    curve = perturbation_curve(model, images, maps.requires_grad_(), target, fill=NOTHING)
    assert not curve.values.requires_grad
    assert torch.equal(images, before[0])
    assert torch.equal(maps, before[1])
    with pytest.warns(UserWarning, match="Sequential is in train mode"):
        perturbation_curve(model.train(), images, maps, target, fill=NOTHING)


def test_what_cannot_be_right_is_refused(scene):
    forward, images, maps, target = scene

    def refused(error, match, **changes):
        given = {"forward": forward, "images": images, "maps": maps, "target": target, "fill": NOTHING} | changes
        with pytest.raises(error, match=match):
            perturbation_curve(**given)

    refused(ValueError, r"expected \(batch, channel", maps=maps[:3])
    refused(ValueError, r"expected \(batch, channel", images=images[0])
    refused(ValueError, "NaN", maps=maps * float("nan"))
    refused(TypeError, "images is of torch.uint8", images=images.byte())
    refused(ValueError, "fill has shape", fill=torch.zeros(2, 3, 1, 1))
    refused(ValueError, "fill has values", fill=NOTHING * float("nan"))
    refused(ValueError, "order is 'pos'", order="pos")
    refused(ValueError, "rising", steps=(0.5, 0.5))
    refused(ValueError, "between 0 and 1", steps=(10, 20))
    refused(ValueError, "between 0 and 1", steps=())
    refused(ValueError, "target has shape", target=[0, 1])
    refused(ValueError, "target has the class -1", target=-1)
    refused(TypeError, "target is of torch.float32", target=0.5)
    refused(IndexError, "forward gives 4 classes", target=4)
    refused(TypeError, "forward returned a tuple", forward=lambda given: (forward(given),))
    refused(ValueError, "forward returned shape", forward=lambda given: forward(given)[:, 0])
    refused(ValueError, "scores that are NaN", forward=lambda given: forward(given) * float("nan"))
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match="steps is"):
            deletion(forward, images, maps, target, fill=NOTHING, steps=steps)


def test_black_is_a_black_image_normalised():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    picture = normalize(torch.zeros(1, 3, 2, 2), mean, std)
    assert torch.allclose(black(mean, std).expand(1, 3, 2, 2), picture, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one a channel"):
        black(mean, std[:2])
    with pytest.raises(ValueError, match="above 0"):
        black((0.5,), (0.0,))


def test_blur_is_scipys_alone_and_in_a_batch():
    images = torch.randn(3, 2, 12, 15)
    weights = np.exp(-((np.arange(11) - 5) ** 2) / 50)
    expected = images.double().numpy()
    for axis in (2, 3):
        expected = ndimage.correlate1d(expected, weights / weights.sum(), axis, mode="mirror")
    found = blurred(images)
    assert np.abs(found.numpy() - expected).max() < 1e-6
    assert torch.equal(blurred(images[1:2]), found[1:2])
    assert torch.equal(blurred(images.half()), blurred(images.half().float()).half())
    with pytest.raises(ValueError, match="a kernel of 11 needs more than 5"):
        blurred(images[:, :, :5])
    with pytest.raises(ValueError, match="expected floating"):
        mean_colour(images[0])


def test_mean_colour_is_each_images_own():
    images = torch.randn(3, 2, 4, 5)
    found = mean_colour(images)
    assert found.shape == (3, 2, 1, 1)
    assert found[2, 1].item() == pytest.approx(float(np.mean(images[2, 1].double().numpy())))


@pytest.mark.parametrize("room", [0, 100, 3 * 3 * 16 * 2, 1 << 20])
def test_steps_asked_for_together_are_the_steps_one_by_one(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, maps = torch.rand(3, 3, 4, 4), torch.rand(3, 4, 4)
    weights, passes = torch.rand(48, 5, dtype=torch.float64), []

    def forward(given: Tensor) -> Tensor:
        passes.append(len(given))
        return given.flatten(1).double() @ weights

    def curves() -> list[Tensor]:
        fill, classes = torch.zeros(1, 3, 1, 1), torch.tensor([0, 3, 4])
        positive = perturbation_curve(forward, images, maps, classes, fill=fill).values
        return [positive, deletion(forward, images, maps, classes, fill=fill, steps=7).values]

    monkeypatch.setattr(targets, "AT_ONCE", 0)
    one_by_one = curves()
    assert passes == [3] * (9 + 8)
    passes.clear()
    monkeypatch.setattr(targets, "AT_ONCE", room)
    for found, wanted in zip(curves(), one_by_one, strict=True):
        assert torch.equal(found, wanted)
    assert sum(passes) == 3 * (9 + 8)
    assert len(passes) == {0: 17, 100: 17, 288: 5 + 4, 1 << 20: 2}[room]
