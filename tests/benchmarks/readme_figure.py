"""The figure of the README: a Swin and a ViT, two classes asked for on one scene, four methods.

``python tests/benchmarks/readme_figure.py`` writes ``docs/pictures/readme.png``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from captum_lnstat import zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.visualize import overlay, to_map, to_picture
from captum_lnstat.visualize.canvas import Row, draw_rows
from captum_lnstat.visualize.writing import write_figure

PAGE = Path(__file__).parents[2] / "docs" / "pictures" / "readme.png"
SCENE = 337  # of the held-out ones: both models give both classes some probability
SHOWN = ("lnstat", "chefer", "attention-rollout", "ig")


def rows(title: str, name: str, number: int) -> list[Row]:
    reference, scene = zoo.load(name), zoo.scenes()[number]
    inputs = reference.transform(scene.image)[None]
    image = to_picture(inputs[0], (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        probability = reference.model(inputs).softmax(1)[0]
    found = []
    for label in scene.labels:
        cells = [image]
        for key in SHOWN:
            attribution = METHODS[key].make(reference.model, None)(inputs, label)
            cells.append(overlay(image, to_map(attribution[0]), signed=METHODS[key].signed))
        note = f"probability {float(probability[label]):.2f}"
        found.append(Row(f"{title}: {reference.class_names[label]}", tuple(cells), note=note))
    return found


def main() -> None:
    torch.set_num_threads(1)
    pairs = (("Swin", "swin-mini"), ("ViT", "vit-mini"))
    shown = [row for title, name in pairs for row in rows(title, name, SCENE)]
    titles = ("image", *(METHODS[key].title for key in SHOWN))
    figure = draw_rows(shown, "Where is it? Two classes asked for on one scene", titles=titles, note="own scale each")
    write_figure(PAGE, figure)
    small = Image.open(PAGE).convert("RGB")
    small = small.resize((1100, 1100 * small.height // small.width), Image.Resampling.LANCZOS)
    # A palette of 256 colours: half the size, and no eye tells.
    small.quantize(256, dither=Image.Dither.NONE).save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
