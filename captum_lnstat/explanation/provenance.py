"""What a map was made with, to be written beside it: model, weights, rule, options, versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from captum_lnstat._version import __version__
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.explanation.subject.subject import Subject


def digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all parameters and buffers.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> digest(a) == digest(a), digest(a) == digest(b)
        (True, False)
    """
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Provenance:
    """Of the explanations that one model and method make.

    Args:
        subject: The model. It is not kept alive.
        method: The method.
    """

    def __init__(self, subject: Subject, method: LNStatAttribution) -> None:
        self._model: ref[nn.Module] = ref(subject.model)
        self._state = _state(subject.model)
        self._digest: str | None = None
        options = {"interpolation": method.interpolation, "contrastive": method.contrastive}
        self.about: dict[str, Any] = {
            "model": subject.name,
            "class": type(subject.model).__name__,
            "weights": subject.weights or ("random" if subject.random else None),
            "preprocessing": subject.preprocessing.source,
            "rule": method.rule,
            "options": {**asdict(method.settings), **options},
        }

    @property
    def weights_sha256(self) -> str | None:
        """Of the weights that the map was made with; nothing if they have been changed since, or are gone."""
        return self.read_weights()

    def read_weights(self) -> str | None:
        """The same, read now: of a model that will be gone."""
        model = self._model()
        # To read all weights takes longer than to explain: only when a map is written, if they are still the same.
        if self._digest is None and model is not None and _state(model) == self._state:
            self._digest = digest(model)
        return self._digest

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        packages = {name: version(name) for name in ("captum", "timm", "torch")}
        versions = {"captum-lnstat": __version__, **packages, "python": platform.python_version()}
        return {**self.about, "weights_sha256": self.weights_sha256, "versions": versions}


def _state(model: nn.Module) -> list[tuple[int, int]]:
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
