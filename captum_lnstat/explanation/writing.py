"""Maps as numbers: in NumPy's and safetensors' files and in PNGs of 16 bits, with what they were made with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save as save_tensors

from captum_lnstat.visualize.writing import TEXT, write_image, write_whole

# An ``Explanation``, which is made further up.
Explained = Any
SUFFIXES = (".npy", ".npz", ".safetensors")
_WHITE = 65535


def about(explained: Explained, **more: Any) -> str:
    """What a map is and what it was made with, as JSON."""
    made = {} if explained.provenance is None else explained.provenance.to_dict()
    return json.dumps(
        {
            **made,
            "image": explained.name,
            "target": explained.target,
            "target_name": explained.class_names[explained.target] if explained.class_names else None,
            "confidence": explained.confidence,
            "prediction": explained.prediction,
            "rule": explained.rule,
            "box": None if explained.box is None else [round(edge, 2) for edge in explained.box],
            "grid": list(explained.grid.shape),
            "covers": explained.covers,
            "cautions": list(explained.cautions),
            **more,
        },
        indent=2,
    )


def write_map(path: Path, explained: Explained) -> Path:
    """Write the map itself, and beside it ``NAME.json``, what it is and what it was made with.

    ``.npy`` is the map on the pixels that the model saw, ``(height, width)``; ``.npz`` and ``.safetensors`` hold it as
    ``relevance``, and the patch grid as ``grid``. ``.png`` is the map on the whole image that was given, 16 bits, with
    the values of black and white said in its text; what the model did not see is 0.
    """
    numbers = {name: _narrow(values) for name, values in (("relevance", explained.relevance), ("grid", explained.grid))}
    if path.suffix == ".png":
        return _write_png(path, explained)
    text = about(explained, holds={name: list(values.shape) for name, values in numbers.items()})
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, numbers["relevance"])
        text = about(explained, holds={"relevance": list(numbers["relevance"].shape)})
    elif path.suffix == ".npz":
        np.savez(buffer, relevance=numbers["relevance"], grid=numbers["grid"])
    else:
        buffer.write(save_tensors({name: np.ascontiguousarray(each) for name, each in numbers.items()}, {TEXT: text}))
    write_whole(path, lambda file: file.write(buffer.getvalue()))
    _beside(path, text)
    return path


def _write_png(path: Path, explained: Explained) -> Path:
    values = explained.values_on_original if explained.box is not None else explained.relevance
    high = float(np.nanmax(np.abs(values))) or 1.0
    low = -high if explained.signed else 0.0
    levels = np.nan_to_num((values - low) / (high - low) * _WHITE, nan=-low / (high - low) * _WHITE)
    where = "the image that was given" if explained.box is not None else "what the model saw"
    text = about(explained, on=where, black=low, white=high)
    write_image(path, Image.fromarray(levels.round().clip(0, _WHITE).astype(np.uint16)), text)
    _beside(path, text)
    return path


def _beside(path: Path, text: str) -> None:
    write: Callable[[Any], object] = lambda file: file.write(f"{text}\n".encode())  # noqa: E731
    write_whole(path.with_name(f"{path.name}.json"), write)


def _narrow(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float32 if nothing is lost."""
    narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values) else values
