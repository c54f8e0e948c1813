"""``LNStatAttribution``: Captum's surface, and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, overload

import torch
from captum.attr import GradientAttribution
from torch import Tensor, nn

from captum_lnstat import rules
from captum_lnstat._compat import _format_output, _is_tuple, log_usage
from captum_lnstat._typing import ForwardArgs, Target, TensorOrTuple
from captum_lnstat.batching import chunks
from captum_lnstat.checks import check_complete, check_fits, check_image
from captum_lnstat.description import Description, describe_pass
from captum_lnstat.engine import Needs, Pass, run
from captum_lnstat.errors import RecordingError
from captum_lnstat.fusion import HeadFusion, check_fusion
from captum_lnstat.interpolation import Interpolation, check_interpolation, to_pixels
from captum_lnstat.outputs import Output, check_output
from captum_lnstat.rules import Relevance, Settings
from captum_lnstat.statistics import MergingShare, ResidualShare

Rule = Literal["lnstat", "evidence", "rollout", "gradient"]
RULES: tuple[Rule, ...] = ("lnstat", "evidence", "rollout", "gradient")


# The rules in which an option that not all of them have does something.
_IN_EFFECT: dict[str, tuple[Rule, ...]] = {
    "residual": ("lnstat", "rollout", "gradient"),
    "evidence_residual": ("lnstat", "evidence"),
    "head_fusion": ("lnstat", "evidence", "rollout"),
    "contrastive": ("lnstat", "evidence", "gradient"),
    "normalized": ("gradient",),
}


def check_effect(rule: Rule, given: list[str]) -> None:
    """Raise if an option was given that the rule would silently ignore."""
    for name in given:
        if rule not in _IN_EFFECT[name]:
            rules_with_it = " or ".join(f"rule={other!r}" for other in _IN_EFFECT[name])
            raise ValueError(
                f"{name} does nothing with rule={rule!r}; expected {rules_with_it}. Leave {name} out, or take such a "
                "rule"
            )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_switch(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False; a string such as ``"no"`` would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")


class GridAttribution(GradientAttribution):  # type: ignore[misc]
    """Attributions made on the patch grid of a vision transformer from one recorded forward pass.

    The base of ``LNStatAttribution`` and of the baselines; a subclass says what it needs from the pass and how it
    turns it into relevance.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        settings: Settings,
        interpolation: Interpolation,
        output: Output = None,
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
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected the module that forward_func runs")
        super().__init__(forward_func)
        check_interpolation(interpolation)
        check_fusion(settings.head_fusion)
        check_output(output)
        check_choice("residual", settings.residual, ("ratio", "update", "half"))
        check_choice("evidence_residual", settings.evidence_residual, ("ratio", "update", "half"))
        check_choice("merging", settings.merging, ("uniform", "variance"))
        self.model = model
        # The module given first: Captum's wrappers put a function in the place of forward_func afterwards.
        self._module = forward_func if isinstance(forward_func, nn.Module) else None
        self.settings = settings
        self.interpolation = interpolation
        self.output = output

    @abstractmethod
    def _needs(self) -> Needs:
        """What the rule needs from a forward pass."""

    @abstractmethod
    def _relevance(self, outcome: Pass) -> Relevance:
        """The rule."""

    def attribute_future(self) -> NoReturn:
        """Not implemented, as for Captum's own one-pass methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: relevance is what a patch contributed, not what a change of it would do."""
        return True

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not on offer: what ended on prefix tokens and biases is not in the attributions."""
        raise NotImplementedError(
            "the delta needs what ended on prefix tokens and biases, which no attribution holds; use "
            "LNStatAttribution(..., rule='evidence').attribute(..., return_convergence_delta=True)"
        )

    def _transformer(self) -> nn.Module:
        """Read at call time: the transformer that ``forward_func`` runs."""
        if self.model is not None:
            return self.model
        if isinstance(self.forward_func, nn.Module):
            return self.forward_func
        assert self._module is not None
        return self._module

    def _pass(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target,
        additional_forward_args: ForwardArgs,
        needs: Needs,
    ) -> Pass:
        image = the_image(inputs)
        return run(self.forward_func, self._transformer(), image, target, additional_forward_args, needs, self.output)

    def _explain(
        self, inputs: Tensor | tuple[Tensor, ...], target: Target, additional_forward_args: ForwardArgs
    ) -> tuple[Pass, Relevance]:
        outcome = self._pass(inputs, target, additional_forward_args, self._needs())
        return outcome, self._finite_relevance(outcome)

    def _finite_relevance(self, outcome: Pass) -> Relevance:
        # Relevance is computed in float32 whatever the caller's autocast makes of the model.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(outcome.output.device.type, enabled=False):
            relevance = self._relevance(outcome)
        check_finite(relevance.grid)
        return relevance

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
            A ``(batch, rows, columns)`` tensor in float32 (float64 for a float64 model).
        """
        parts = chunks(the_image(inputs), target, additional_forward_args, internal_batch_size)
        return joined([self._explain(*part)[1].grid for part in parts])

    def describe(
        self, inputs: Tensor | tuple[Tensor, ...], target: Target = None, additional_forward_args: ForwardArgs = None
    ) -> Description:
        """What was recognised: family, grid, prefix tokens, pooling, sites, shares. ``print`` it.

        Args:
            inputs: As for ``attribute``; one image is enough.
            target: Any class; taken as the first output if it is not given.
            additional_forward_args: As for ``attribute``.
        """
        outcome = self._pass(inputs, target, additional_forward_args, Needs())
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(outcome.output.device.type, enabled=False):
            return describe_pass(self._transformer(), outcome, self.settings)

    def _to_inputs(self, outcome: Pass, grid: Tensor, image: Tensor) -> Tensor:
        """Relevance of patches as an attribution of the image's shape: evenly over the channels, the sum kept."""
        pixels = to_pixels(grid, (image.shape[-2], image.shape[-1]), outcome.trace.patch, self.interpolation)
        spread = (pixels / image.shape[1]).to(image.dtype)
        return spread[:, None].expand(-1, image.shape[1], -1, -1).contiguous()

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
            outcome, relevance = self._explain(image, part, arguments)
            with torch.inference_mode(False), torch.no_grad():
                attributions.append(check_fits(self._to_inputs(outcome, relevance.grid, image)))
                if outcome.score is not None:
                    deltas.append((relevance.total - outcome.score).to(relevance.total.dtype))
        is_tuple = _is_tuple(inputs)
        return _format_output(is_tuple, (joined(attributions),)), joined(deltas) if deltas else None


def check_finite(grid: Tensor) -> Tensor:
    """The relevance, if it is finite."""
    if not bool(torch.isfinite(grid).all()):
        raise RecordingError(
            "the relevance is not finite: something in the forward pass overflowed. Expected activations whose "
            "variance fits the model's dtype"
        )
    return grid


def the_image(inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The image batch in either of Captum's forms, or an error that says what is wrong with it."""
    if isinstance(inputs, tuple) and len(inputs) != 1:
        raise ValueError(
            f"inputs is a tuple of {len(inputs)}; expected one image batch. Pass what else the model takes as "
            "additional_forward_args"
        )
    return check_image(inputs[0] if isinstance(inputs, tuple) else inputs)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts of a batch in one; a single part as it is."""
    with torch.inference_mode(False), torch.no_grad():
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class LNStatAttribution(GridAttribution):
    r"""Explains ViT, DeiT and Swin models from attention and the statistics of tokens at the LayerNorms.

    The residual share of every token in every block follows from the variances at the two LayerNorms that read it.
    With these shares the head's view is rolled back to the patches (perception ``P``), and every part of the target's
    score is put on the token that said it and rolled back in the same way (evidence ``E``). Shifted windows are undone
    exactly. One forward pass; only the classifier head is differentiated.

    The idea is that of Nguyen, Lee and Kim, "Inspecting Explainability of Transformer Models with Additional
    Statistical Information" (arXiv 2311.11378). Its formulas are not public to us: those used here are derived, and
    written out in this project's documentation.

    Args:
        forward_func (Callable): The model, or any function that runs it once and returns one score, or one row of class
            scores, an image.
        model (nn.Module, optional): The transformer that ``forward_func`` runs. Needed if ``forward_func`` is not it.
        rule (str): ``"lnstat"`` (default), ``max(P - mean P, P / 20) * max(E - median E, 0)`` in units of the score.
            ``"evidence"``, ``E``: signed and complete. ``"rollout"``, ``P``: class-agnostic, sums to 1.
            ``"gradient"``: Chefer's generic rule with token statistics, ``r <- alpha * r + r E_h[(dA * A)^+]``, with
            one partial backward pass.
        residual (str): The residual share of perception and of ``"gradient"``: ``"ratio"`` (default),
            ``min(1, var(x) / var(x + d))``; ``"update"``, ``var(x) / (var(x) + var(d))``; ``"half"``. ``"evidence"``
            has none.
        evidence_residual (str): The share with which evidence is rolled; same names, default ``"half"``. For
            ``"lnstat"`` and ``"evidence"``.
        head_fusion (str or Callable): ``"mean"`` (default), ``"max"``, ``"min"`` or a callable from
            ``(batch, head, query, key)`` to ``(batch, query, key)``. ``"gradient"`` always takes the mean.
        merging (str): How a merged token gives its relevance to its children: ``"variance"`` (default), by
            their share of the variance at the merging's LayerNorm, or ``"uniform"``.
        contrastive (bool): Explain the target's score minus the probability-weighted mean of the others: sharper
            between classes, less of the object. Not for ``"rollout"``, which has no class. Default: False
        normalized (bool): For ``"gradient"``: rows of the positive gradient attention divided by their sum.
            Default: False
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): Which scores to explain if ``forward_func`` returns several: a key or
            attribute, a position, or a function of what it returns. By default the tensor itself, or a Hugging Face
            output's ``logits``.

    Raises:
        ValueError, TypeError: An option is none of those above, or one that the rule would ignore; the message says
            which.

    Examples::

        >>> import torch
        >>> from captum_lnstat import LNStatAttribution, zoo
        >>> swin = zoo.load("swin-mini")
        >>> scene = zoo.scenes()[0]
        >>> image = swin.transform(scene.image)[None]
        >>> lnstat = LNStatAttribution(swin.model)
        >>> attribution = lnstat.attribute(image, target=scene.labels[0])
        >>> # Attribution size matches input size: 1 x 3 x 64 x 64
        >>> attribution.shape
        torch.Size([1, 3, 64, 64])
        >>> lnstat.relevance(image, target=scene.labels[0]).shape
        torch.Size([1, 16, 16])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        rule: Rule = "lnstat",
        residual: ResidualShare = "ratio",
        evidence_residual: ResidualShare = "half",
        head_fusion: HeadFusion = "mean",
        merging: MergingShare = "variance",
        contrastive: bool = False,
        normalized: bool = False,
        interpolation: Interpolation = "bilinear",
        output: Output = None,
    ) -> None:
        check_choice("rule", rule, RULES)
        check_switch("contrastive", contrastive)
        check_switch("normalized", normalized)
        settings = Settings(residual, head_fusion, merging, evidence_residual)
        super().__init__(forward_func, model, settings=settings, interpolation=interpolation, output=output)
        given = {
            "residual": residual != "ratio",
            "evidence_residual": evidence_residual != "half",
            "head_fusion": head_fusion != "mean",
            "contrastive": contrastive,
            "normalized": normalized,
        }
        check_effect(rule, [name for name, changed in given.items() if changed])
        self.rule = rule
        self.contrastive = contrastive
        self.normalized = normalized

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "LN Stat"

    def has_convergence_delta(self) -> bool:
        """True for ``rule="evidence"``, the rule that adds up to the score."""
        return self.rule == "evidence"

    def _needs(self) -> Needs:
        if self.rule == "rollout":
            return Needs()
        backward = self.rule == "gradient"
        return Needs(target=True, covector=not backward, contrastive=self.contrastive, output_gradients=backward)

    def _relevance(self, outcome: Pass) -> Relevance:
        trace, settings = outcome.trace, self.settings
        if self.rule == "rollout":
            return rules.perception(trace, settings)
        if outcome.output_gradients is not None:
            return rules.gradient(trace, outcome.output_gradients, settings, keep=False, normalized=self.normalized)
        return self._gradient_free(outcome)[0]

    def _gradient_free(self, outcome: Pass) -> tuple[Relevance, ...]:
        """The relevance of every score, once its evidence is seen to add up."""
        trace, settings = outcome.trace, self.settings
        assert outcome.u is not None
        assert outcome.constant is not None
        if self.rule == "evidence":
            evidence = relevance = rules.evidence(trace, outcome.u, outcome.constant, settings)
        else:
            relevance, evidence = rules.lnstat(trace, outcome.u, outcome.constant, settings)
        for one, score in zip(evidence, outcome.scores, strict=True):
            check_complete(one, trace, score)
        return relevance

    def relevance_per_target(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target],
        additional_forward_args: ForwardArgs = None,
    ) -> Tensor:
        """Relevance for many targets from one forward pass, at little more than the price of one.

        Args:
            inputs: Images, as for ``attribute``.
            targets: The targets, each in any of Captum's forms: ``range(10)`` for the first ten classes.
            additional_forward_args: As for ``attribute``.

        Returns:
            A ``(target, batch, rows, columns)`` tensor; ``[i]`` is ``relevance(inputs, targets[i])``.

        Raises:
            ValueError: No targets, or a rule that needs a backward pass for each (``"gradient"``), or none at all
                (``"rollout"``).

        Example:
            >>> import torch
            >>> from captum_lnstat import LNStatAttribution, zoo
            >>> vit = zoo.load("vit-mini").model
            >>> LNStatAttribution(vit).relevance_per_target(torch.rand(2, 3, 64, 64), range(10)).shape
            torch.Size([10, 2, 8, 8])
        """
        targets = list(targets)
        if self.rule not in ("lnstat", "evidence"):
            raise ValueError(
                f"rule={self.rule!r} has no maps of many targets in one pass; expected 'lnstat' or 'evidence'. "
                + ("Its map is the same for every target" if self.rule == "rollout" else "Call attribute for each")
            )
        if not targets:
            raise ValueError("targets is empty; expected at least one")
        outcome = run(
            self.forward_func,
            self._transformer(),
            the_image(inputs),
            targets[0],
            additional_forward_args,
            self._needs(),
            self.output,
            targets[1:],
        )
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(outcome.output.device.type, enabled=False):
            return check_finite(torch.stack([one.grid for one in self._gradient_free(outcome)]))

    @overload
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Target = ...,
        additional_forward_args: ForwardArgs = ...,
        *,
        internal_batch_size: int | None = ...,
        return_convergence_delta: Literal[False] = ...,
    ) -> TensorOrTuple: ...

    @overload
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Target = ...,
        additional_forward_args: ForwardArgs = ...,
        *,
        internal_batch_size: int | None = ...,
        return_convergence_delta: Literal[True],
    ) -> tuple[TensorOrTuple, Tensor]: ...

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: TensorOrTuple,
        target: Target = None,
        additional_forward_args: ForwardArgs = None,
        *,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> TensorOrTuple | tuple[TensorOrTuple, Tensor]:
        r"""Attribute the target's score to the pixels.

        Args:
            inputs (Tensor or tuple[Tensor]): Images, ``(batch, channels, height, width)``, normalised for the model,
                in a floating dtype. They are cast to the model's dtype, and the attribution back to theirs.
            target (int, tuple, Tensor or list, optional): The class to explain, in any of Captum's forms: one for all
                images or one an image. ``rule="rollout"`` needs none. Default: None
            additional_forward_args (Any, optional): Passed on to ``forward_func`` after the images. Default: None
            internal_batch_size (int, optional): Explain at most so many images at a time, to bound the memory. Targets
                and tensor arguments of one row an image are split with the images. Default: None, the whole batch
            return_convergence_delta (bool, optional): For ``rule="evidence"`` only. Default: False

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**, or 2-element tuple of **attributions**, **delta**:

            - **attributions**: Of the shape, dtype and tuple form of ``inputs``. The sum over the channels and pixels
              of an image is the sum of its patch relevance.
            - **delta** (*Tensor*, ``(batch,)``, float32): Evidence of the patches, of the prefix tokens and of the
              constant (biases), minus the score. Float error: below ``1e-4 * max(1, |score|)`` in float32.

        Raises:
            ValueError, TypeError: The images, an option or the target are not what is expected; the message says what
                is.
            AssertionError, IndexError, RuntimeError: The target does not fit the output, as in all of Captum: not
                given or of another form, an int out of range, a list or tensor with one out of range.
            UnsupportedModelError: The model, or a setting of it, cannot be explained with certainty.
            RecordingError: The forward pass did not add up.

        What ``forward_func`` raises by itself, for instance for images of a size that the model does not take, is
        passed on as it is.
        """
        if return_convergence_delta and not self.has_convergence_delta():
            raise ValueError(f"rule={self.rule!r} has no convergence delta; rule='evidence' has")
        attributions, delta = self._attribute(inputs, target, additional_forward_args, internal_batch_size)
        if not return_convergence_delta:
            return attributions
        assert delta is not None
        return attributions, delta
