"""An attribution method compiled for one shape of images: the model and its explanation as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.arguments import the_image
from captum_lnstat.attribution.capture import capture, for_a_compiler
from captum_lnstat.attribution.one_pass import OnePass
from captum_lnstat.errors import RecordingError, UnsupportedModelError, quietly, warn_caller
from captum_lnstat.recording.forward import Target, TensorOrTuple, format_output, is_tuple, log_usage
from captum_lnstat.topology.anatomy.structure import structure_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# From images and targets to attributions and relevance.
Explain = Callable[[Tensor, Target], tuple[Tensor, Tensor]]
# How far the compiled map may be from the other, relative to its largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
HALF_TOLERANCE = 0.1


class CompiledAttribution(OnePass):
    """What ``compile`` returns: the same maps as the method's own, for images of the one shape that it was given.

    Not one Python line of the model or of this package runs between the first operation and the last. All checks of the
    method are part of the graph, and read once at the end. Where one does not hold, or an image would have taken
    another way (a map of nothing, an attention with other zeros), the images are explained by the method itself, which
    says what it has to say; a warning tells that it took that long.

    After a change of the model it has to be compiled again, as a call says. What other modules ``forward_func`` runs is
    not known to it.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        explain: Explain,
        model: nn.Module,
        example: Tensor,
        target: Target,
        *,
        backend: str | Callable[..., Any] | None,
        mode: str | None,
    ) -> None:
        _check_can_be(model)
        super().__init__(forward_func)
        self._explain, self._model, self._example = explain, model, example.detach().clone()
        self._target: Target = int(target) if isinstance(target, Tensor) and target.dim() == 0 else target
        self._modules = list(model.modules())
        self._autocast = _autocast_here(example.device)
        with torch.inference_mode(False):
            explain(self._example, target)  # says or refuses what there is, and finds out what is asked of a model once
            inputs = self._inputs(self._example, target)
            with quietly(), torch.no_grad():
                graph: Any = capture(self._captured, inputs)
            if backend is not None:
                with torch.no_grad():
                    graph = for_a_compiler(graph, inputs)
                graph = torch.compile(graph, backend=backend, mode=mode, fullgraph=True)
            self._graph = graph
            self._seen = self._state()
            for image in (self._example, self._example.flip(-1).contiguous()):
                self._compare(image)

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(self, inputs: TensorOrTuple, target: Target = None) -> TensorOrTuple:
        """As the method's ``attribute``, for images like those it was compiled for.

        Args:
            inputs: Images of the shape, dtype and device of the example.
            target: One class an image in a tensor, if the example's was; else the example's, or left out.

        Raises:
            ValueError: Images, targets or autocast that it was not compiled for, or a model that has changed since.
        """
        attributions: TensorOrTuple = format_output(is_tuple(inputs), (self._run(inputs, target)[0],))
        return attributions

    def relevance(self, inputs: TensorOrTuple, target: Target = None) -> Float[Tensor, "batch row column"]:
        """As the method's ``relevance``; the arguments are those of ``attribute``."""
        return self._run(inputs, target)[1]

    def _run(self, inputs: TensorOrTuple, target: Target) -> tuple[Tensor, Tensor]:
        image = self._checked(the_image(inputs))
        target = self._checked_target(target)
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(image.device):
            attribution, grid, holds = self._graph(*self._inputs(image, target))
            # Looked at while a device is at work.
            self._check_unchanged()
            if bool(holds):
                return attribution.clone(), grid.clone()  # the next call may write into the same memory
        explained = self._explain(image, target)
        warn_caller(
            "these images take another way through the method than the compiled one, so they were explained without "
            "it; the map is right. If it happens often, compile for an example that is like them"
        )
        return explained

    def _captured(self, image: Tensor, classes: Tensor | None = None) -> tuple[Tensor, ...]:
        return self._explain(image, self._target if classes is None else classes)

    def _inputs(self, image: Tensor, target: Target) -> tuple[Tensor, ...]:
        """What the graph is given: the images, and one class each if the target is of that form."""
        image = image.detach()
        image = image.clone() if image.is_inference() else image.contiguous()
        classes = _one_an_image(target, image)
        return (image,) if classes is None else (image, classes)

    def _checked(self, image: Tensor) -> Tensor:
        wanted = self._example
        seen = (tuple(image.shape), image.dtype, image.device)
        expected = (tuple(wanted.shape), wanted.dtype, wanted.device)
        if seen != expected:
            raise ValueError(
                f"inputs are {seen[0]} of {seen[1]} on {seen[2]}; this was compiled for {expected[0]} of {expected[1]} "
                f"on {expected[2]}. Compile another for these, or use attribute of the method, which takes any"
            )
        if _autocast_here(image.device) != self._autocast:
            raise ValueError(
                "autocast is not as it was where this was compiled; call it under the same autocast, or compile again"
            )
        return image

    def _checked_target(self, target: Target) -> Target:
        wanted, given = (_one_an_image(one, self._example) for one in (self._target, target))
        if wanted is not None and given is None:
            raise ValueError(f"target is {target!r}; this was compiled for a tensor of {len(wanted)} classes")
        if wanted is not None:
            return target
        if target is None or target is self._target:
            return self._target
        if isinstance(target, Tensor) or isinstance(self._target, Tensor) or target != self._target:
            raise ValueError(
                f"target is {target!r}; this was compiled for {self._target!r}. Compile with a tensor of one class an "
                "image to choose them at every call"
            )
        return self._target

    def _state(self) -> list[Any]:
        """What the graph was made of: modules with their settings, modes and hooks, and their weights."""
        found: list[Any] = [structure_of(self._model)]
        for module in self._modules:  # if there were others, their structure would be
            found += (module.training, *module._forward_pre_hooks, *module._forward_hooks)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    found += (id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
        return found

    def _check_unchanged(self) -> None:
        if self._state() != self._seen:
            raise ValueError(
                f"{type(self._model).__name__} has changed since this was compiled (its modules, settings, mode or "
                "weights); compile again"
            )

    def _compare(self, image: Tensor) -> None:
        """The graph gives the method's own maps, for the example and for another image."""
        target = self._target
        with torch.no_grad(), _no_autocast(image.device):
            _, grid, holds = self._graph(*self._inputs(image, target))
            grid, holds = grid.clone(), bool(holds)
        if not holds:
            return  # would be explained without it
        with quietly():
            wanted = self._explain(image, target)[1]
        weights = (weight.dtype for weight in self._model.parameters() if weight.is_floating_point())
        tolerance = TOLERANCE.get(next(weights, image.dtype))
        apart, size = float((grid - wanted).abs().max()), float(wanted.abs().max())
        if not apart <= (HALF_TOLERANCE if tolerance is None or self._autocast[0] else tolerance) * size:
            raise RecordingError(
                f"the compiled map is up to {apart:.2g} apart from the method's own, at values up to {size:.2g}: "
                f"something on the way is not made of torch's functions alone, or {type(self._model).__name__} is not "
                "the same from call to call. Use attribute of the method"
            )


def _check_can_be(model: nn.Module) -> None:
    if model.training:
        raise UnsupportedModelError(
            f"{type(model).__name__} is in train mode: what is drawn at random would be compiled as it is once. Call "
            "model.eval() first"
        )


def _one_an_image(target: Target, image: Tensor) -> Int[Tensor, " batch"] | None:
    """The classes, if there is one for each of the images in a tensor or a list."""
    if isinstance(target, list) and all(isinstance(one, int) for one in target):
        target = torch.tensor(target, device=image.device)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != (len(image),):
        return None
    return target.detach().to(image.device, torch.int64, copy=True)


def _autocast_here(device: torch.device) -> tuple[bool, torch.dtype | None]:
    on = torch.is_autocast_enabled(device.type)
    return on, torch.get_autocast_dtype(device.type) if on else None


def _no_autocast(device: torch.device) -> torch.autocast:
    """The casts are part of the graph."""
    return torch.autocast(device.type, enabled=False)
