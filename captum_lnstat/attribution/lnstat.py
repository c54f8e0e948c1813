"""``LNStatAttribution``: Captum's surface, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn

from captum_lnstat.attribution.arguments import check_switch, joined
from captum_lnstat.attribution.base import GridAttribution, record, relevance_of, warn_of_nothing
from captum_lnstat.attribution.pixels import Interpolation
from captum_lnstat.errors import warn_caller
from captum_lnstat.recording.devices import maps_within
from captum_lnstat.recording.forward import ForwardArgs, Output, Target, TensorOrTuple, log_usage
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.statistics import ResidualShare
from captum_lnstat.recording.verdicts import read_at_the_end
from captum_lnstat.rules import Rule, Settings, find_rule, rule_names
from captum_lnstat.rules.rule import DEFAULT
from captum_lnstat.trace.steps import MergingShare


def check_effect(rule: Rule, given: list[str]) -> None:
    """Raise if an option was given that the rule would silently ignore."""
    for name in given:
        if name not in rule.options:
            having = (f"rule={other!r}" for other in rule_names() if name in find_rule(other).options)
            raise ValueError(
                f"{name} does nothing with rule={rule.name!r}; expected {' or '.join(having)}. Leave {name} out, or "
                "take such a rule"
            )


def one_residual(rule: Rule, residual: ResidualShare, evidence_residual: ResidualShare | None) -> ResidualShare:
    """The residual share, with a warning for what will go."""
    if evidence_residual is not None:
        if not (rule.class_specific and rule.at_every_block):
            raise ValueError(f"evidence_residual does nothing with rule={rule.name!r}; expected residual")
        warn_caller("evidence_residual is deprecated: residual is the share of every rule since 0.2", FutureWarning)
        residual = evidence_residual
    if isinstance(residual, str) and residual == "ratio":
        warn_caller(
            "residual='ratio' is deprecated: it ends in the image's corners on ViTs with tokens of huge norm there. "
            "Leave residual out, or take 'update'",
            FutureWarning,
        )
    return residual


class LNStatAttribution(GridAttribution):
    r"""Explains ViT, DeiT and Swin models from attention and the statistics of tokens at the LayerNorms.

    Every part of the target's score is put on the token that it came from, and rolled back to the patches (evidence
    ``E``): by the residual share of each token, which follows from variances at the LayerNorms, and by attention
    weighted by its share of the variance that it brings to a token. Shifted windows are undone exactly. One forward
    pass; only the classifier head is differentiated.

    The idea is that of Nguyen, Lee and Kim, "Inspecting Explainability of Transformer Models with Additional
    Statistical Information" (arXiv 2311.11378). Its formulas are not public to us: those used here are derived, and
    written out in this project's documentation.

    Args:
        forward_func (Callable): The model, or any function that runs it once and returns one score, or one row of class
            scores, an image.
        model (nn.Module, optional): The transformer that ``forward_func`` runs. Needed if ``forward_func`` is not it.
        rule (str): ``"lnstat"`` (default), the positive part of the evidence smoothed by a 28th of the map's side;
            where all blocks see the same grid, of that from the upper third of the blocks.
            ``"evidence"``, ``E``: signed and complete. ``"rollout"``, ``P``: what the head looks at, rolled back in the
            same way; class-agnostic, sums to 1. ``"gradient"``: Chefer's generic rule with token statistics,
            ``r <- alpha * r + ((1 - alpha) * r) A'`` with the rows of ``A' = E_h[(dA * A)^+]`` divided by their sums,
            and one partial backward pass.
        residual (str): The residual share ``alpha``, the part of a token after the attention that is the token before
            it: ``"deviation"`` (default), ``var(x - mean x) / (var(x - mean x) + var(e))``, ``x`` less the mean token
            and ``e`` what the update is apart from that of the mean value; ``"update"``,
            ``var(x) / (var(x) + var(d))``; ``"half"``; ``"ratio"``, ``min(1, var(x) / var(x + d))``, which ends in the
            image's corners on a ViT with tokens of huge norm there, and is deprecated.
        head_fusion (str or Callable, optional): How the heads become one map. Attention weighted by its share of the
            update's variance: ``"deviation"``, of the variance of ``e`` (default of ``"lnstat"`` and ``"evidence"``),
            or ``"variance"``, of that of ``d`` (default of ``"rollout"``). Or the probabilities alone: ``"mean"``,
            ``"max"``, ``"min"`` or a callable from ``(batch, head, query, key)`` to ``(batch, query, key)``.
            ``"gradient"`` always takes the mean.
        merging (str): How a merged token gives its relevance to its children: ``"variance"`` (default), by
            their share of the variance at the merging's LayerNorm, or ``"uniform"``.
        contrastive (bool): Explain the target's score minus the probability-weighted mean of the others: sharper
            between classes, less of the object. Not for ``"rollout"``, which has no class. Default: False
        normalized (bool): For ``"gradient"``: rows of the positive gradient attention divided by their sum. False is
            Chefer's form, which lights up whole windows of a Swin. Default: True
        interpolation (str): ``"bilinear"`` (default) or ``"nearest"``.
        output (str, int or Callable, optional): Which scores to explain if ``forward_func`` returns several: a key or
            attribute, a position, or a function of what it returns. By default the tensor itself, or a Hugging Face
            output's ``logits``.
        max_memory (int, optional): Bytes that attention maps, and what is made of them, may take at once. By default as
            many as stay in the cache on a CPU, and half of what a GPU has left. A small bound is slower, not another
            map; some queries of one head are always taken.
        evidence_residual (str, optional): Deprecated: ``residual`` is the share of every rule.

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
        rule: str = DEFAULT,
        residual: ResidualShare = "deviation",
        head_fusion: HeadFusion | None = None,
        merging: MergingShare = "variance",
        contrastive: bool = False,
        normalized: bool = True,
        interpolation: Interpolation = "bilinear",
        output: Output = None,
        max_memory: int | None = None,
        evidence_residual: ResidualShare | None = None,
    ) -> None:
        chosen = find_rule(rule)
        residual = one_residual(chosen, residual, evidence_residual)
        check_switch("contrastive", contrastive)
        check_switch("normalized", normalized)
        fusion = chosen.head_fusion if head_fusion is None else head_fusion
        settings = Settings(residual, fusion, merging, normalized)
        super().__init__(
            forward_func, model, settings=settings, interpolation=interpolation, output=output, max_memory=max_memory
        )
        given = {
            "residual": residual != "deviation",
            "head_fusion": head_fusion is not None,
            "contrastive": contrastive,
            "normalized": not normalized,
        }
        check_effect(chosen, [name for name, changed in given.items() if changed])
        self._rule = chosen.name
        self.contrastive = contrastive

    @classmethod
    def get_name(cls) -> str:
        """The name that Captum shows."""
        return "LN Stat"

    def has_convergence_delta(self) -> bool:
        """True for a rule that adds up to the score, such as ``"evidence"``."""
        return self.method.complete

    @property
    def rule(self) -> str:
        """The rule's name. Options go with it, so another rule is another instance: it cannot be set."""
        return self._rule

    @property
    def normalized(self) -> bool:
        """As given; cannot be set, for the same reason."""
        return self.settings.normalized

    @property
    def method(self) -> Rule:
        """The rule, by its name."""
        return find_rule(self.rule)

    def relevance_per_target(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Sequence[Target],
        additional_forward_args: ForwardArgs = None,
    ) -> Tensor:
        """Relevance for many targets from one forward pass, at little more than the price of one.

        Args:
            inputs: Images, as for ``attribute``.
            targets: The targets, each in any of Captum's forms: ``range(7)`` for the first seven classes.
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
            >>> LNStatAttribution(vit).relevance_per_target(torch.rand(2, 3, 64, 64), range(7)).shape
            torch.Size([7, 2, 8, 8])
        """
        if not isinstance(targets, Iterable):
            raise TypeError(f"targets is {targets!r}; expected several, such as range(7) or [{targets!r}]")
        targets = list(targets)
        if not (self.method.class_specific and self.method.at_every_block):
            raise ValueError(
                f"rule={self.rule!r} has no maps of many targets in one pass; expected 'lnstat' or 'evidence'. "
                + ("Call attribute for each" if self.method.class_specific else "Its map is the same for every target")
            )
        if not targets:
            raise ValueError("targets is empty; expected at least one")
        with read_at_the_end(), maps_within(self.max_memory):
            outcome = record(self, inputs, targets, additional_forward_args)
            relevance = relevance_of(self, outcome)
            warn_of_nothing(self.method, outcome, relevance)
        return joined([one.grid[None] for one in relevance])

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
