"""Attribution methods by name and options, as functions from images and classes to one map an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.errors import near
from captum_lnstat.evaluation.seeds import seeded
from captum_lnstat.evaluation.specs import Spec, parse
from captum_lnstat.evaluation.subject import Subject
from captum_lnstat.explanation.subject.subject import resolve

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

Attribute = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Method:
    """A method on one model.

    Attributes:
        name: As it was given.
        attribute: From images and classes to attributions of the images' shape, or ``(batch, 1, height, width)``.
        alone: Explain one image at a time: for methods that draw random numbers, or that may mix the images of a batch.
        make: The same method from another model.
    """

    name: str
    attribute: Attribute
    alone: bool = False
    make: Callable[[Subject], Method] | None = None

    def on(self, subject: Subject) -> Method:
        """The same method on another model of the same structure.

        Raises:
            ValueError: It was not made from a name.
        """
        if self.make is None:
            raise ValueError(f"method {self.name!r} was made for one model; expected one of methods.build")
        return self.make(subject)

    def maps(
        self, images: Tensor, targets: Int64[Tensor, " batch"], names: list[str], seed: int = 0
    ) -> Float[Tensor, "batch height width"]:
        """One map an image, the sum over the channels, float32.

        Args:
            images: ``(batch, channel, height, width)``.
            targets: The class of each.
            names: What the randomness of each image hangs on, if the method has any.
            seed: The run's.

        Raises:
            ValueError: What came back is no map of the image, or not finite.
        """
        if self.alone:
            parts = []
            for place, name in enumerate(names):
                with seeded(name, seed):
                    one = slice(place, place + 1)
                    parts.append(self._checked(images[one], targets[one]))
            return torch.cat(parts)
        return self._checked(images, targets)

    def _checked(self, images: Tensor, targets: Tensor) -> Tensor:
        values = self.attribute(images, targets)
        values = values[0] if isinstance(values, tuple) and len(values) == 1 else values
        shape = tuple(images.shape)
        if not isinstance(values, Tensor) or tuple(values.shape) not in (shape, (shape[0], 1, *shape[2:])):
            got = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(f"method {self.name!r} returned {got}; expected the images' shape, {shape}")
        maps = values.detach().float().sum(1)
        if not bool(maps.isfinite().all()):
            raise ValueError(f"method {self.name!r} returned NaN or infinite values")
        return maps


def build(text: str, subject: Subject, batch_size: int = 32) -> tuple[Method, ...]:
    """The methods of a command line.

    Args:
        text: Names separated by commas, with options in brackets: ``lnstat,ig(n_steps=64),gradcam:blocks.3.norm1``. A
            class of Captum or of anyone else goes by its import path: ``captum.attr:DeepLift``.
        subject: The model.
        batch_size: How many images methods of many passes put through the model at a time.

    Raises:
        ValueError: A name is unknown, or a method does not take an option; the message says what is expected.

    Example:
        >>> import torch
        >>> from captum_lnstat import zoo
        >>> from captum_lnstat.evaluation.subject import read
        >>> methods = build("lnstat,ig(n_steps=4),captum.attr:Saliency(abs=False)", read("vit-mini"))
        >>> [tuple(method.maps(torch.rand(2, 3, 64, 64), torch.tensor([0, 1]), ["a", "b"]).shape) for method in methods]
        [(2, 64, 64), (2, 64, 64), (2, 64, 64)]
    """
    methods = []
    for spec in parse(text, "method"):
        try:
            again = partial(_method, spec, batch_size=batch_size)
            methods.append(replace(_method(spec, subject, batch_size), make=again))
        except TypeError as error:
            raise ValueError(f"method {spec.text!r} cannot be made: {error}") from error
    return tuple(methods)


def _method(spec: Spec, subject: Subject, batch_size: int) -> Method:
    base, colon, rest = spec.name.partition(":")
    if spec.name in METHODS or base in ("gradcam", "hirescam"):
        return _registered(spec, subject, batch_size)
    if spec.name in _BLIND:
        _expect(spec, ())
        return Method(spec.text, _BLIND[spec.name], alone=spec.name == "random")
    if colon:
        return _imported(spec, subject, base, rest)
    raise ValueError(
        f"unknown method {spec.name!r}; {near(spec.name, list(names()), 'expected one of ' + ', '.join(names()))} A "
        "class goes by its import path, package.module:Class"
    )


def _registered(spec: Spec, subject: Subject, batch_size: int) -> Method:
    name, _, layer = spec.name.partition(":")
    method, options = METHODS[name], dict(spec.options)
    if method.options is not None:
        _expect(spec, (*method.options, *(["steps"] if name == "ig" else [])))
    if layer:
        options["layer"] = layer
    if name == "ig":
        options = {"n_steps": options.pop("steps", 50), "internal_batch_size": batch_size, **options}
    try:
        attribute = method.make(subject.model, None, **options)
    except ValueError as error:
        raise ValueError(f"method {spec.text!r}: {error}") from error
    return Method(spec.text, attribute)


def _expect(spec: Spec, known: tuple[str, ...]) -> None:
    for key in spec.options:
        if key not in known:
            expected = f"expected {' or '.join(known)}" if known else "it has none"
            raise ValueError(f"method {spec.name!r} has no option {key!r}; {expected}")


def _random(images: Tensor, targets: Tensor) -> Tensor:
    """A random value a patch of a 14 x 14 grid: what any method has to beat."""
    grid = torch.rand(len(images), 1, 14, 14, device="cpu").to(images)
    return nn.functional.interpolate(grid, images.shape[2:], mode="bilinear", align_corners=False)


def _centre(images: Tensor, targets: Tensor) -> Tensor:
    """A Gaussian in the middle, its standard deviation a quarter of each side: what photographers give away."""
    height, width = images.shape[2:]
    down, across = (torch.linspace(-2, 2, 2 * side + 1, device="cpu")[1::2].square() for side in (height, width))
    bell = torch.exp(-(down[:, None] + across) / 2)
    return bell.to(images).expand(len(images), 1, height, width)


# What any method has to beat: maps that know neither the model nor the class.
_BLIND: dict[str, Attribute] = {"random": _random, "centre": _centre}


def names() -> tuple[str, ...]:
    """The names that need no import path."""
    return (*METHODS, *_BLIND)


def _imported(spec: Spec, subject: Subject, module: str, path: str) -> Method:
    """Any class with Captum's surface: options go to the constructor or to ``attribute``, whichever has them."""
    try:
        found = resolve(module, path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {spec.text!r} cannot be imported: {error}") from error
    is_class = inspect.isclass(found)
    if not is_class or not callable(getattr(found, "attribute", None)):
        raise ValueError(f"{spec.name!r} is no class with a method attribute; expected one like Captum's")
    made, called = inspect.signature(found).parameters, inspect.signature(found.attribute).parameters
    options = dict(spec.options)
    given: dict[str, Any] = {"model": subject.model} if "model" in list(made)[1:] else {}
    if isinstance(options.get("layer"), str) and "layer" in made:
        try:
            options["layer"] = subject.model.get_submodule(options["layer"])
        except AttributeError as error:
            raise ValueError(f"method {spec.text!r}: {error}") from None
    given.update({key: options.pop(key) for key in list(options) if key in made})
    unknown = [key for key in options if key not in called and not _takes_any(called)]
    if unknown:
        raise ValueError(f"neither {path} nor its attribute takes {unknown[0]!r}")
    method = found(subject.forward, **given)

    def attribute(images: Tensor, targets: Tensor) -> Any:
        target = {"target": targets} if "target" in called or _takes_any(called) else {}
        # A copy: Captum's gradient methods set requires_grad, with a warning, and grad of what they are given.
        return method.attribute(images.detach().clone().requires_grad_(), **target, **options)

    return Method(spec.text, attribute, alone=True)


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
