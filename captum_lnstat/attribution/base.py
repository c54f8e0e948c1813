"""What every method on the patch grid shares: Captum's surface around one recorded forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.arguments import check_choice, check_finite, check_memory, joined, the_image
from captum_lnstat.attribution.batches import chunks
from captum_lnstat.attribution.compiled import CompiledAttribution
from captum_lnstat.attribution.describe import describe_pass
from captum_lnstat.attribution.one_pass import OnePass
from captum_lnstat.attribution.pixels import Interpolation, check_interpolation, to_pixels
from captum_lnstat.description import Description
from captum_lnstat.errors import warn_caller
from captum_lnstat.recording.devices import maps_within
from captum_lnstat.recording.forward import (
    ForwardArgs,
    Output,
    Target,
    TensorOrTuple,
    check_output,
    format_output,
    is_tuple,
    log_usage,
)
from captum_lnstat.recording.fusion import check_fusion
from captum_lnstat.recording.verdicts import read_at_the_end, remark
from captum_lnstat.rules.checks import check_fits
from captum_lnstat.rules.engine import Pass, run
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import Rule

if TYPE_CHECKING:
    from jaxtyping import Bool

UNREAD = (
    "the score has no gradient at the tokens. It is saturated or constant there (a sure sigmoid or softmax, a clamp, a "
    "ReLU that is off), or reads no token; let forward_func return the logits and explain these"
)
NOTHING = (
    "nothing reached the patches, or nothing that did was for the target. rule='evidence' shows what was against it as "
    "well, and says where a score has no gradient"
)


class GridAttribution(OnePass):
    """Attributions made on the patch grid of a vision transformer from one recorded forward pass.

    The base of ``LNStatAttribution`` and of the baselines; a subclass says by which rule.
    """

    contrastive = False  # the score is that of the target against the other classes

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        settings: Settings,
        interpolation: Interpolation,
        output: Output = None,
        max_memory: int | None = None,
    ) -> None:
        if not callable(forward_func):
            raise TypeError(
                f"forward_func is a {type(forward_func).__name__}; expected the model, or a function that runs it"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected the module that forward_func runs")
        if model is None and not isinstance(forward_func, nn.Module):
            raise TypeError(
                f"forward_func is a {type(forward_func).__name__}, not a module; pass the transformer that it runs as "
                "model=, so that its layers can be recorded"
            )
        super().__init__(forward_func)
        check_interpolation(interpolation)
        check_fusion(settings.head_fusion)
        check_output(output)
        check_choice("residual", settings.residual, ("deviation", "update", "ratio", "half"))
        check_choice("merging", settings.merging, ("uniform", "variance"))
        self.model = model
        # The module given first: Captum's wrappers put a function in the place of forward_func afterwards.
        self._module = forward_func if isinstance(forward_func, nn.Module) else None
        self.settings = settings
        self.interpolation = interpolation
        self.output = output
        self.max_memory = check_memory(max_memory)

    @property
    @abstractmethod
    def method(self) -> Rule:
        """The rule."""

    @property
    def transformer(self) -> nn.Module:
        """Read at call time: the transformer that ``forward_func`` runs."""
        if self.model is not None:
            return self.model
        if isinstance(self.forward_func, nn.Module):
            return self.forward_func
        assert self._module is not None
        return self._module

    def relevance(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: ForwardArgs = None,
        *,
        internal_batch_size: int | None = None,
    ) -> Tensor:
        """Relevance on the model's patch grid.

        Args:
            inputs: Images, ``(batch, channels, height, width)``, normalised for the model.
            target: The class to explain, in any of Captum's forms. The class-agnostic rules need none.
            additional_forward_args: Passed on to ``forward_func`` after the images.
            internal_batch_size: As for ``attribute``.

        Returns:
            A ``(batch, rows, columns)`` tensor in float32 (float64 for a float64 model); ``(batch, frames, rows,
            columns)`` for videos.
        """
        parts = chunks(the_image(inputs), target, additional_forward_args, internal_batch_size)
        return joined([explain_batch(self, image, [wanted], arguments)[1].grid for image, wanted, arguments in parts])

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Target = None,
        additional_forward_args: ForwardArgs = None,
        *,
        internal_batch_size: int | None = None,
    ) -> TensorOrTuple:
        """As ``LNStatAttribution.attribute``, errors included.

        For a method that is the same for every class a target does not matter, but has to fit the output.
        """
        return self._attribute(inputs, target, additional_forward_args, internal_batch_size)[0]

    def compile(
        self,
        example: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: ForwardArgs = None,
        *,
        backend: str | Callable[..., Any] | None = "inductor",
        mode: str | None = None,
    ) -> CompiledAttribution:
        """The method for images of one shape as one graph with the model, without Python on the way.

        On a GPU at small batches, and for small models on a CPU, most of the time of an explanation is that of the
        host; a compiled one has next to none. To compile takes ten seconds to a minute.

        Args:
            example: Images of the shape, dtype and device that it will be given, as for ``attribute``.
            target: A tensor or list of one class an image, which then goes with every call; or any other form of
                target, which then is that of all calls.
            additional_forward_args: As for ``attribute``; the same in all calls.
            backend: As for ``torch.compile``; ``None`` runs the graph as it was captured.
            mode: As for ``torch.compile``: ``"reduce-overhead"`` replays it as a CUDA graph.

        Returns:
            An attribution method of Captum with ``attribute(inputs, target)`` and ``relevance(inputs, target)``.

        Raises:
            UnsupportedModelError: The model is in train mode, or something in it is no function of torch.
            RecordingError: The compiled map is not that of the method.

        Example:
            >>> import torch
            >>> from captum_lnstat import LNStatAttribution, zoo
            >>> lnstat = LNStatAttribution(zoo.load("vit-mini").model)
            >>> images, classes = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])
            >>> compiled = lnstat.compile(images, classes, backend=None)
            >>> compiled.attribute(torch.rand(2, 3, 64, 64), target=torch.tensor([0, 6])).shape
            torch.Size([2, 3, 64, 64])
        """
        method = copy(self)

        def explain(image: Tensor, wanted: Target) -> tuple[Tensor, Tensor]:
            outcome, relevance = explain_batch(method, image, [wanted], additional_forward_args)
            with torch.inference_mode(False), torch.no_grad():
                return check_fits(method._to_inputs(outcome, relevance.grid, image)), relevance.grid

        return CompiledAttribution(
            self.forward_func, explain, self.transformer, the_image(example), target, backend=backend, mode=mode
        )

    def describe(
        self, inputs: Tensor | tuple[Tensor, ...], target: Target = None, additional_forward_args: ForwardArgs = None
    ) -> Description:
        """What was recognised: family, grid, prefix tokens, pooling, sites, shares. ``print`` it.

        Args:
            inputs: As for ``attribute``; one image is enough.
            target: Any class; taken as the first output if it is not given.
            additional_forward_args: As for ``attribute``.
        """
        outcome = run(
            self.forward_func,
            self.transformer,
            the_image(inputs),
            [target],
            additional_forward_args,
            output=self.output,
        )
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(outcome.output.device.type, enabled=False):
            return describe_pass(self.transformer, outcome, self.method, self.settings)

    def _to_inputs(self, outcome: Pass, grid: Tensor, image: Tensor) -> Tensor:
        """Relevance of patches as an attribution of the image's shape: evenly over the channels, the sum kept."""
        channels, trace = outcome.trace.channel_axis, outcome.trace
        size = (*image.shape[1:channels], *image.shape[channels + 1 :])
        pixels = to_pixels(grid, size, trace.patch, self.interpolation, trace.origin)
        spread = (pixels / image.shape[channels]).to(image.dtype)
        return spread.unsqueeze(channels).expand(image.shape).contiguous()

    def _attribute(
        self,
        inputs: TensorOrTuple,
        target: Target,
        additional_forward_args: ForwardArgs,
        internal_batch_size: int | None,
    ) -> tuple[TensorOrTuple, Tensor | None]:
        """The attributions, and how far relevance misses the score if the rule has one to miss."""
        attributions: list[Tensor] = []
        deltas: list[Tensor] = []
        for image, part, arguments in chunks(the_image(inputs), target, additional_forward_args, internal_batch_size):
            outcome, relevance = explain_batch(self, image, [part], arguments)
            with torch.inference_mode(False), torch.no_grad():
                attributions.append(check_fits(self._to_inputs(outcome, relevance.grid, image)))
                if outcome.score is not None and self.method.complete:
                    deltas.append((relevance.total - outcome.score).to(relevance.total.dtype))
        return format_output(is_tuple(inputs), (joined(attributions),)), joined(deltas) if deltas else None


def record(
    method: GridAttribution,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Sequence[Target],
    additional_forward_args: ForwardArgs = None,
) -> Pass:
    """One forward pass, with what the method's rule needs."""
    rule = method.method
    return run(
        method.forward_func,
        method.transformer,
        the_image(inputs),
        targets,
        additional_forward_args,
        class_specific=rule.class_specific,
        contrastive=method.contrastive,
        differentiable=rule.differentiable,
        starts=rule.starts,
        detailed=rule.detailed,
        output=method.output,
    )


def relevance_of(method: GridAttribution, outcome: Pass) -> tuple[Relevance, ...]:
    """The relevance of every score of a pass, finite."""
    # Relevance is computed in float32 whatever the caller's autocast makes of the model.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(outcome.output.device.type, enabled=False):
        found = method.method.compute(outcome, method.settings)
    for relevance in found:
        check_finite(relevance.grid)
    return found


def explain_batch(
    method: GridAttribution,
    inputs: Tensor | tuple[Tensor, ...],
    targets: Sequence[Target] = (None,),
    additional_forward_args: ForwardArgs = None,
) -> tuple[Pass, Relevance]:
    """The pass and the relevance of the first target; a map of nothing is warned about."""
    with read_at_the_end(), maps_within(method.max_memory):
        outcome = record(method, inputs, targets, additional_forward_args)
        relevance = relevance_of(method, outcome)
        warn_of_nothing(method.method, outcome, relevance)
    return outcome, relevance[0]


def warn_of_nothing(rule: Rule, outcome: Pass, found: Sequence[Relevance], *, unread_only: bool = False) -> None:
    """Warn of maps that are zero everywhere, and say it where the score has no gradient.

    Args:
        rule: The rule.
        outcome: The pass.
        found: The relevance of every score.
        unread_only: Only of the maps of scores without a gradient.
    """
    grids = found[0].grid[:, None] if len(found) == 1 else torch.stack([one.grid for one in found], 1)
    something = grids.flatten(2).any(-1)  # (batch, score)
    remark(something, partial(_say_what_is_empty, something, rule, outcome, unread_only))


def _say_what_is_empty(something: Bool[Tensor, "batch score"], rule: Rule, outcome: Pass, unread_only: bool) -> None:
    empty = ~something
    known = rule.class_specific and rule.differentiable == "head" and not outcome.head.reads
    unread = outcome.head.cotangent[0].unread() if known else torch.zeros_like(empty)
    for which, why in ((empty & unread, UNREAD), (empty & ~unread, NOTHING)):
        images = which.any(1).nonzero()[:, 0].tolist()
        if images and not (unread_only and why is NOTHING):
            of = f" for targets {', '.join(map(str, which.any(0).nonzero()[:, 0].tolist()))} of those given"
            of = of if empty.shape[1] > 1 else ""
            warn_caller(f"the map of image {', '.join(map(str, images))} of the batch{of} is zero everywhere: {why}")
