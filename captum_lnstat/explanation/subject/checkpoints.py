"""Weights from a file: only tensors are read, they have to fit, and what of the file was taken is said.

Training programs write a model's state dict under a name of their own, beside the optimiser's, and with a prefix before
every parameter. What is looked for is the one place and the one prefix that give every parameter of the model and no
other: no list of names is needed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from captum_lnstat.errors import SourceError
from captum_lnstat.explanation.subject.files import check_weights

# Wrappers of torch that show in the names of parameters, wherever they are.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Made anew by every model: written by some versions of a library, and not by others.
_DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask", "position_ids")
_DEEPEST = 3


@dataclass(frozen=True)
class Weights:
    """Tensors out of a checkpoint.

    Attributes:
        place: Under which names they were there, joined by dots; empty if the file is nothing else.
        prefix: What stood before each of their names.
        tensors: By their names without it.
        others: Names of tensors at that place without the prefix.
    """

    place: str
    prefix: str
    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        """An exponential moving average, by its name."""
        return "ema" in re.split(r"[._]", f"{self.place}.{self.prefix}".lower())

    def same(self, other: Weights) -> bool:
        """Whether another one has equal tensors."""
        pairs = [(value, other.tensors.get(name)) for name, value in self.tensors.items()]
        return len(pairs) == len(other.tensors) and all(b is not None and torch.equal(a, b) for a, b in pairs)

    def __str__(self) -> str:
        place = [self.place] if self.place else []
        prefix = [f"names without {self.prefix!r}"] if self.prefix else []
        named = textwrap.shorten(", ".join(self.others), 80, placeholder="...")
        others = [f"left out: {named}"] if self.others else []
        return ", ".join([*place, *prefix, *others])


def read_checkpoint(path: Path) -> tuple[Weights, ...]:
    """Every state dict in a .safetensors file, or in one that ``torch.save`` wrote.

    Raises:
        SourceError: There is no such file, or it holds no state dict.
    """
    if not path.is_file():
        raise SourceError(f"there is no checkpoint file {str(path)!r}")
    check_weights(path)
    try:
        if path.suffix == ".safetensors":
            saved: Any = load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        raise SourceError(
            f"{str(path)!r} cannot be read as a checkpoint, {type(error).__name__}: "
            f"{textwrap.shorten(str(error), 200)}; expected safetensors, or tensors that torch.save wrote. Of a file "
            "with other objects that you trust, save the state dict alone"
        ) from None
    found = tuple(_state_dicts(saved))
    if not found:
        raise SourceError(f"{str(path)!r} holds no state dict; expected tensors by name")
    return found


def _state_dicts(saved: Any, place: tuple[str, ...] = ()) -> Iterator[Weights]:
    if not isinstance(saved, Mapping) or len(place) > _DEEPEST:
        return
    named = {name: value for name, value in saved.items() if isinstance(name, str)}
    tensors = {_WRAPPERS.sub("", name): value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield Weights(".".join(place), "", tensors)
    for name, value in named.items():
        yield from _state_dicts(value, (*place, name))


def load_checkpoint(model: Any, name: str, found: tuple[Weights, ...], path: Path) -> str:
    """Load strictly; the head of one of timm's models is first made as large as the checkpoint's.

    Args:
        model: The model.
        name: What it is called in messages.
        found: The state dicts of the checkpoint.
        path: The file.

    Returns:
        What was taken: the file's name, and where in it and under which prefix the weights were.

    Raises:
        SourceError: The weights are those of another model, or of several that all fit.
    """
    own = {_WRAPPERS.sub("", key): key for key in model.state_dict()}
    choices = [choice for weights in found for choice in _choices(weights, own)]
    fitting = [choice for choice in choices if _misfits(choice, own) == 0]
    averaged = [choice for choice in fitting if choice.averaged]
    # As timm does: an average of the weights is what was meant to be used.
    chosen = averaged if len(averaged) == 1 else fitting
    if len(chosen) > 1 and not all(map(chosen[0].same, chosen[1:])):
        listed = "; ".join(str(choice) or "at the top" for choice in chosen)
        raise SourceError(
            f"the checkpoint {str(path)!r} holds {len(chosen)} sets of weights that fit {name}: {listed}. Save the one "
            "that is meant by itself"
        )
    best = chosen[0] if chosen else min(choices, key=lambda choice: _misfits(choice, own))
    state = {own.get(key, key): value for key, value in best.tensors.items() if key in own or not _derived(key)}
    _resize_head(model, state)
    state = {key: value for key, value in model.state_dict().items() if _derived(key)} | state
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # One line for each kind of misfit, each as long as the model has parameters.
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        where = f" ({best})" if best.place or best.prefix else ""
        raise SourceError(
            f"the checkpoint {str(path)!r}{where} does not fit {name}: {textwrap.shorten(lines[0], 200)}"
        ) from None
    beside = [choice for choice in fitting if choice is not best]
    instead = [f"not {', '.join(str(choice) or 'those at the top' for choice in beside)}"] if beside else []
    taken = [*([str(best)] if str(best) else []), *instead]
    return f"{path.name}: {', '.join(taken)}" if taken else path.name


def _choices(weights: Weights, own: Mapping[str, str]) -> Iterator[Weights]:
    """The same tensors without each prefix under which some parameter of the model is there."""
    for key in own:
        prefixes = [name[: -len(key)] for name in weights.tensors if name == key or name.endswith(f".{key}")]
        for prefix in prefixes:
            inside = {name[len(prefix) :]: value for name, value in weights.tensors.items() if name.startswith(prefix)}
            others = tuple(name for name in weights.tensors if not name.startswith(prefix))
            yield Weights(weights.place, prefix, inside, others)
        if prefixes:
            return
    yield weights


def _misfits(choice: Weights, own: Mapping[str, str]) -> int:
    """How many names are missing or unexpected."""
    missing = own.keys() - choice.tensors.keys()
    return sum(not _derived(key) for key in missing | (choice.tensors.keys() - own.keys()))


def _derived(key: str) -> bool:
    return key.rpartition(".")[2] in _DERIVED


def _resize_head(model: Any, state: Mapping[str, Tensor]) -> None:
    if hasattr(model, "get_classifier") and hasattr(model, "reset_classifier"):
        weight = state.get(f"{_classifier(model)}.weight")
        if weight is not None and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))


def _classifier(model: Any) -> str:
    """Dotted name of the classifier, of the first one if there are several, or nothing."""
    head = model.get_classifier()
    head = head[0] if isinstance(head, tuple | list) else head
    return next((name for name, module in model.named_modules() if module is head), "")
