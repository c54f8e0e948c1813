"""Metrics that ask about another model than the run's: mosaics at full size, and what is left after forgetting."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from captum_lnstat.evaluation import figure
from captum_lnstat.evaluation.datasets import Only, open_dataset
from captum_lnstat.evaluation.enlarging import enlarged
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.evaluation.loading import Partners
from captum_lnstat.evaluation.measures import build
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.methods import build as methods
from captum_lnstat.evaluation.mosaics import mosaic
from captum_lnstat.evaluation.question import Batch
from captum_lnstat.evaluation.run import RunError, Settings, evaluate
from captum_lnstat.evaluation.subject import Subject, read
from captum_lnstat.evaluation.team import Team
from captum_lnstat.metrics import map_correlation, randomised

NAMES = [f"scene-{number:05}" for number in range(12)]


@pytest.fixture(scope="module", params=["vit-mini", "swin-mini"])
def subject(request):
    return read(request.param)


@pytest.fixture(scope="module")
def batch(subject):
    """Two scenes with partners of other classes."""
    dataset = Only(open_dataset("scenes"), NAMES)
    examples = tuple(subject.frame.example(dataset[index]) for index in range(2))
    images, targets = torch.stack([one.image for one in examples]), torch.tensor([o.sample.target for o in examples])
    return Batch(examples, images, targets, targets, subject, 0, "", Partners(dataset, subject.frame, 0))


def test_a_larger_model_has_the_same_weights_and_the_same_windows(subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    twice = enlarged(subject, 128, 128)
    assert twice.forward(torch.zeros(1, 3, 128, 128)).shape == (1, subject.classes)
    assert subject.forward(torch.zeros(1, 3, 64, 64)).shape == (1, subject.classes)
    for name, value in twice.model.state_dict().items():
        if value.is_floating_point() and value.shape == before.get(name, torch.empty(0)).shape:
            assert torch.equal(value, before[name]), name
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in twice.model.parameters())
    windows = {module.window_size for module in twice.model.modules() if hasattr(module, "shift_size")}
    assert windows == ({(4, 4)} if hasattr(twice.model, "layers") else set())


class Fixed(nn.Module):
    """Takes images of one size."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 4)

    def forward(self, images):
        return self.head(images.flatten(1))


def test_a_model_of_one_size_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "png", lambda summary, title: b"")
    model = Fixed()
    one = Subject.of(model, Frame(lambda image: pil_to_tensor(image.resize((8, 8))) / 255))
    with pytest.raises(ValueError, match="Fixed takes images of 8 x 8 px and cannot be made to take 16 x 16: Runtime"):
        enlarged(one, 16, 16)
    for label in range(4):
        folder = tmp_path / "data" / "images" / f"c{label}"
        for path in (folder, tmp_path / "data" / "masks" / f"c{label}"):
            path.mkdir(parents=True)
            Image.new("L", (9, 9), 255).save(path / "a.png")
    data = f"folder:{tmp_path / 'data'}"
    settings = Settings(data, "fixed", "inputxgradient", "grid(size=full)", "true")
    with pytest.raises(RunError, match="metric 'grid\\(size=full\\)': ValueError: Fixed takes images of 8 x 8 px"):
        evaluate(settings, open_dataset(data), one, tmp_path / "run", Team(0, 1, torch.device("cpu")))


def by_hand(batch, method, full):
    """Share and peak of every cell of every mosaic."""
    found = torch.zeros(2, 2, 4)
    side = 128 if full else 64
    for row, one in enumerate(batch.examples):
        made = mosaic(batch, one, 2, 2, full=full)
        assert len(set(made.classes)) == 4
        assert made.classes[made.own] == one.sample.target
        assert made.image.shape == (3, side, side)
        for cell in range(4):
            (relevance,) = method.maps(made.image[None], torch.tensor([made.classes[cell]]), ["x"])
            top, left = cell // 2 * side // 2, cell % 2 * side // 2
            inside = relevance[top : top + side // 2, left : left + side // 2]
            found[0, row, cell] = inside.clamp(min=0).sum() / relevance.clamp(min=0).sum()
            found[1, row, cell] = inside.max() == relevance.max()
    return found


@pytest.mark.parametrize("full", [False, True])
def test_the_grid_game_is_that_played_by_hand(subject, batch, full):
    (method,) = methods("lnstat", subject)
    expected = by_hand(batch, method.on(enlarged(subject, 128, 128)) if full else method, full)
    cells = torch.tensor([mosaic(batch, one, 2, 2, full=full).own for one in batch.examples])
    size = ",size=full" if full else ""
    for text, wanted in (
        (f"grid(rows=2{size})", expected.gather(2, cells.expand(2, 2)[:, :, None])[:, :, 0]),
        (f"grid(ask=all{size})", expected.mean(2)),
    ):
        (measure,) = build(text)
        assert [quantity.name for quantity in measure.quantities] == [text, f"{text} pointing"]
        values = measure.compute(batch, torch.zeros(2, 64, 64), method)
        torch.testing.assert_close(values[text], wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values[f"{text}.pointing"], wanted[1])


def test_an_image_keeps_its_size_in_a_mosaic_of_full_size(batch):
    made = mosaic(batch, batch.examples[0], 2, 2, full=True)
    top, left = made.own // 2 * 64, made.own % 2 * 64
    assert torch.equal(made.image[:, top : top + 64, left : left + 64], batch.images[0])


def test_a_map_of_the_middle_is_at_chance_when_every_cell_is_asked_for(subject, batch):
    (method,), (measure,) = methods("centre", subject), build("grid(ask=all)")
    for values in measure.compute(batch, torch.zeros(2, 64, 64), method).values():
        torch.testing.assert_close(values, torch.full((2,), 0.25))


def test_options_of_the_grid_are_checked():
    with pytest.raises(ValueError, match="size of metric 'grid' is 'ful'; expected shrunk or full"):
        build("grid(size=ful)")
    with pytest.raises(ValueError, match="ask of metric 'grid' is 'one'; expected own or all"):
        build("grid(ask=one)")


def test_randomisation_is_the_correlation_with_the_forgetful_models_map(subject, batch):
    (method,) = methods("lnstat", subject)
    maps = method.maps(batch.images, batch.targets, batch.names)
    for layers in (0.25, 0.5):
        model = randomised(subject.model, layers, seed=3)
        other = method.on(replace(subject, model=model, forward=model))
        expected = map_correlation(maps, other.maps(batch.images, batch.targets, batch.names))
        (measure,) = build(f"randomisation(layers={layers})")
        (values,) = measure.compute(replace(batch, seed=3), maps, method).values()
        torch.testing.assert_close(values, expected)
    assert measure.quantities[0].higher is False


def test_a_map_that_does_not_know_the_model_has_a_correlation_of_one(subject, batch):
    (measure,) = build("randomisation")
    for method in methods("random,centre", subject):
        maps = method.maps(batch.images, batch.targets, batch.names)
        (values,) = measure.compute(batch, maps, method).values()
        torch.testing.assert_close(values, torch.ones(2))


def test_corners_of_a_run(subject, batch):
    (measure,) = build("corners(part=0.125)")
    maps = torch.zeros(2, 64, 64)
    maps[0, :8, 56:], maps[0, 8, 0] = 1, 2
    maps[1] = 1
    values = measure.compute(batch, maps, Method("none", lambda images, targets: images))
    torch.testing.assert_close(values["corners(part=0.125).energy"], torch.tensor([64 / 66, 4 / 64]))
    torch.testing.assert_close(values["corners(part=0.125).peak"], torch.tensor([0, 4 / 64]))
    with pytest.raises(ValueError, match="part is 0; expected a number above 0"):
        build("corners(part=0)")[0].compute(batch, maps, Method("none", lambda images, targets: images))
