"""The parameter-randomisation check of Adebayo et al. 2018: does a map change when the model is made to forget?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal

import torch
from torch import nn

Manner = Literal["reset", "shuffle"]


def cascade(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that own parameters, from the top of the model to its bottom: the order of randomisation.

    The reverse of the order in which the modules were defined; in timm's, torchvision's and Hugging Face's
    classifiers, that is the head first, then the blocks from the last to the first, then the embedding. The model's
    own parameters (class token, position embedding), which have the name ``""``, come last.

    Example:
        >>> from captum_lnstat import zoo
        >>> names = cascade(zoo.load("vit-mini").model)
        >>> names[:3], names[-1]
        (('head', 'norm', 'blocks.3.mlp.fc2'), '')
    """
    owners = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    return tuple(reversed(owners))


def _chosen(model: nn.Module, layers: float | Sequence[str]) -> list[str]:
    """Names of the parameter-owning modules to randomise, top first."""
    order = cascade(model)
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, int | float):
        if isinstance(layers, bool) or not 0 < layers <= 1:
            raise ValueError(f"layers is {layers!r}; expected a share above 0 and at most 1, or names of modules")
        return list(order[: math.ceil(layers * len(order) - 1e-9)])
    known = dict(model.named_modules())
    for name in layers:
        if name not in known:
            raise ValueError(
                f"layers has {name!r}, which is no module of the model; expected some of {list(known)[1:9]} ..."
            )
    under = tuple(name + "." for name in layers if name)
    found = [name for name in order if name in layers or name.startswith(under)] if "" not in layers else list(order)
    if not found:
        raise ValueError(f"the modules {list(layers)} have no parameters; nothing would be randomised")
    return found


def randomised(
    model: nn.Module, layers: float | Sequence[str], *, manner: Manner = "reset", seed: int = 0
) -> nn.Module:
    """A copy of the model with the parameters of some of its layers replaced at random; the model itself stays.

    Args:
        model: Any module that can be deep-copied.
        layers: A share of the layers (``cascade(model)``), counted from the top, rounded up: .5 is the upper half.
            Shares are nested: with the same seed, what .25 replaces is replaced by the same values for .5. Or names
            of modules, each with everything below it: ``["head", "blocks.11"]``.
        manner: ``"reset"``: ``reset_parameters`` of every layer that has it, as before training; others are shuffled.
            ``"shuffle"``: the entries of every parameter are permuted, which keeps their distribution.
        seed: The same seed gives the same copy; the global random state is left as it was.

    Returns:
        The copy, in the model's mode, dtype and on its devices. Parameters that are all alike, such as a LayerNorm's
        before training, can come out as they were.

    Raises:
        ValueError: Unknown names, a share out of range, or a layer that shares a parameter with one that is not chosen.

    Example:
        >>> from captum_lnstat import zoo
        >>> model = zoo.load("vit-mini").model
        >>> other = randomised(model, ["head"])
        >>> bool((other.head.weight == model.head.weight).any())
        False
        >>> bool((other.blocks[0].attn.qkv.weight == model.blocks[0].attn.qkv.weight).all())
        True
    """
    if manner not in ("reset", "shuffle"):
        raise ValueError(f"manner is {manner!r}; expected 'reset' or 'shuffle'")
    names = _chosen(model, layers)
    _check_untied(model, set(names))
    copy = deepcopy(model)
    modules = dict(copy.named_modules())
    devices = sorted({parameter.device.index for parameter in copy.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for name in names:
            _randomise(modules[name], manner)
    return copy


def _randomise(module: nn.Module, manner: Manner) -> None:
    reset = getattr(module, "reset_parameters", None)
    if manner == "reset" and callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        values = parameter.flatten()
        parameter.copy_(values[torch.randperm(len(values), device="cpu").to(values.device)].view_as(parameter))


def _check_untied(model: nn.Module, names: set[str]) -> None:
    owners: dict[int, set[bool]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name in names)
    if any(len(chosen) == 2 for chosen in owners.values()):
        raise ValueError(
            "a parameter is shared by a layer to randomise and another that is to stay; randomise both or neither"
        )
