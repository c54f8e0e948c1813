"""The registry of families and what each of them has to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.eager import eager, named
from captum_lnstat.recording.recorder import Differentiable, Recorder
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import convolutions, outside
from captum_lnstat.topology.anatomy.once import Known, known_so_far, recall
from captum_lnstat.topology.anatomy.parts import channels_of
from captum_lnstat.topology.anatomy.refusal import calls_parts, no_family, several_models
from captum_lnstat.topology.anatomy.structure import Structure, structure_of
from captum_lnstat.trace.trace import Trace

_FAMILIES: list[type[Topology]] = []


@dataclass(frozen=True)
class _Seen:
    """What was found in a model, which holds as long as the model is made of the same.

    Attributes:
        structure: What it was made of.
        families: The families that there were to choose from.
        name: Dotted name of the transformer in it.
        family: The family of that.
        parts: What was found in its modules. Of the model itself nothing is held here, so that it can be freed.
        followed: In what circumstances the values of all its attentions have been followed, and were their tokens' own.
    """

    structure: Structure
    families: tuple[type[Topology], ...]
    name: str
    family: type[Topology]
    parts: Known
    followed: set[Any] = field(default_factory=set)


# To try every family again takes longer than a small model's forward pass.
_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


class Topology(ABC):
    """How the tokens of one model family map to the image.

    A family subclasses this, decorates the subclass with ``@register_topology``, and is found by ``matches``.

    Attributes:
        family: Name shown by ``describe``.
        expects: One line on the structure that ``matches`` looks for, shown when no family matches.
    """

    family: ClassVar[str]
    expects: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # Any: which attributes it has is what matches() has found out

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether ``model`` has the structure of this family."""

    @property
    @abstractmethod
    def taps(self) -> Iterable[nn.Module]:
        """The modules whose input and output ``trace`` reads."""

    @property
    def places(self) -> Iterable[nn.Module]:
        """The modules that the residual stream leaves by, so that a score that reads it there is seen to.

        They run without a graph; without them, what a score reads besides the end of the stream is not seen.
        """
        return ()

    @property
    def entrance(self) -> str:
        """Name of the tapped module that is given the images."""
        return "patch_embed"

    @property
    def head_begins(self) -> nn.Module | None:
        """The module whose input is the residual stream after the last block; ``None`` gives ``head_follows``."""
        return None

    @property
    def head_follows(self) -> nn.Module | None:
        """The module whose output is the residual stream after the last block, where no module reads all of it."""
        return None

    @property
    def channels_first(self) -> bool:
        """Whether a map there has its channels before its rows and columns."""
        return False

    @property
    def width(self) -> int | None:
        """Channels of the stream there, where a map may have them before its rows or after its columns."""
        return None

    @property
    def axes(self) -> int:
        """How many axes the images have beside batch and channels: 3 if they are videos."""
        return 2

    def channel_axis(self, recording: Recording, images: Tensor) -> int:
        """Which axis of the images that ``forward_func`` was given has their channels."""
        return 1

    def tokens_first(self, stream: Tensor, batch: int) -> bool:
        """Whether a stream of so many images has its tokens before its batch, as of ``batch_first=False``."""
        return False

    def recorder(
        self,
        images: Tensor,
        differentiable: Differentiable = "head",
        *,
        compact: bool = False,
        detailed: bool = False,
        values: bool = False,
    ) -> Recorder:
        """What records a pass of the model on some images, for ``trace`` to read.

        Args:
            images: What ``forward_func`` is given.
            differentiable: What of the model gets a graph.
            compact: Copy large tensors to a place of their own.
            detailed: Keep what the softmaxes read, and the calls of the head, too.
            values: Follow the values of every attention, too.
        """
        return Recorder(
            self.model,
            self.taps,
            self.head_begins,
            self.head_follows,
            self.places,
            channels_first=self.channels_first,
            width=self.width,
            tokens_first=partial(self.tokens_first, batch=len(images)),
            differentiable=differentiable,
            compact=compact,
            detailed=detailed,
            images=images,
            values=values,
        )

    @abstractmethod
    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        """Place the recorded sites on the image.

        Raises:
            RecordingError: What was recorded is not what this family does.
            UnsupportedModelError: The family is known, but not this setting of it.
        """


class BlockTopology(Topology):
    """A family whose blocks are found wherever they are; the first convolution outside them reads the images."""

    @property
    @abstractmethod
    def blocks(self) -> dict[str, nn.Module]:
        """All blocks by name, first to last."""

    @property
    def places(self) -> Iterable[nn.Module]:
        return self.blocks.values()

    @cached_property
    def convolutions(self) -> dict[str, nn.Conv2d]:
        """Convolutions outside the blocks."""
        return convolutions(self.model, self.blocks.values())

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """LayerNorms and RMSNorms outside the blocks."""
        found = outside(self.model, self.blocks.values(), nn.Module)
        return {name: part for name, part in found.items() if channels_of(part) is not None}

    @property
    def entrance(self) -> str:
        return next(iter(self.convolutions))

    @property
    def head_follows(self) -> nn.Module | None:
        return list(self.blocks.values())[-1]


def innermost(model: nn.Module, holds: Callable[[nn.Module], bool]) -> bool:
    """Whether ``model`` is the smallest module that holds something, not a wrapper of it."""
    return holds(model) and not any(map(holds, model.children()))


def register_topology(family: type[Topology]) -> type[Topology]:
    """Class decorator: make a family known to ``find_topology``. The last one registered is tried first.

    Raises:
        TypeError: It is no subclass of ``Topology``.
    """
    if not (isinstance(family, type) and issubclass(family, Topology)):
        raise TypeError(f"register_topology was given {family!r}; expected a subclass of Topology")
    _FAMILIES.insert(0, family)
    return family


def find_topology(model: nn.Module) -> Topology:
    """The topology of ``model``, or of the one transformer inside it.

    Raises:
        UnsupportedModelError: Nothing, or more than one thing, inside ``model`` is of a known family.

    Example:
        >>> import timm
        >>> find_topology(timm.create_model("vit_tiny_patch16_224")).family
        'plain'
    """
    structure, families, seen = structure_of(model), tuple(_FAMILIES), _seen.get(model)
    if seen is not None and (seen.structure, seen.families) == (structure, families):
        recall(seen.parts)
        return seen.family(model.get_submodule(seen.name))
    topology = _found(model)
    name = next(name for name, module in model.named_modules() if module is topology.model)
    _seen[model] = _Seen(structure, families, name, type(topology), known_so_far() or {})
    return topology


def followed(model: nn.Module) -> set[Any]:
    """In what circumstances every attention of a model whose topology was found has been followed; to be added to."""
    return _seen[model].followed


def takes_videos(model: nn.Module) -> bool:
    """Whether there is a transformer of a known family in ``model``, and it is one of videos."""
    try:
        return find_topology(eager(model)).axes == 3
    except UnsupportedModelError:
        return False


def _found(model: nn.Module) -> Topology:
    level = [model]
    while level:
        level = [eager(module) for module in level]
        first = ((module, next((family for family in _FAMILIES if family.matches(module)), None)) for module in level)
        found = {id(module): (module, family) for module, family in first if family is not None}
        if len(found) > 1:
            raise UnsupportedModelError(several_models(model, [module for module, _ in found.values()]))
        for module, family in found.values():
            # One that holds two, such as a student and its teacher, may look like one with twice the blocks.
            inside = [part for part in map(eager, module.children()) if any(one.matches(part) for one in _FAMILIES)]
            if len(inside) > 1:
                raise UnsupportedModelError(several_models(model, inside))
            topology = family(module)
            # A wrapper may pass on the attributes of what it holds; the modules are inside that one.
            if topology.entrance in named(module) and not any(map(calls_parts, module.modules())):
                return topology
        level = [child for module in level for child in module.children()]
    known = {family.family: family.expects for family in reversed(_FAMILIES)}
    raise UnsupportedModelError(no_family(model, known))
