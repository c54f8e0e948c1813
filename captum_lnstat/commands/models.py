"""The model of a command's options, and the scenes of the package."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from captum_lnstat import zoo
from captum_lnstat.commands.known import CLASSES, STREAM, ZOO
from captum_lnstat.explanation.subject.device import find_device
from captum_lnstat.explanation.subject.images import Item, read_item
from captum_lnstat.explanation.subject.subject import Subject, read_subject

_GPU_BATCH = 8


@dataclass(frozen=True)
class ModelOptions:
    """What ``model_options`` asks for."""

    name: str
    pretrained: bool
    checkpoint: Path | None
    class_names: Path | None
    whole: bool
    device: str
    batch_size: int | None = None

    def read(self) -> Subject:
        """The model, where it is to compute."""
        device = find_device(self.device)
        subject = read_subject(self.name, self.pretrained, self.checkpoint)
        subject.model.to(device)
        if self.class_names is not None:
            subject = subject.named(self.class_names)
        return replace(subject, preprocessing=subject.preprocessing.whole()) if self.whole else subject

    @property
    def batch(self) -> int:
        """Images at a time: on a CPU more are no faster."""
        return self.batch_size or (1 if find_device(self.device).type == "cpu" else _GPU_BATCH)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What has to be known of a user's own image."""
        if self.name not in ZOO or self.checkpoint is not None:
            return ()
        return (
            f"{self.name} knows {', '.join(CLASSES[:-1])} and {CLASSES[-1]}, and nothing else: whatever an image shows "
            "is called one of these. --model vit_small_patch16_224 --pretrained knows a thousand kinds of things",
        )


def read_source(source: Path | int) -> tuple[str, Item]:
    """What is to be explained, in words and as an image: a file, ``-`` for standard input, or the number of a scene."""
    if isinstance(source, int):
        return bundled_scene(source)
    if source == STREAM:
        item = read_item("standard input", io.BytesIO(sys.stdin.buffer.read()))
        return "standard input", replace(item, name="stdin")
    return str(source), read_item(source)


def bundled_scene(number: int) -> tuple[str, Item]:
    """A scene of the package, and what it shows in words."""
    scene = zoo.scenes()[number]
    return f"bundled scene {number}: {scene.title}", Item(f"scene-{number}", scene.image)
