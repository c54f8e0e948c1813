"""The README's figure: photographs, one or two objects on each, as a DeiT-Tiny trained on ImageNet sees them.

``python tests/benchmarks/real_pictures.py`` writes ``docs/pictures/readme.png``, from ``free_photographs`` and the
weights that ``real_data.py`` describes (``--real``). ``--sheet PATH`` draws, besides, 24 photographs of ImageNet's
validation set for both models, to be looked at: their terms do not let them be passed on. The figure takes
three quarters of a minute on one core, the sheet half a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from real_data import FOLDER, MODELS, check_folder, photographs, real_model
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.explanation.subject.subject import Subject
from captum_lnstat.visualize import GREY, overlay, to_map, to_picture
from captum_lnstat.visualize.canvas import Row, draw_rows
from captum_lnstat.visualize.writing import write_figure, write_image

PAGE = Path(__file__).parents[2] / "docs" / "pictures" / "readme.png"
PHOTOGRAPHS = Path(__file__).parent / "free_photographs"
ASKED = {"chelsea": "Egyptian cat", "coffee": "espresso"}
SHOWN = ("lnstat", "chefer", "attention-rollout", "gradcam", "ig")
ON_SHEET = ("lnstat", "chefer", "attention-rollout", "gradcam")
SIZE = (224, 336)
COUNT, THUMBNAIL, WIDTH = 24, 72, 1200


def maps(model: nn.Module, inputs: Tensor, image: np.ndarray, target: int, methods: Sequence[str]) -> list[np.ndarray]:
    """The map of every method over the image."""
    found = []
    for key in methods:
        attribution = METHODS[key].make(model, None)(inputs, target)
        found.append(overlay(image, to_map(attribution[0]), signed=METHODS[key].signed, look=GREY))
    return found


def whole(path: Path, frame: Frame) -> Tensor:
    """A whole photograph as a model's input of its own proportions, near enough."""
    image = Image.open(path).convert("RGB").resize(SIZE[::-1], Image.Resampling.BICUBIC)
    return normalize(pil_to_tensor(image) / 255, list(frame.mean), list(frame.std))[None]


def row(subject: Subject, frame: Frame, inputs: Tensor, target: int) -> Row:
    """An image and every method's map of it for one class."""
    image = to_picture(inputs[0], frame.mean, frame.std)
    with torch.no_grad():
        probability = float(subject.model(inputs).softmax(1)[0, target])
    name = subject.class_names[target].partition(",")[0]
    cells = (image, *maps(subject.model, inputs, image, target, SHOWN))
    return Row(name, cells, note=f"probability {probability:.2f}")


def draw_readme(folder: Path) -> None:
    """One photograph a row, then one above the other, with each of the two classes asked for."""
    subject = real_model(folder, "DeiT-Tiny")
    frame = Frame(subject.transform)
    targets = [subject.find(name) for name in ASKED.values()]
    each = [whole(PHOTOGRAPHS / f"{name}.jpg", frame) for name in ASKED]
    both = torch.cat(each, 2)
    questions = [*zip(each, targets, strict=True), *((both, target) for target in targets)]
    rows = []
    for inputs, target in questions:
        subject.model.set_input_size(img_size=inputs.shape[2:])  # the position embedding is resampled
        rows.append(row(subject, frame, inputs, target))
    titles = ("photograph", *(METHODS[key].title for key in SHOWN))
    figure = draw_rows(rows, "DeiT-Tiny: where is the class that is asked for?", titles=titles, note="own scale each")
    write_figure(PAGE, figure)
    small = Image.open(PAGE).convert("RGB")
    small = small.resize((WIDTH, WIDTH * small.height // small.width), Image.Resampling.LANCZOS)
    small.save(PAGE, optimize=True)
    print(f"{PAGE.name}: {PAGE.stat().st_size // 1000} kB")


def draw_sheet(folder: Path, path: Path) -> None:
    """Photographs of odd number in two columns: the image, then every method's map by each model."""
    parts: list[list[np.ndarray]] = [[] for _ in range(COUNT)]
    for title in MODELS:
        subject = real_model(folder, title)
        frame = Frame(subject.preprocessing.whole().transform)
        shown = photographs(folder, subject, COUNT, odd=True)
        for cells, inputs, target in zip(parts, shown.images, shown.targets.tolist(), strict=True):
            image = to_picture(inputs, frame.mean, frame.std)
            cells += [image] * (not cells) + maps(subject.model, inputs[None], image, target, ON_SHEET)
    lines = [np.concatenate([_thumbnail(cell) for cell in cells], 1) for cells in parts]
    half = (COUNT + 1) // 2
    columns = [np.concatenate(lines[:half]), np.concatenate(lines[half:])]
    picture = Image.fromarray(np.concatenate(columns, 1))
    sheet = Image.new("RGB", (picture.width, picture.height + 16), "white")
    sheet.paste(picture, (0, 16))
    draw = ImageDraw.Draw(sheet)
    names = ["image", *(f"{title[0]}: {key[:9]}" for title in MODELS for key in ON_SHEET)]
    for place, name in enumerate(names * 2):
        draw.text((place * THUMBNAIL + 2, 2), name, fill="black", font_size=10)
    write_image(path, sheet)
    print(f"{path}: {', '.join(MODELS)}; {', '.join(ON_SHEET)}; photographs {', '.join(map(str, shown.numbers))}")


def _thumbnail(cell: np.ndarray) -> np.ndarray:
    image = Image.fromarray((cell * 255).round().astype(np.uint8))
    image = image.resize((THUMBNAIL - 2, THUMBNAIL - 2), Image.Resampling.LANCZOS)
    return np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)), constant_values=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=FOLDER, help="weights and photographs; default: %(default)s")
    parser.add_argument("--sheet", type=Path, metavar="PATH", help="draw the sheet of ImageNet's photographs as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_folder(options.real)
    draw_readme(options.real)
    if options.sheet is not None:
        draw_sheet(options.real, options.sheet)


if __name__ == "__main__":
    main()
