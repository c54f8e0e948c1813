"""What a run does, and the error when it cannot go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExplainedClass = Literal["true", "predicted"]
Autocast = Literal["", "bfloat16", "float16"]


class RunError(RuntimeError):
    """The run cannot go on; the message says where it stopped and why."""


@dataclass(frozen=True)
class Settings:
    """What is evaluated, and how.

    Attributes:
        data: ``KIND`` or ``KIND:PATH``.
        model: The model's name.
        methods: Names separated by commas.
        metrics: The same.
        explained: Which class is explained: the image's own, or the predicted one.
        fill: What replaces pixels, for all metrics that do; empty for what is usual for each.
        autocast: The dtype in which the model is asked of images with replaced pixels; empty for its own.
        seed: Of everything random.
        limit: So many samples, drawn by the seed; all if None.
        batch_size: Images at a time.
        skip_broken: Count what cannot be read or explained instead of stopping.
        workers: Threads that read images.
        results: ``"csv"`` or ``"parquet"``, the form of the numbers of each image.
    """

    data: str
    model: str
    methods: str
    metrics: str
    explained: ExplainedClass
    fill: str = ""
    autocast: Autocast = ""
    seed: int = 0
    limit: int | None = None
    batch_size: int = 16
    skip_broken: bool = False
    workers: int = 2
    results: str = "csv"
