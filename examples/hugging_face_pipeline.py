"""A pipeline of Hugging Face that explains beside predicting: the labels it returns, and a map for each.

``python examples/hugging_face_pipeline.py cat.jpg --model microsoft/swin-tiny-patch4-window7-224`` prints the labels
and writes ``LABEL.png`` for each. ``pip install "captum-lnstat[hf]"`` brings transformers.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from PIL import Image

from captum_lnstat import Explanations, explain


def classify(pipe: Any, image: Image.Image, top_k: int = 3) -> tuple[list[dict[str, Any]], Explanations]:
    """What the pipeline says of an image, and the map of every label, in the same order.

    Args:
        pipe: ``transformers.pipeline("image-classification", ...)``.
        image: The image.
        top_k: How many labels.
    """
    labels = pipe(image, top_k=top_k)
    maps = explain(
        pipe.model,
        image,
        top_k=len(labels),
        # The pipeline's own preprocessing, so that what is explained is what was predicted.
        transform=lambda picture: pipe.image_processor(picture, return_tensors="pt").pixel_values[0],
    )
    return labels, maps


def main() -> None:
    from transformers import pipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224", help="on the hub, or a folder")
    options = parser.parse_args()
    pipe = pipeline("image-classification", model=options.model)
    labels, maps = classify(pipe, Image.open(options.image).convert("RGB"))
    for label, found in zip(labels, maps, strict=True):
        name = re.sub(r"\W+", "-", label["label"].split(", ")[0])
        print(f"{label['score']:.1%} {label['label']}: {found.save(f'{name}.png')}")


if __name__ == "__main__":
    main()
